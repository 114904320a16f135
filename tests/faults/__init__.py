"""One test for each fault that was seen, named after what must hold."""
