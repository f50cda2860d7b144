"""``python -m nbdist``."""

import sys

from nbdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
