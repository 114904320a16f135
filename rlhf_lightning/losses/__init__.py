"""Losses: pure functions of tensors that return one unreduced value per token, step, pair or example."""
