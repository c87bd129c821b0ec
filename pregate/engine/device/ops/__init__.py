"""The operations of a decoding step, one a file: what it does, its reference implementation and its kernel."""
