"""Metrics of preferences, rewards and steps; ``functional`` has the formulas."""
