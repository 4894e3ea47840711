"""Routers and thresholds fitted to data, without training the model."""
