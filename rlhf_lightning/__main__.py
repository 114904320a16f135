"""``python -m rlhf_lightning`` is ``rlhf-lightning``."""

import sys

from .cli import main

if __name__ == "__main__":
    # The program's name in help pages.
    sys.argv[0] = "rlhf-lightning"
    main()
