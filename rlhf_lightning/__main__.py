"""``python -m rlhf_lightning`` is ``rlhf-lightning``."""

from .cli import main

if __name__ == "__main__":
    main()
