"""One pass over an input of any strides: moments of its units, and the planes that tensor cores multiply.

An entry x of a unit becomes y = (x - shift) * scale in float32 (x = 0 where it is not finite), and y becomes 0 to 3
planes of bfloat16 (or, alone, one of the input's own 16-bit type): y = hi + mid + lo up to 2**-24, hi + mid up to
2**-17.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.backends.triton.configs import SplitConfig, split_config
from mudsc_fast.backends.triton.launching import capability, launching


@triton.jit
def split_kernel(
    x, shift, scale, planes, partial, unit_at, member_at, members, factor,
    outer, inner, units, outer_step, inner_step, unit_step, plane_step, pitch, first_row, group, parts, most,
    PLANES: tl.constexpr, TABLES: tl.constexpr, WALK: tl.constexpr, SAMPLES: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Samples [part * WALK, + WALK) of each of `group` outer indices, for UNITS units.

    x: entry (o, s, u) at o * outer_step + s * inner_step + u * unit_step; TABLES: entry (s, u) is factor[s] times the
    sum of the entries at members[member_at[s] : member_at[s + 1]] + unit_at[u], at most `most` of them.
    planes: row first_row + o * inner + s of plane p at planes + p * plane_step + row * pitch.
    partial: [slots, 3, units], float64: sums of y, of the squares of what the planes hold, and entries that are not
    finite.
    """
    program = tl.program_id(0)
    unit_blocks = tl.cdiv(units, UNITS)
    u = program % unit_blocks * UNITS + tl.arange(0, UNITS)
    slot = program // unit_blocks
    first = slot // parts
    part = slot - first * parts
    unit_in = u < units
    if TABLES:
        unit_offset = tl.load(unit_at + u, mask=unit_in, other=0)
    else:
        unit_offset = u.to(tl.int64) * unit_step
    less = tl.load(shift + u, mask=unit_in, other=0.0)[None, :]
    times = tl.load(scale + u, mask=unit_in, other=1.0)[None, :]
    sums = tl.zeros((UNITS,), tl.float64)
    squares = tl.zeros((UNITS,), tl.float64)
    bad = tl.zeros((UNITS,), tl.int32)
    from_outer = (first * group).to(tl.int64)
    for k_outer in range(0, tl.minimum(group, outer - first * group)):
        o = from_outer + k_outer
        base = x + o * outer_step
        for start in range(part * WALK, tl.minimum((part + 1) * WALK, inner), SAMPLES):
            s = start + tl.arange(0, SAMPLES)
            inside = (s < inner)[:, None] & unit_in[None, :]
            if TABLES:
                begin = tl.load(member_at + s, mask=s < inner, other=0)
                end = tl.load(member_at + s + 1, mask=s < inner, other=0)
                value = tl.zeros((SAMPLES, UNITS), tl.float32)
                for k in range(0, most):
                    # A column's members end early: the last is read again, and not counted. (A masked load trips Triton
                    # 3.6.)
                    there = begin + k < end
                    member = tl.load(members + tl.maximum(tl.minimum(begin + k, end - 1), 0))
                    entry = tl.load(x + member[:, None] + unit_offset[None, :], mask=there[:, None] & inside, other=0.0)
                    value += entry.to(tl.float32)
                value *= tl.load(factor + s, mask=s < inner, other=0.0)[:, None]
            else:
                offset = s.to(tl.int64)[:, None] * inner_step + unit_offset[None, :]
                value = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
            finite = tl.abs(value) < float("inf")
            y = (tl.where(finite, value, 0.0) - less) * times
            y = tl.where(inside, y, 0.0)
            sums += tl.sum(y.to(tl.float64), axis=0)
            bad += tl.sum(tl.where(finite, 0, 1), axis=0)
            row = first_row + o * inner + s
            at = planes + row[:, None] * pitch + u[None, :]
            kept = y
            rest = y
            for p in tl.static_range(PLANES):
                plane = rest.to(planes.dtype.element_ty)
                tl.store(at + p * plane_step, plane, mask=inside)
                rest -= plane.to(tl.float32)
            if PLANES > 0:
                kept = y - rest
            wide = kept.to(tl.float64)
            squares += tl.sum(wide * wide, axis=0)
    into = partial + slot.to(tl.int64) * 3 * units + u
    tl.store(into, sums, mask=unit_in)
    tl.store(into + units, squares, mask=unit_in)
    tl.store(into + 2 * units, bad.to(tl.float64), mask=unit_in)


@dataclass(frozen=True)
class Source:
    """Units of one model over samples, in place: entry (o, s, u) at o * outer_step + s * inner_step + u * unit_step.

    tables: (unit offsets, member offsets [columns + 1], members, factors, most members of a column) instead of steps.
    """

    tensor: Tensor
    units: int
    outer: int
    inner: int
    outer_step: int
    inner_step: int
    unit_step: int
    tables: tuple[Tensor, Tensor, Tensor, Tensor, int] | None = None

    @property
    def samples(self) -> int:
        """Samples, or weight columns."""
        return self.outer * self.inner

    def cut(self, inner: int) -> Source:
        """The same samples with another inner length, which divides this one; only where there is one level."""
        return replace(self, outer=self.samples // inner, inner=inner, outer_step=inner * self.inner_step)

    def slabs(self, most: int) -> Iterator[Source]:
        """Pieces of at most `most` samples, in order."""
        if self.inner <= most:
            each = max(1, most // self.inner)
            for o in range(0, self.outer, each):
                yield self._piece(o, min(each, self.outer - o), 0, self.inner)
            return
        for o in range(self.outer):
            for s in range(0, self.inner, most):
                yield self._piece(o, 1, s, min(most, self.inner - s))

    def _piece(self, o: int, outer: int, s: int, inner: int) -> Source:
        if self.tables is not None:
            unit_at, member_at, members, factor, most = self.tables
            cut = unit_at, member_at[s : s + inner + 1], members, factor[s : s + inner], most
            return replace(self, inner=inner, tables=cut)
        start = self.tensor.storage_offset() + o * self.outer_step + s * self.inner_step
        moved = self.tensor.as_strided((1,), (1,), start)
        return replace(self, tensor=moved, outer=outer, inner=inner)


def split(
    source: Source,
    shift: Tensor,
    scale: Tensor,
    planes: Tensor | None = None,
    first_row: int = 0,
    config: SplitConfig | None = None,
) -> Tensor:
    """Split one source, and return its moments.

    Args:
        source: what to read.
        shift, scale: (units,), float32.
        planes: (planes, rows, units), bfloat16 or, one plane, the source's type; units adjacent. None: moments alone.
        first_row: where the source's first sample goes.
        config: how to cut it.

    Returns:
        (3, units), float64: sums of y, sums of squares of what the planes hold of y, entries that were not finite.
    """
    device = source.tensor.device
    if config is None:
        across = source.inner_step == 1 and source.unit_step != 1
        use = "split_tables" if source.tables else "split_across" if across else "split"
        config = split_config(use, capability(device))
    parts = -(-source.inner // config.walk)
    group = max(1, config.walk // source.inner)  # short rows are walked over together: partial sums stay few
    slots = -(-source.outer // group) * parts
    partial = torch.empty((slots, 3, source.units), dtype=torch.float64, device=device)
    dummy = partial
    unit_at, member_at, members, factor, most = source.tables or (dummy, dummy, dummy, dummy, 1)
    grid = (slots * -(-source.units // config.units),)
    count, plane_step, pitch = (0, 0, 0) if planes is None else (planes.shape[0], planes.stride(0), planes.stride(1))
    with launching("split.split_kernel", device):
        split_kernel[grid](
            source.tensor, shift, scale, dummy if planes is None else planes, partial,
            unit_at, member_at, members, factor, source.outer, source.inner, source.units,
            source.outer_step, source.inner_step, source.unit_step, plane_step, pitch, first_row, group, parts, most,
            PLANES=count, TABLES=source.tables is not None, WALK=config.walk, SAMPLES=config.samples,
            UNITS=config.units, num_warps=config.warps,
        )  # fmt: skip
    return partial.sum(dim=0)


def strided(tensor: Tensor, unit_dims: tuple[int, ...], inner: int | None = None) -> Source | None:
    """A tensor as units and samples with at most two levels of samples; None where its strides have more.

    inner: the inner length to have, as another model's tensor gives it.
    """
    units = _merged([(tensor.shape[d], tensor.stride(d)) for d in unit_dims])
    others = [d for d in range(tensor.dim()) if d not in unit_dims]
    levels = _merged([(tensor.shape[d], tensor.stride(d)) for d in others])
    if len(units) > 1 or len(levels) > 2:
        return None
    number, step = units[0] if units else (1, 1)
    (outer, outer_step), (length, inner_step) = [(1, 0), (1, 1), *levels][-2:]
    if len(levels) == 1:
        outer, outer_step = 1, 0
    source = Source(tensor, number, outer, length, outer_step, inner_step, step)
    if inner is not None and inner != length:
        return source.cut(inner) if outer == 1 and length % inner == 0 else None
    return source


def _merged(levels: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of dims, outermost first, with neighbours joined where one stride serves both."""
    made: list[tuple[int, int]] = []
    for size, stride in levels:
        if size == 1:
            continue
        if made and made[-1][1] == size * stride:
            made[-1] = made[-1][0] * size, stride
        else:
            made.append((size, stride))
    return made
