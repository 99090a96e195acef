"""`python -m cpt.cli ...` is the command `cpt`, where the package is on the path and not installed."""

from __future__ import annotations

import sys

from cpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
