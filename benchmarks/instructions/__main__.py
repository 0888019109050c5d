"""The command: ``python -m benchmarks.instructions [--update]``."""

from __future__ import annotations

import sys

from .counting import main

sys.exit(main(sys.argv[1:]))
