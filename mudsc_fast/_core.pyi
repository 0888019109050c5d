"""Compiled kernels of mudsc_fast. Private: call the functions of the package instead."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

_Made = TypeVar("_Made")

__version__: str

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def use_isa(name: str | None) -> None: ...
def peak_flops(bf16: bool) -> float: ...
def round_trip() -> float: ...
def segments(labels: Tensor, ptr: Tensor, members: Tensor) -> int: ...
def regroup_plain(tensor: Tensor, labels: Tensor, dim: int, size: int, scale: Tensor | None, out: Tensor) -> bool: ...
def regroup(
    tensor: Tensor, out: Tensor, dim: int, ptr: Tensor, members: Tensor, scale: Tensor | None, threads: int
) -> None: ...
def regroup_cuda(
    tensor: Tensor,
    out: Tensor,
    dim: int,
    ptr: Tensor,
    members: Tensor,
    scale: Tensor | None,
    single: bool,
    stream: int,
) -> None: ...
def zip_scratch_cuda(n: int, problems: int, models: int, wide: bool) -> int: ...
def zip_cuda(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: Tensor,
    owner: Tensor,
    total: Tensor,
    made: Tensor,
    status: Tensor,
    scratch: Tensor,
    stream: int,
) -> None: ...
def assign_cuda(
    similarity: Tensor, start: Tensor | None, indices: Tensor, out: Tensor, status: Tensor, stream: int
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
    trusted: bool = False,  # entries are finite: not looked for NaN and infinities
) -> tuple[float, int]: ...
def zip_unions(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: int,
    owner: Tensor,
    threads: int,
) -> list[tuple[float, int]]: ...
def assign_lone(similarity: object, made: type[_Made], /) -> _Made | None: ...
def assign_tile(
    tile: Tensor,
    first_row: int,
    v: Tensor,
    room: int,
    columns: Tensor,
    values: Tensor,
    threshold: Tensor,
    maxima: Tensor | None,
    threads: int,
) -> None: ...
def assign_lists(
    ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    keys: Tensor,
    threshold: Tensor,
    v: Tensor,
    column_of: Tensor,
    wanted: Tensor,
) -> int: ...
def assign(
    similarity: Tensor,
    start: Tensor | None,
    indices: Tensor,
    out: Tensor,
    threads: int,
    trusted: bool = False,  # entries are finite: not looked for NaN and infinities
) -> None: ...

gram_panel: int
gram_depth: int

def covariance_sizes(width: int, models: int, cross: bool) -> tuple[int, int]: ...
def prefer_huge_pages(memory: int, bytes: int) -> None: ...

class CovarianceBuffers:
    def __init__(
        self,
        width: int,
        models: int,
        cross: bool,
        gram: Tensor,
        panels: Tensor,
        vectors: Tensor,
        raw: Tensor,
        counts: Tensor,
    ) -> None: ...
    def update(self, features: list[Tensor], dim: int, threads: int) -> None: ...
    def update_plain(self, features: Sequence[Tensor], dim: int, threads: int) -> bool: ...
    def counts(self) -> tuple[int, int]: ...
    def flush(self, threads: int) -> None: ...
    def merge(self, other: CovarianceBuffers, threads: int) -> None: ...
    def rebase(self, shift: Tensor, scale: Tensor, threads: int) -> None: ...

def similarity(
    terms: list[list[tuple[Tensor, tuple[int, ...], list[tuple[tuple[int, ...], Tensor, int, Tensor | None]]]]],
    n: int,
    models: int,
    cross: bool,
    balance: float,
    activation: CovarianceBuffers | None,
    out: Tensor,
    threads: int,
    bound: bool = False,  # of a full out: entries of two units of one model may be upper bounds
) -> int | None: ...
def describe(tensors: list[Tensor], alike: int) -> tuple[bytes, list[int]] | None: ...
def sound_labels(labels: list[Any], spaces: list[tuple[int, int]], align: bool) -> list[int]: ...

class NetworkLayout:
    def __init__(
        self,
        models: int,
        spaces: list[tuple[int, int, bool, bool, list[int]]],
        maps: list[Any],
        terms: list[list[Any]],
        tensors: list[tuple[str, tuple[int, int, int, int, int], int, int]],
    ) -> None: ...

class Network:
    def __init__(
        self,
        layout: NetworkLayout,
        data: list[int],
        zip: bool,
        widths: list[int],
        attenuation: float,
        budget: float,
        activations: list[CovarianceBuffers | None],
    ) -> None: ...
    def set_labels(self, space: int, labels: Tensor | None, merged: int) -> None: ...
    def visit(
        self, ties: list[list[int]], balance: float, threads: int, milliseconds: int
    ) -> list[list[tuple[bytearray | None, float]] | None]: ...
    def merge(self, shares: list[float], first: int, outs: list[int], threads: int) -> list[int]: ...
    def bounded(self) -> tuple[int, int]: ...  # visits for which upper bounds were enough, and were not
    def matched(self) -> tuple[int, int]: ...  # visits that were matched, and the most that is remembered of a tie
