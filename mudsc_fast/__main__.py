"""``python -m mudsc_fast`` is ``mudsc-fast``."""

from __future__ import annotations

import sys

from mudsc_fast.cli import main

sys.exit(main())
