"""Labels datasets by sampling from a model, such as step labels for process reward models."""
