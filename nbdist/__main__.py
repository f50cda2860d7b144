"""``python -m nbdist``."""

from nbdist.cli import main

if __name__ == "__main__":
    main()
