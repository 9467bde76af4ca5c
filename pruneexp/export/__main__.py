"""`python -m pruneexp.export` is `pruneexp-export`."""

import sys

from pruneexp.export.command import main

if __name__ == "__main__":
    sys.exit(main())
