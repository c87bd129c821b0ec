"""The device-driven engine: which slab goes where, moving it and computing with it, all without asking the host."""
