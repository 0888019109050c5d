"""Calibration inputs from a file, cut into batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


class Batches:
    """Batches of the rows of a file, as the model's first argument or by the names of its arguments.

    path: a ``.npy`` file with one array, or a ``.safetensors`` file with one tensor for each argument; the first dim
        counts the rows. A single tensor that is named after no argument goes to the first one.
    size: rows a batch. model: tells the names of the arguments, and the dtype that floating inputs are cast to.

    Raises ValueError for another file, no rows, different numbers of rows, or names that are no arguments.
    """

    def __init__(self, path: Path, size: int, model: nn.Module) -> None:
        arrays = _read(path)
        rows = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        if min(rows.values()) < 1 or len(set(rows.values())) > 1:
            raise ValueError(f"--inputs {path}: expected one number of rows >= 1 in all tensors, got {rows}")
        arguments = _arguments(model)
        unknown = sorted(set(arrays) - set(arguments))
        if unknown and len(arrays) > 1:
            raise ValueError(f"--inputs {path}: the model takes {', '.join(arguments)}, not {', '.join(unknown)}")
        self.rows = next(iter(rows.values()))
        self._arrays = arrays
        self._size = size
        self._named = not unknown
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        self._dtype = torch.float32 if parameter is None else parameter.dtype

    def __len__(self) -> int:
        return -(-self.rows // self._size)

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        for first in range(0, self.rows, self._size):
            batch = {name: self._rows(array, first) for name, array in self._arrays.items()}
            yield batch if self._named else next(iter(batch.values()))

    def _rows(self, array: Any, first: int) -> Tensor:
        part = array[first : first + self._size]
        # copied out of the memory map, which is read-only
        rows = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        return rows.to(self._dtype) if rows.is_floating_point() else rows


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        if not path.is_file():
            raise FileNotFoundError(f"--inputs: no such file: {path}")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"--inputs {path}: not a readable .npy file ({error})") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"--inputs {path}: expected numbers, got dtype {array.dtype}")
        return {"": array}
    if path.suffix == ".safetensors":
        from mudsc_fast.checkpoints import open_checkpoint

        return dict(open_checkpoint(path))
    raise ValueError(f"--inputs {path}: expected a .npy or .safetensors file")


def _arguments(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
