"""`python -m pruneexp.pages` is `pruneexp-report`."""

import sys

from pruneexp.pages import main

sys.exit(main())
