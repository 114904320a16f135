"""Evaluation: sampling answers and finding out how many are right."""
