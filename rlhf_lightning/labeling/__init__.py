"""Labelling: datasets made from what a model samples, such as step labels for process reward models."""
