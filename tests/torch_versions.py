"""What code prints under torches with DLPack's exchange table, without one, and with a number in its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mudsc_fast as mf

# Older torches have no table; one of another kind is not to be followed.
_CHANGED = """
import sys, torch
if sys.argv[1] == "number":
    torch.Tensor.__dlpack_c_exchange_api__ = 1
elif sys.argv[1] == "none" and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
import mudsc_fast as mf
"""


def printed(code: str) -> list[str]:
    """As it is, without a table, and with a number; from where this package is, also when that is another build."""
    root = Path(mf.__file__).resolve().parent.parent
    runs = ([sys.executable, "-c", _CHANGED + code, kind] for kind in ("as it is", "none", "number"))
    return [subprocess.check_output(run, text=True, cwd=root) for run in runs]
