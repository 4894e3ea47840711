"""What goes with a forward pass: the model's mode and stage, padding, and what its routers score."""
