"""Checkpoints opened lazily: names, shapes and dtypes at once, each tensor when it is asked for."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .layout import TORCH_DTYPES, TensorInfo

TORCH_SUFFIXES = (".pt", ".pth", ".bin")

# Largest index file that is parsed: the index of a 100,000-tensor model has about 10 MB.
_MAX_INDEX_BYTES = 200 * 10**6

_CHUNK = 64 * 2**20

# Under these keys training scripts keep the weights beside optimizer state and counters.
_NESTS = ("state_dict", "model")


# What torch.load raises for damaged files, foreign files and pickled objects.
_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError)


class _Source(Protocol):
    """One open file of a checkpoint."""

    def get_tensor(self, name: str) -> Tensor: ...
    def get_rows(self, name: str, rows: slice | Tensor) -> Tensor: ...


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk as a read-only mapping from tensor names to tensors.

    Names, shapes and dtypes are known once it is open; ``checkpoint[name]`` reads one tensor into memory of its own,
    and nothing is kept.
    """

    def __init__(
        self,
        path: Path,
        files: tuple[Path, ...],
        entries: Mapping[str, tuple[TensorInfo, _Source]],
        metadata: Mapping[str, str],
        device: str | torch.device | None = None,
    ) -> None:
        self.path = path
        self.files = files
        self.metadata = dict(metadata)
        self.device = torch.device(device) if device is not None else None
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        tensor = self._entries[name][1].get_tensor(name)
        return tensor if self.device is None else tensor.to(self.device)

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        """Some rows (indices of dim 0) of a tensor, without reading the others.

        rows: a slice without a step, or int64 indices in any order. Raises KeyError, and IndexError for rows that the
        tensor does not have.
        """
        if name not in self._entries:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        info, source = self._entries[name]
        count = info.shape[0] if info.shape else 0
        if isinstance(rows, slice):
            start, stop, step = rows.indices(count)
            if step != 1:
                raise IndexError(f"{name}: expected rows without a step, got {rows}")
            rows = slice(start, max(start, stop))
        elif rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise IndexError(f"{name}: expected rows of 0..{count - 1}, got {int(rows.min())}..{int(rows.max())}")
        tensor = source.get_rows(name, rows)
        return tensor if self.device is None else tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.nbytes} bytes)"

    def without(self, names: Iterable[str]) -> Checkpoint:
        """The same checkpoint, less some of its tensors."""
        left = set(self._entries) - set(names)
        entries = {name: entry for name, entry in self._entries.items() if name in left}
        return Checkpoint(self.path, self.files, entries, self.metadata, self.device)

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, without reading one."""
        return {name: info for name, (info, _) in self._entries.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info, _ in self._entries.values())

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: a state dict with shapes and dtypes and no data."""
        return {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, (i, _) in self._entries.items()}

    @property
    def folder(self) -> Path | None:
        """The folder if the checkpoint was opened as one, else None."""
        return self.path if self.path.is_dir() else None


def open_checkpoint(
    path: str | PathLike[str],
    *,
    allow_torch_load: bool = False,
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    path: a ``.safetensors`` file; a folder with ``model.safetensors``, with ``model.safetensors.index.json`` and its
        shards, or with any single ``.safetensors`` file; an index file; or, with ``allow_torch_load``, a ``.pt``,
        ``.pth`` or ``.bin`` file or a folder of ``pytorch_model`` files, which ``torch.load(weights_only=True)`` reads.
        Such a file may hold its state dict under ``"state_dict"`` or ``"model"``.
    device: where tensors go when they are read; None leaves them on the CPU.

    Raises FileNotFoundError if nothing is there and ValueError, which names the file, for everything that is no
    checkpoint: damaged headers, missing shards, an index that names absent tensors, packed dtypes, pickled objects.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        target = _find_in_folder(path, allow_torch_load)
    elif path.is_file():
        target = path
    else:
        raise ValueError(f"{path}: expected a checkpoint file or folder, got a special file")
    if target.name.endswith(".index.json"):
        files, entries, metadata = _read_sharded(target, allow_torch_load)
    else:
        entries, metadata = _read_file(target, allow_torch_load)
        files = (target,)
    if not entries:
        raise ValueError(f"{path}: holds no tensors")
    return Checkpoint(path, files, entries, metadata, device)


def _find_in_folder(folder: Path, allow_torch_load: bool) -> Path:
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{folder}: expected model.safetensors, model.safetensors.index.json or a single .safetensors file, "
            f"got {len(files)} .safetensors files and no index"
        )
    for name in ("pytorch_model.bin.index.json", "pytorch_model.bin"):
        if (folder / name).is_file():
            if not allow_torch_load:
                raise ValueError(f"{folder}: holds only {name}, which is a pickle; {_ASK}")
            return folder / name
    raise ValueError(
        f"{folder}: expected a checkpoint folder with model.safetensors or model.safetensors.index.json, found neither"
    )


_ASK = "pass allow_torch_load=True (--allow-torch-load) to read it with torch.load(weights_only=True)"


def _read_file(path: Path, allow_torch_load: bool) -> tuple[dict[str, tuple[TensorInfo, _Source]], dict[str, str]]:
    if path.suffix in TORCH_SUFFIXES:
        if not allow_torch_load:
            raise ValueError(f"{path}: a {path.suffix} file is a pickle; {_ASK}")
        return _read_torch(path), {}
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file, a checkpoint folder or a .pt/.pth/.bin file")
    return _read_safetensors(path)


class SafetensorsFile:
    """One safetensors file whose tensors are read, not mapped.

    torch maps a whole file privately, which the kernel refuses for a file larger than memory, and touched pages of any
    map count as resident; a read costs one copy and is freed with its tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        self._file = path.open("rb", buffering=0)
        try:
            # numpy, because with "pt" even opening maps the file privately
            with safe_open(path, framework="numpy") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._read_header()
        except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error

    def __del__(self) -> None:
        # Closed with the last checkpoint that reads from it, and without the warning of a forgotten file.
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def _read_header(self) -> None:
        """Names, dtypes, shapes and places, from a header that safetensors has checked."""
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length), object_pairs_hook=_without_doubles)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in TORCH_DTYPES:
                raise ValueError(f"tensor {name!r} is {entry['dtype']}, which cannot be regrouped unit by unit")
            self.infos[name] = TensorInfo(tuple(entry["shape"]), TORCH_DTYPES[entry["dtype"]])
            self._starts[name] = 8 + length + entry["data_offsets"][0]

    def get_tensor(self, name: str) -> Tensor:
        info = self.infos[name]
        tensor = torch.empty(math.prod(info.shape), dtype=info.dtype)
        self._read(name, tensor, 0)
        return tensor.reshape(info.shape)

    def get_rows(self, name: str, rows: slice | Tensor) -> Tensor:
        info = self.infos[name]
        width = math.prod(info.shape[1:])
        if isinstance(rows, slice):
            tensor = torch.empty(rows.stop - rows.start, *info.shape[1:], dtype=info.dtype)
            self._read(name, tensor, rows.start * width * info.dtype.itemsize)
            return tensor
        tensor = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
        at = 0
        for first, count in _runs(rows.tolist()):
            self._read(name, tensor[at : at + count], first * width * info.dtype.itemsize)
            at += count
        return tensor

    def _read(self, name: str, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with what stands `offset` bytes into `name`."""
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        done, start = 0, self._starts[name] + offset
        while done < len(buffer):
            # positioned, so that threads may read side by side; in pieces, so that Ctrl-C is noticed
            got = os.preadv(self._file.fileno(), [buffer[done : done + _CHUNK]], start + done)
            if not got:
                raise ValueError(f"{self.path}: the file ends inside tensor {name!r}; was it changed while in use?")
            done += got


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of rows that follow one another."""
    start = 0
    for k in range(1, len(rows) + 1):
        if k == len(rows) or rows[k] != rows[k - 1] + 1:
            yield rows[start], k - start
            start = k


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two entries of one name, another parser may check one and this one read the other.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, tuple[TensorInfo, _Source]], dict[str, str]]:
    source = SafetensorsFile(path)
    return {name: (info, source) for name, info in source.infos.items()}, source.metadata


def _read_sharded(
    index: Path, allow_torch_load: bool
) -> tuple[tuple[Path, ...], dict[str, tuple[TensorInfo, _Source]], dict[str, str]]:
    weight_map = _read_index(index)
    filenames = sorted(set(weight_map.values()))
    missing = [name for name in filenames if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index}: {len(missing)} of {len(filenames)} shards are missing: {_some(missing)}")
    shards: dict[str, dict[str, tuple[TensorInfo, _Source]]] = {}
    metadata: dict[str, str] = {}
    for name in filenames:
        shards[name], found = _read_file(index.parent / name, allow_torch_load)
        metadata.update(found)
    absent = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        raise ValueError(f"{index}: {len(absent)} tensors are not in the shards that it names: {_some(absent)}")
    entries = {name: shards[shard][name] for name, shard in weight_map.items()}
    return tuple(index.parent / name for name in filenames), entries, metadata


def _read_index(index: Path) -> dict[str, str]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{index}: an index of more than {_MAX_INDEX_BYTES} bytes is not read")
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map ({type(error).__name__}: {error})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: expected weight_map to give a file name for each tensor")
    for shard in set(weight_map.values()):
        # A shard lies beside its index: "../x" or "/etc/x" would read files that the user did not name.
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise ValueError(f"{index}: expected file names without folders, got {shard!r}")
    return weight_map


class _Loaded:
    """Tensors of a file that torch.load has read (memory-mapped where the format allows)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name].detach()

    def get_rows(self, name: str, rows: slice | Tensor) -> Tensor:
        return self.tensors[name].detach()[rows]


def _read_torch(path: Path) -> dict[str, tuple[TensorInfo, _Source]]:
    # Files of torch < 1.6 are no zip archives; torch.load maps only zip archives.
    mapped = zipfile.is_zipfile(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _LOAD_ERRORS as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{path}: torch.load(weights_only=True) cannot read it ({type(error).__name__}: {reason})"
        ) from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    strangers = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized
    ]
    if strangers:
        raise ValueError(f"{path}: expected a dict of dense tensors; these entries are none: {_some(strangers)}")
    source = _Loaded({str(name): tensor for name, tensor in content.items()})
    return {name: (TensorInfo(tuple(t.shape), t.dtype), source) for name, t in source.tensors.items()}


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
