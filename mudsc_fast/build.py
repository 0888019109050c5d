"""What this build of the package is and what this machine can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any


def build_config() -> dict[str, Any]:
    """Describe the build.

    Returns a dict: ``version``, ``compiler``, ``isas_built`` and ``isas_usable`` (instruction sets of the CPU kernels,
    best last), ``isa`` (the one in use), ``cuda_archs`` (empty when built without CUDA) and ``triton`` (its version, or
    None when it is not installed). Nothing here touches a GPU driver.

    Raises:
        ValueError: ``MUDSC_FAST_ISA`` names an instruction set that this build does not have.
        RuntimeError: ``MUDSC_FAST_ISA`` names one that this CPU cannot run.
    """
    from mudsc_fast import _core

    config = _core.build_info()
    config["isa"] = _core.isa()
    found = importlib.util.find_spec("triton") is not None
    config["triton"] = importlib.metadata.version("triton") if found else None
    return config
