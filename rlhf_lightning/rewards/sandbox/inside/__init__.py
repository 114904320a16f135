"""What runs inside a sandbox: the standard library alone, since little else can be read there."""
