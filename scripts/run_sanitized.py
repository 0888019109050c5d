"""Runs pytest on a build of the package with sanitizers: run_sanitized.py FOLDER [pytest arguments].

FOLDER holds `mudsc_fast/` with the sanitized `_core`. An editable install would win over it through its import hook, so
that hook is taken out first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
    sys.path.insert(0, str(folder))

    import mudsc_fast._core as core

    if not str(core.__file__).startswith(str(folder)):
        sys.exit(f"run_sanitized: {core.__file__} was imported, not the sanitized build in {folder}")
    sys.exit(pytest.main(sys.argv[2:]))
