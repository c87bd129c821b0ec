"""Where time goes on a GPU: the link by itself, and the kernels of a decoding step."""
