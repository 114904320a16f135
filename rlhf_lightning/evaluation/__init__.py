"""Evaluation: samples answers and verifies them."""
