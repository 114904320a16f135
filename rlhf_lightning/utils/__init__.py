"""Utilities for any part of the package, from which they import nothing."""
