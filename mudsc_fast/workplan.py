"""What a match and a merge need: memory, time and disk of each step, known before a weight is read.

A space is compared in one of five ways. "joint": all its tensors are in memory, and one kernel call reads them in
place. "streamed": its tensors pass one after another, and a float64 accumulator stands beside the result
(`mudsc_fast.streaming`); bfloat16 is quicker this way. Where the similarity fits in neither way, "rows" makes some of
its rows at a time for an exact assignment (`mudsc_fast.tiled_assignment`), "blocks" those of one block where units move
in blocks, and "tiled" zips by weights on lists of its largest entries (`mudsc_fast.tiled_zip`). Merged tensors are
written whole, or in slabs of rows. With a limit, each step takes the way that fits; the largest step that has none
gives the minimum.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from mudsc_fast.backends.cpu_covariance import DEPTH, PANEL
from mudsc_fast.layout import dims_of
from mudsc_fast.streaming import rows_apart
from mudsc_fast.tiled_assignment import CANDIDATES
from mudsc_fast.tiled_zip import PAIR_BYTES, TILE_ROWS
from mudsc_fast.wide_statistics import PRODUCT_BYTES

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec

MIB = 2**20

# Pairs that a zip on lists keeps at most: beyond that Python's dicts take minutes.
_MOST_PAIRS = 8_000_000

# Rows that are read at once where a tensor can be read in pieces: enough to keep the disk busy.
_PIECE = 256 * MIB
_LEAST_PIECE = 8 * MIB
# The allocator's and the interpreter's own growth during a run.
MARGIN = 96 * MIB


class Info(Protocol):
    """Shape and dtype of a tensor that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class TensorShape(NamedTuple):
    """An `Info` of one's own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """The match of one space, or of the spaces of one tie.

    way: "joint", "streamed", "rows", "blocks" or "tiled". piece: bytes of rows read at once, of the rows of a
    similarity that are made at once ("rows", "blocks"), or of the lists of a "tiled" zip. memory:
    bytes on top of what the process holds. flops: multiply-adds times two, and read: bytes, of one visit.
    """

    spaces: tuple[str, ...]
    width: int
    way: str
    piece: int
    memory: int
    flops: float
    read: int


@dataclass(frozen=True)
class WorkPlan:
    """The steps of a run.

    base: resident bytes before it. merge_piece: bytes of the largest slab that is merged at once, None: tensors whole.
    merge_memory: bytes that merging adds. output: bytes written.
    """

    steps: tuple[Step, ...]
    base: int
    merge_piece: int | None
    merge_memory: int
    read: int
    output: int

    @property
    def peak(self) -> int:
        """Largest resident size expected, in bytes."""
        return self.base + MARGIN + max([self.merge_memory, *(step.memory for step in self.steps)])

    def step_of(self, space: str) -> Step:
        """The step that matches a space."""
        return next(step for step in self.steps if space in step.spaces)

    def with_ways(self, ways: Mapping[str, str]) -> WorkPlan:
        """The plan with other ways, by the first space of a step."""
        steps = [replace(step, way=ways.get(step.spaces[0], step.way)) for step in self.steps]
        return replace(self, steps=tuple(steps))


class _Sizes:
    """Bytes of everything that the match of one space holds."""

    def __init__(self, spec: PermutationSpec, space: Space, layout: Mapping[str, Info], models: int, full: bool):
        self.space, n = space, space.width
        compared = [(axis, layout[axis.tensor]) for axis in space.axes if axis.compare and axis.tensor in layout]
        item = 8 if any(info.dtype == torch.float64 for _, info in compared) else 4
        self.similarity = (models * n) ** 2 * item if full else (models - 1) * n * n * item
        self.bfloat16 = all(info.dtype == torch.bfloat16 for _, info in compared)
        self.accumulator = accumulator_bytes(n, models, full)
        self.packed = (-(-n // PANEL) * models + 1) * PANEL * DEPTH * item
        tensors = [models * _bytes(info) for _, info in compared]
        columns = [prod(info.shape) // max(n, 1) for _, info in compared]
        self.tensors = sum(tensors)
        self.copied = sum(size for size, (_, info) in zip(tensors, compared, strict=True) if len(info.shape) > 2)
        self.floats = models * sum(item * prod(info.shape) for _, info in compared)
        # Tables of column offsets, and the merged copies that the streamed way makes of all models but the first.
        self.tables = 8 * 4 * models * max(columns, default=0)
        self.largest = max(
            (2 * size for (axis, _), size in zip(compared, tensors, strict=True) if not rows_apart(spec, axis.tensor)),
            default=0,
        )
        self.apart = max(
            (size for (axis, _), size in zip(compared, tensors, strict=True) if rows_apart(spec, axis.tensor)),
            default=0,
        )
        self.flops = 2.0 * n * n * sum(columns) * (models * (models + 1) / 2 if full else models - 1)
        # Lists, prices and candidates of an assignment; a zip works on a copy.
        self.solve = self.similarity if full else n * 8 * 256
        if space.blocks > 1:
            self.solve += 16 * n * space.blocks

    def joint(self) -> int:
        return self.similarity + max(self.tensors + self.tables + self.packed, self.solve)

    def streamed(self, piece: int) -> int:
        reading = max(self.largest, min(piece, self.apart)) + self.packed + self.accumulator
        return max(reading, self.accumulator + self.similarity, self.similarity + self.solve)


def accumulator_bytes(width: int, models: int, full: bool) -> int:
    """Bytes of the float64 sums of a Covariance."""
    rows, others, total = -(-width // PANEL), -(-width * (models - 1) // PANEL), -(-width * models // PANEL)
    return (total * (total + 1) // 2 if full else rows * others) * PANEL**2 * 8


def resident_bytes() -> int:
    """Memory that the process holds now (Linux), or the most it has held (elsewhere)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int:
    """The most memory that the process has held."""
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plan_work(
    spec: PermutationSpec,
    layout: Mapping[str, Info],
    models: int,
    method: str = "align",
    max_memory: int | None = None,
    balance: float = 1.0,
    base: int | None = None,
    output: int | None = None,
    merging: bool = True,
    matching: bool = True,
) -> WorkPlan:
    """Choose a way for every step such that the process stays below `max_memory` bytes.

    layout: {tensor: shape and dtype}, of one model; the others are alike. max_memory: None: everything joint and whole.
    balance: 0 compares no weights. base: bytes that the process holds already; None: what it holds now.
    output: bytes that the result has, where that is not the size of one model. merging, matching: what is done.
    ValueError, which says the minimum and what needs it, if the limit is too low for some step.
    """
    base = resident_bytes() if base is None else base
    size = sum(_bytes(info) for info in layout.values())
    room = None if max_memory is None else max_memory - base - MARGIN
    steps, lacking = [], []
    for tie in _ties(spec) if matching else ():
        step, least = _step(spec, tie, layout, models, method, balance, room)
        steps.append(step)
        lacking.append((least, f"matching {_named(tie)}"))
    piece, memory, least = _merging(spec, layout, models, room) if merging else (None, 0, 0)
    if room is not None:
        needs = max([*lacking, (least, "writing the merged tensors")], key=lambda need: need[0])
        if needs[0] > room:
            text = (
                f"max_memory: expected at least {base + MARGIN + needs[0]} bytes "
                f"({in_words(base + MARGIN + needs[0])}), which {needs[1]} needs, got {max_memory} "
                f"({in_words(max_memory or 0)}); {in_words(base)} of it are in use before the work begins"
            )
            if method == "zip":
                text += "; a zip holds the similarities of all units twice, for two models eight times what align holds"
            raise ValueError(text)
    return WorkPlan(tuple(steps), base, piece, memory, models * size, size if output is None else output)


def least_memory(spec: PermutationSpec, layout: Mapping[str, Info], models: int, balance: float = 1.0) -> int:
    """The smallest `max_memory` with which an alignment's spaces can be matched, in bytes; arguments: `plan_work`."""
    least = [_step(spec, tie, layout, models, "align", balance, 0)[1] for tie in _ties(spec)]
    return resident_bytes() + MARGIN + max(least, default=0)


def _step(
    spec: PermutationSpec,
    tie: Sequence[Space],
    layout: Mapping[str, Info],
    models: int,
    method: str,
    balance: float,
    room: int | None,
) -> tuple[Step, int]:
    """The step of one tie, and the least memory that it needs."""
    full = [method == "zip" and space.within == "free" for space in tie]
    sizes = [_Sizes(spec, space, layout, models, f) for space, f in zip(tie, full, strict=True)]
    names, width = tuple(space.name for space in tie), max(space.width for space in tie)
    # The similarities of a tie are held together; each is made on top of those before it.
    held = sum(s.similarity for s in sizes)
    if balance == 0:
        memory = held + max(s.accumulator + s.solve for s in sizes)
        if room is not None and memory > room and method == "align" and tie[0].blocks > 1:
            tile, less = _by_blocks(sizes, models, balance)
            if less < memory:
                return Step(names, width, "blocks", tile, less, 0.0, sum(s.accumulator for s in sizes)), less
        if room is not None and memory > room and method == "align" and _may_tile(tie):
            tile, less, least = _rows(sizes[0], models, room, balance)
            if less < memory:
                return Step(names, width, "rows", tile, less, 0.0, 2 * sizes[0].accumulator), least
        return Step(names, width, "joint", _PIECE, memory, 0.0, 0), memory
    flops, read = sum(s.flops for s in sizes), sum(s.tensors for s in sizes)
    beside = 0 if balance == 1 else max(s.accumulator for s in sizes)
    activations = 0 if balance == 1 else beside + max(s.similarity for s in sizes)
    joint = held + beside + max(s.joint() - s.similarity for s in sizes)

    def streamed(piece: int) -> int:
        return held + activations + max(s.streamed(piece) - s.similarity for s in sizes)

    piece = _PIECE
    while room is not None and piece > _LEAST_PIECE and streamed(piece) > room:
        piece //= 2
    # Streamed bfloat16 is multiplied as it is, which takes half the time where the CPU has instructions for it.
    quick = room is not None and all(s.bfloat16 for s in sizes) and streamed(piece) <= room
    if room is None or (joint <= room and not quick):
        return Step(names, width, "joint", _PIECE, joint, flops, read), joint
    if room < min(joint, streamed(piece)) and method == "zip" and balance == 1 and _may_tile(tie):
        lists, memory, least = _tiled(sizes[0], models, room)
        return Step(names, width, "tiled", lists, memory, 2 * flops, read), least
    if room < min(joint, streamed(piece)) and method == "align" and _may_tile(tie):
        tile, memory, least = _rows(sizes[0], models, room, balance)
        if memory < min(joint, streamed(piece)):
            read += 0 if balance == 1 else 2 * sizes[0].accumulator
            return Step(names, width, "rows", tile, memory, 2 * flops, read), least
    if room < min(joint, streamed(piece)) and method == "align" and tie[0].blocks > 1:
        tile, memory = _by_blocks(sizes, models, balance)
        if memory < min(joint, streamed(piece)):
            read += 0 if balance == 1 else sum(s.accumulator for s in sizes)
            return Step(names, width, "blocks", tile, memory, flops, read), memory
    if not quick and streamed(piece) > joint:
        return Step(names, width, "joint", _PIECE, joint, flops, read), joint
    return Step(names, width, "streamed", piece, streamed(piece), flops, read), min(joint, streamed(piece))


def _may_tile(tie: Sequence[Space]) -> bool:
    """Whether lists know how: one space without blocks."""
    return len(tie) == 1 and tie[0].blocks == 1 and tie[0].within == "free"


def _tiled(sizes: _Sizes, models: int, room: int) -> tuple[int, int, int]:
    """(bytes of lists, of the whole step, the least of it) of a zip on lists: its tensors, tiles and pairs."""
    units = models * sizes.space.width
    # Tensors as they are and, in merged coordinates, in float32; a tile and its products; a block of columns.
    fixed = sizes.tensors + sizes.floats + 2 * 4 * TILE_ROWS * units + 16 * 512 * units
    fewest = 64 * units * PAIR_BYTES
    lists = max(fewest, min(_MOST_PAIRS * PAIR_BYTES, units * units // 2 * PAIR_BYTES, room - fixed))
    return lists, fixed + lists, fixed + fewest


def _rows(sizes: _Sizes, models: int, room: int, balance: float) -> tuple[int, int, int]:
    """(bytes of a tile, of the whole step, the least of it) of an assignment that sees some rows at a time."""
    n = sizes.space.width
    # Candidates of every row, while they change; prices and results.
    fixed, tiles = 3 * 20 * CANDIDATES * n + 200 * n, 2
    if balance > 0:  # tensors, and copies of those that are not read in place; a block of columns, also in float32
        fixed += sizes.tensors + sizes.copied + 2 * 512 * 6 * n
    if balance < 1:  # a second tile, products as they are read and in float64, moments
        fixed += 4 * max(PRODUCT_BYTES, 8 * PANEL * models * n) + 100 * models * n
        tiles = 3
    tile = max(_LEAST_PIECE, min(_PIECE, 4 * n * n, (room - fixed) // tiles))
    return tile, fixed + tiles * tile, fixed + tiles * _LEAST_PIECE


def _by_blocks(sizes: Sequence[_Sizes], models: int, balance: float) -> tuple[int, int]:
    """(bytes of a tile, of the whole step) of an assignment of blocks that sees the rows of one block at a time."""
    each, tiles, inside = [], [], 0
    for s in sizes:
        n, blocks = s.space.width, s.space.blocks
        tiles.append(4 * n * (n // blocks))
        memory = 2 * tiles[-1] + n * 8 * 256
        if balance > 0:  # tensors and copies of them, a block of columns as it is and in float32
            memory += 2 * s.tensors + 2 * 512 * 6 * n
        if balance < 1:
            memory += tiles[-1] + 4 * max(PRODUCT_BYTES, 8 * PANEL * models * n) + 100 * models * n
        each.append(memory)
        inside += (models - 1) * 8 * n * blocks
    return max(tiles), max(each) + inside


def _merging(
    spec: PermutationSpec, layout: Mapping[str, Info], models: int, room: int | None
) -> tuple[int | None, int, int]:
    """(largest slab or None, bytes that merging adds, the least that it could add)."""
    whole = max((_merged_bytes(info, 1.0) for info in layout.values()), default=0)
    if room is None or whole <= room:
        return None, whole, whole
    fixed = max((_merged_bytes(i, 1.0) for name, i in layout.items() if not in_slabs(spec, name, i.shape)), default=0)
    piece = _PIECE
    while piece > _LEAST_PIECE and 12 * piece > room:
        piece //= 2
    memory = max(fixed, 12 * piece)
    return piece, memory, max(fixed, 12 * _LEAST_PIECE)


def in_slabs(spec: PermutationSpec, name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor can be merged some rows at a time: no space flattens dim 0 with others."""
    if not shape:
        return False
    return all(0 not in dims_of(axis) or len(dims_of(axis)) == 1 for _, axis in spec.entries.get(name, ()))


def _merged_bytes(info: Info, share: float) -> int:
    """Raw tensor, its working copy, the regrouped one, the mean and the result."""
    count = int(prod(info.shape) * share)
    working = 8 if info.dtype == torch.float64 else 4
    return count * (2 * info.dtype.itemsize + 4 * working)


def _ties(spec: PermutationSpec) -> list[tuple[Space, ...]]:
    seen: dict[str, list[Space]] = {}
    for space in spec.spaces:
        seen.setdefault(f"tie {space.tie}" if space.tie is not None else f"space {space.name}", []).append(space)
    return [tuple(spaces) for spaces in seen.values()]


def _named(tie: Sequence[Space]) -> str:
    return f"space{'s' if len(tie) > 1 else ''} " + ", ".join(f"{s.name!r} ({s.width} units)" for s in tie)


def _bytes(info: Info) -> int:
    return prod(info.shape) * info.dtype.itemsize


def in_words(count: float) -> str:
    """A number of bytes as people write it, in units of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 1}f} {unit}"
    return f"{count:.0f} bytes"
