"""Code that runs inside a sandbox; standard library only, since little else is readable there."""
