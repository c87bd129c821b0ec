"""One decoding step with fixed shapes; a family names its own."""
