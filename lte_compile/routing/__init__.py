"""Routers: what they are, the kinds there are, and the weights they start from."""
