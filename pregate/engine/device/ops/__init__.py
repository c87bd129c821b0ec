"""The operations of a decoding step, each as plain torch and as a Triton kernel."""
