"""Which backend runs an op on a device: one table, one function.

A backend is a module of this package with one function an op. ``pick`` takes the first usable one of the table's order;
one asked for by name that cannot run is an error with the reason. Nothing falls back silently.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

TRITON_NEEDED = (3, 6)  # the oldest that the kernels were compiled with and read back


def _always() -> str | None:
    return None


def _why_no_cuda_kernels() -> str | None:
    from mudsc_fast import _core

    if not _core.build_info()["cuda_archs"]:
        return "this build has no CUDA kernels (build with MUDSC_FAST_CUDA=ON)"
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device{_driver_trouble()}"
    return None


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mudsc-fast[gpu]')"
    found = _triton_version()
    if found and tuple(int(part) for part in found.split(".")[:2]) < TRITON_NEEDED:
        return f"Triton {found} is installed, its kernels here need 3.6 or newer (which torch 2.11 brings)"
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device{_driver_trouble()}"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # nightly builds have other names
        return ""


def _driver_trouble() -> str:
    """What torch says about the driver, such as that it is too old for this build."""
    if torch.version.cuda is None:
        return " (it was built without CUDA)"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f" ({str(error).splitlines()[0]})"
    return ""


@dataclass(frozen=True)
class Backend:
    """One row of the table: what a backend is called, where it runs, what it can do, and why it cannot run here."""

    name: str
    device_type: str
    ops: frozenset[str]
    why_not: Callable[[], str | None] = _always

    @property
    def module(self) -> ModuleType:
        """The module with one function for each op."""
        return importlib.import_module(f"mudsc_fast.backends.{self.name}")


# The largest n of the op "assign_small", for which GPUs have a kernel of their own; also in csrc/cuda/launch.h.
SMALL_ASSIGN = 256

# In order of preference for each device. "host" moves CUDA tensors to the CPU kernels and the result back.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu",
        "cpu",
        frozenset(
            {"regroup", "zip", "assign", "assign_small", "assign_tile", "assign_lists", "covariance", "similarity"}
        ),
    ),
    Backend("cuda", "cuda", frozenset({"regroup", "zip", "assign_small"}), _why_no_cuda_kernels),
    Backend("triton", "cuda", frozenset({"covariance", "similarity", "assign_tile"}), _why_no_triton),
    Backend("torch_device", "cuda", frozenset({"covariance"})),
    Backend("host", "cuda", frozenset({"regroup", "zip", "assign", "assign_small", "assign_tile", "similarity"})),
)


def pick(op: str, device: torch.device | str, requested: str = "auto") -> Backend:
    """Choose the backend that runs ``op`` on ``device``.

    Args:
        op: "regroup", "zip", "assign", "assign_small" (n <= SMALL_ASSIGN), "assign_tile", "assign_lists", "covariance"
            or "similarity".
        device: where the tensors live.
        requested: a backend's name, or "auto" for the first usable one.

    Raises:
        ValueError: no such backend, or it does not serve this op on this device, or it cannot run here (the message
            says why).
    """
    device_type = torch.device(device).type
    serving = [b for b in BACKENDS if op in b.ops and b.device_type == device_type]
    if requested != "auto":
        serving = [b for b in serving if b.name == requested]
        if not serving:
            known = sorted({b.name for b in BACKENDS if op in b.ops})
            raise ValueError(
                f"backend: {requested!r} does not run {op!r} on {device_type!r} tensors; backends of this op: {known}"
            )
    reasons = []
    for backend in serving:
        reason = backend.why_not()
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    why = "; ".join(reasons) or "no backend serves it"
    raise ValueError(f"backend: nothing here runs {op!r} on {device_type!r} tensors: {why}")
