"""Checkpoints whose tensors are stacked otherwise than their network's: read and written in the network's names.

transformers 5 keeps the experts of a layer in one tensor and their files one by one (``experts.3.w1.weight``). A block
says which part of a network's tensor a tensor on disk is; nothing else is known of the file format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import TensorInfo
from .reading import Checkpoint
from .writing import CheckpointWriter


class Block(NamedTuple):
    """A tensor on disk, and the range of each dim of the network's tensor that it holds, flattened row by row."""

    name: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def region(self) -> tuple[slice, ...]:
        return tuple(slice(low, high) for low, high in self.ranges)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in self.ranges)


Blocks = Mapping[str, Sequence[Block]]


class StackedCheckpoint(Mapping[str, Tensor]):
    """A checkpoint by its network's names; reads as lazily as the checkpoint itself.

    blocks: for each tensor of the network those of the checkpoint that make it up.
    shapes: of the network's tensors. ValueError if the blocks do not fit the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, blocks: Blocks, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.checkpoint, self._blocks = checkpoint, dict(blocks)
        self.path: Path = checkpoint.path
        self.files, self.folder, self.metadata = checkpoint.files, checkpoint.folder, checkpoint.metadata
        on_disk = checkpoint.layout
        self.layout: dict[str, TensorInfo] = {}
        self._owners: dict[str, tuple[str, Block]] = {}
        for name, parts in self._blocks.items():
            for part in parts:
                if part.name not in on_disk:
                    raise ValueError(f"{checkpoint.path}: has no tensor {part.name!r}, a part of {name!r}")
                if prod(on_disk[part.name].shape) != prod(part.sizes):
                    raise ValueError(
                        f"{checkpoint.path}: {part.name!r} has shape {on_disk[part.name].shape}, expected "
                        f"{part.sizes} as a part of {name!r} {shapes[name]}"
                    )
            self.layout[name] = TensorInfo(tuple(shapes[name]), on_disk[parts[0].name].dtype)

    def __getitem__(self, name: str) -> Tensor:
        info = self._info(name)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for part in self._blocks[name]:
            whole[part.region] = self.checkpoint[part.name].to(info.dtype).reshape(part.sizes)
        return whole if self.checkpoint.device is None else whole.to(self.checkpoint.device)

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows of a tensor, as `Checkpoint.rows`; one tensor on disk is in memory at a time."""
        info = self._info(name)
        wanted = torch.arange(info.shape[0])[rows]
        found = torch.empty(len(wanted), *info.shape[1:], dtype=info.dtype)
        for part in self._blocks[name]:
            low, high = part.ranges[0]
            where = ((wanted >= low) & (wanted < high)).nonzero()[:, 0]
            if where.numel():
                tensor = self.checkpoint[part.name].to(info.dtype).reshape(part.sizes)
                index: tuple[Any, ...] = (where, *part.region[1:])
                found[index] = tensor[wanted[where] - low]
        return found if self.checkpoint.device is None else found.to(self.checkpoint.device)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.layout:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.layout[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.checkpoint.nbytes

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device."""
        return {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in self.layout.items()}

    def on_disk(self, layout: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The layout of a result on disk; ValueError if merged widths do not fit the blocks."""
        if {name: info.shape for name, info in layout.items()} != {n: i.shape for n, i in self.layout.items()}:
            raise ValueError(
                f"{self.path}: its experts are stored one by one, which another width does not fit; align, or zip to "
                "the models' own widths"
            )
        stored = self.checkpoint.layout
        names = {part.name: info for name, info in layout.items() for part in self._blocks[name]}
        return {name: TensorInfo(info.shape, names[name].dtype) for name, info in stored.items() if name in names}

    def block_of(self, on_disk: str) -> tuple[str, Block] | None:
        """The network's tensor that a tensor on disk belongs to, and its block there."""
        if not self._owners:
            self._owners = {part.name: (name, part) for name, parts in self._blocks.items() for part in parts}
        return self._owners.get(on_disk)

    def stored(self, name: str) -> list[str]:
        """The tensors on disk that make up one of the network's."""
        return [part.name for part in self._blocks[name]]

    def write(self, writer: CheckpointWriter, name: str, start: int, tensor: Tensor) -> None:
        """Write rows of one of the network's tensors, from row `start` on, where they are the writer's own to write."""
        shapes = {part.name: self.checkpoint.layout[part.name].shape for part in self._blocks[name]}
        for part in self._blocks[name]:
            if part.name not in writer.own:
                continue
            shape = shapes[part.name]
            if not part.ranges:
                writer.write(part.name, tensor.reshape(shape))
                continue
            low, high = max(part.ranges[0][0], start), min(part.ranges[0][1], start + len(tensor))
            if low >= high:
                continue
            index: tuple[slice, ...] = (slice(low - start, high - start), *part.region[1:])
            piece = tensor[index]
            if high - low == part.sizes[0]:
                writer.write(part.name, piece.reshape(shape))
            else:
                writer.write_rows(part.name, low - part.ranges[0][0], piece.reshape(-1, *shape[1:]))


def blocks_of(pieces: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], starts: Mapping[str, int]) -> Blocks:
    """Find the blocks from numbered entries.

    pieces: {name on disk: int64 numbers}: entry i (row by row) of network tensor t is number starts[t] + i.
    shapes: of the network's tensors. ValueError, naming it, for a tensor on disk that is no block of one of them.
    """
    order = sorted(shapes, key=lambda name: starts[name])
    firsts = torch.tensor([starts[name] for name in order])
    found: dict[str, list[Block]] = {name: [] for name in shapes}
    for name, numbers in pieces.items():
        flat = numbers.reshape(-1)
        owner = order[int(torch.searchsorted(firsts, flat[:1], right=True)) - 1]
        shape, places = shapes[owner], flat - starts[owner]
        if not shape:
            found[owner].append(Block(name, ()))
            continue
        if int(places.min()) < 0 or int(places.max()) >= prod(shape):
            raise ValueError(f"{name}: is made of several tensors of the network")
        corners = [(int(at.min()), int(at.max()) + 1) for at in torch.unravel_index(places, shape)]
        block = Block(name, tuple(corners))
        whole = torch.arange(prod(shape)).reshape(shape)[block.region].reshape(-1)
        if not torch.equal(whole, places):
            raise ValueError(f"{name}: is no block of {owner!r}")
        found[owner].append(block)
    for name, parts in found.items():
        if sum(prod(part.sizes) for part in parts) != prod(shapes[name]):
            raise ValueError(f"{name}: is not made up of blocks on disk")
    return found


def scaled(blocks: Blocks, small: Mapping[str, tuple[int, ...]], large: Mapping[str, tuple[int, ...]]) -> Blocks:
    """Blocks of small tensors as those of large ones, whose sizes are multiples."""

    def grown(name: str, part: Block) -> Block:
        by = [b // a for a, b in zip(small[name], large[name], strict=True)]
        return Block(part.name, tuple((low * f, high * f) for (low, high), f in zip(part.ranges, by, strict=True)))

    return {name: [grown(name, part) for part in parts] for name, parts in blocks.items()}
