"""Run ``python -m distgrad`` as the command ``distgrad``."""

from __future__ import annotations

import sys

from distgrad.command import main

if __name__ == "__main__":
    sys.exit(main())
