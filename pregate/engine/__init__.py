"""Offloaded inference: where expert slabs live, when they move, and the model that computes with them."""
