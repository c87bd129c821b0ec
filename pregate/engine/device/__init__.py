"""Device-driven decoding: a whole decoding step, fetches included, that never asks the host anything."""
