"""Compiled kernels of mudsc_fast. Private: call the functions of the package instead."""

from typing import Any

from torch import Tensor

__version__: str

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def use_isa(name: str | None) -> None: ...
def peak_flops(bf16: bool) -> float: ...
def regroup(
    tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None, threads: int
) -> None: ...
def regroup_cuda(
    tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None, stream: int
) -> None: ...
def zip(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: Tensor,
    owner: Tensor,
    threads: int,
) -> tuple[float, int]: ...
def assign(similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor, threads: int) -> None: ...
