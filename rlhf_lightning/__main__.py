"""``python -m rlhf_lightning`` is ``rlhf-lightning``."""

import sys

from .cli import main

if __name__ == "__main__":
    # What help pages call the program.
    sys.argv[0] = "rlhf-lightning"
    main()
