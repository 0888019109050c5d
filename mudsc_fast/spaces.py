"""What a spec is made of: the axes of tensors, the spaces of units on them, and where a model shows their activations.

Frozen data, checked when made; how spaces lie beside each other on a tensor is checked in `spec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mudsc_fast import layout


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _ints(owner: str, what: str, value: Any, least: int = 0) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is_int(v, least) for v in value):
        raise ValueError(f"{owner}: {what} must be integers >= {least}, got {value!r}")
    return tuple(value)


def _check_text(owner: str, what: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{owner}: {what} must be a name, got {value!r}")


def _check_factors(owner: str, part: Axis | Tap) -> None:
    """Check and normalise view, at, pick and part, which mean the same in an Axis and in a Tap."""
    put = object.__setattr__
    if part.view is not None:
        put(part, "view", _ints(owner, "view", part.view, 1))
    view = part.view
    factors = len(view) if view else 1
    at = part.at
    if at is not None and not isinstance(at, int):
        at = _ints(owner, "at", at)
        put(part, "at", at[0] if len(at) == 1 else at)
    if at is None and factors > 1:
        raise ValueError(f"{owner}: a view {view} needs at, the factors that the units index")
    for f in layout.factors_at(part):
        if not _is_int(f, 0) or f >= factors:
            raise ValueError(f"{owner}: at={part.at!r} does not fit the view {view}")
    if len(set(layout.factors_at(part))) != len(layout.factors_at(part)) or not layout.factors_at(part):
        raise ValueError(f"{owner}: at={part.at!r} must name each factor once, and at least one")
    if part.pick is not None:
        pick = _ints(owner, "pick", part.pick)
        if view is None or len(pick) != 2 or pick[0] >= factors or pick[1] >= view[pick[0]]:
            raise ValueError(f"{owner}: pick={part.pick!r} does not fit the view {view}")
        if pick[0] in layout.factors_at(part):
            raise ValueError(f"{owner}: pick and at both name factor {pick[0]}")
        put(part, "pick", pick)
    if part.part is not None:
        piece = _ints(owner, "part", part.part)
        if len(piece) != 2 or piece[1] < 1 or not isinstance(part.dim, int):
            raise ValueError(f"{owner}: part must be (start, length) of one dim, got {part.part!r}")
        if view is not None and prod(view) != piece[1]:
            raise ValueError(f"{owner}: the view {view} does not factor the length {piece[1]} of its part")
        put(part, "part", piece)


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor, as a space regroups it.

    tensor: state-dict name. dim: the dim, or ascending dims that are flattened (experts x hidden).
    role: "out" produces the space's units (also norm weights and biases, embeddings, class tokens), "in" consumes them.
    view: the full factorisation of the axis, e.g. (3, heads, head_dim). at: the factors that the units index, block
    factor first. pick: (factor, index), that factor fixed there. The remaining factors are features.
    compare: False moves the tensor with the space, but leaves it out of the weight similarity (BatchNorm statistics).
    part: (start, length), only this contiguous part of the axis, which the view then factors (concatenations).
    Raises ValueError, naming the tensor, if these do not fit each other.
    """

    tensor: str
    dim: int | tuple[int, ...]
    role: str
    view: tuple[int, ...] | None = None
    at: int | tuple[int, ...] | None = None
    pick: tuple[int, int] | None = None
    compare: bool = True
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_text("an axis", "tensor", self.tensor)
        owner = f"axis of {self.tensor}"
        if not isinstance(self.dim, int):
            dims = _ints(owner, "dim", self.dim)
            if not dims or list(dims) != sorted(set(dims)):
                raise ValueError(f"{owner}: several dims must be ascending, got {self.dim!r}")
            object.__setattr__(self, "dim", dims[0] if len(dims) == 1 else dims)
            if len(dims) > 1 and self.view is None:
                raise ValueError(f"{owner}: several dims {dims} need a view")
        elif not _is_int(self.dim, 0):
            raise ValueError(f"{owner}: dim must be an integer >= 0, got {self.dim!r}")
        if self.role not in ("out", "in"):
            raise ValueError(f"{owner}: role must be 'out' or 'in', got {self.role!r}")
        if not isinstance(self.compare, bool):
            raise ValueError(f"{owner}: compare must be True or False, got {self.compare!r}")
        _check_factors(owner, self)


@dataclass(frozen=True)
class Tap:
    """A module port where a space's activations are seen.

    module: its name in `named_modules`. port: "input" (first argument) or "output" (first item of a tuple).
    dim: the dim that holds the units, may be negative; view, at, pick, part as in Axis. All else are samples.
    """

    module: str
    port: str
    dim: int
    view: tuple[int, ...] | None = None
    at: int | tuple[int, ...] | None = None
    pick: tuple[int, int] | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, str):
            raise ValueError(f"a tap: module must be a name, got {self.module!r}")
        owner = f"tap of {self.module!r}"
        if self.port not in ("input", "output"):
            raise ValueError(f"{owner}: port must be 'input' or 'output', got {self.port!r}")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool):
            raise ValueError(f"{owner}: dim must be an integer, got {self.dim!r}")
        _check_factors(owner, self)


def _units(part: Axis | Tap) -> int | None:
    """How many units the factors index; None where only the tensor knows."""
    if part.view is not None:
        return prod(part.view[f] for f in layout.factors_at(part))
    return part.part[1] if part.part is not None else None


@dataclass(frozen=True)
class Space:
    """A set of tensor axes that must be regrouped together.

    width: units of one model. blocks: units move inside blocks and blocks as wholes; unit = block * (width / blocks)
    + place in the block. within: "free", or "fixed" if only whole blocks move. tie: spaces with one tie share one
    block permutation. Raises ValueError, naming the space and the tensor.
    """

    name: str
    width: int
    axes: tuple[Axis, ...]
    taps: tuple[Tap, ...] = ()
    blocks: int = 1
    within: str = "free"
    tie: str | None = None

    def __post_init__(self) -> None:
        _check_text("a space", "name", self.name)
        owner = f"space {self.name!r}"
        for what, kind in (("axes", Axis), ("taps", Tap)):
            value = getattr(self, what)
            if not isinstance(value, Sequence) or not all(isinstance(v, kind) for v in value):
                raise ValueError(f"{owner}: {what} must be a sequence of {kind.__name__}, got {value!r}")
            object.__setattr__(self, what, tuple(value))
        if not self.axes:
            raise ValueError(f"{owner}: has no axes")
        if not _is_int(self.width, 1):
            raise ValueError(f"{owner}: width must be an integer >= 1, got {self.width!r}")
        if not _is_int(self.blocks, 1) or self.width % self.blocks:
            raise ValueError(f"{owner}: blocks must divide the width {self.width}, got {self.blocks!r}")
        if self.within not in ("free", "fixed"):
            raise ValueError(f"{owner}: within must be 'free' or 'fixed', got {self.within!r}")
        if self.tie is not None:
            _check_text(owner, "tie", self.tie)
        parts: list[Axis | Tap] = [*self.axes, *self.taps]
        for part in parts:
            where = f"tensor {part.tensor}" if isinstance(part, Axis) else f"tap {part.module!r}"
            units = _units(part)
            if units is not None and units != self.width:
                raise ValueError(f"{owner}: {where} gives {units} units, expected the width {self.width}")
            at = layout.factors_at(part)
            if self.blocks > 1 and len(at) > 1 and part.view is not None and part.view[at[0]] != self.blocks:
                raise ValueError(
                    f"{owner}: {where}: the first factor in at={at} has size {part.view[at[0]]}, expected the "
                    f"{self.blocks} blocks"
                )


@dataclass(frozen=True)
class Frozen:
    """A tensor axis that no space may touch, and why (found by tracing; information only)."""

    tensor: str
    dim: int
    reason: str
