"""What a model is worth and what it costs: quality, density, FLOPs and weight bytes, on tasks by name."""
