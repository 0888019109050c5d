"""Checkpoints written tensor by tensor to a temporary name and renamed as a whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import finished
from .companions import copy_companions
from .layout import TensorInfo, encode_index, parse_size, plan_shards
from .reading import TORCH_SUFFIXES, Checkpoint

if TYPE_CHECKING:
    from mudsc_fast.distributed import World

INDEX_NAME = "model.safetensors.index.json"

# One write call stays short enough for Ctrl-C to be noticed between two of them.
_CHUNK = 64 * 2**20

# With `keep`, tensors are made safe when a shard is full, and in a large one whenever as many bytes have been written.
_SAFE_EVERY = 2**28

# A folder that holds anything else is not replaced: it may be somebody's work, not an earlier output.
_REPLACEABLE = (".safetensors", ".json", ".txt", ".md", ".model", ".tiktoken", ".jinja")


def check_output(
    path: str | PathLike[str], inputs: Iterable[str | PathLike[str]] = (), overwrite: bool = False
) -> Path:
    """Refuse an output that cannot or must not be written, before any work is done; returns its real path.

    Raises FileNotFoundError if its parent folder is missing, FileExistsError if it exists and ``overwrite`` is false,
    and ValueError if it is an input, contains one, or is a folder with more in it than a checkpoint.
    """
    out = Path(os.path.realpath(path))
    if out.suffix in TORCH_SUFFIXES:
        raise ValueError(f"{path}: checkpoints are written as safetensors: give a .safetensors file or a folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {out.parent} does not exist")
    if not out.exists():
        return out
    for given in inputs:
        source = Path(os.path.realpath(given))
        if out == source or out in source.parents or (source.exists() and out.samefile(source)):
            raise ValueError(f"{path}: the output would replace the input {given}")
    is_file = out.suffix == ".safetensors"
    if is_file and not out.is_file():
        raise ValueError(f"{path}: expected a file or nothing, found a folder")
    if not is_file and not out.is_dir():
        raise ValueError(f"{path}: expected a folder or nothing, found a file (a file output ends in .safetensors)")
    if not is_file:
        entries = sorted(out.iterdir())
        strangers = [e.name for e in entries if not e.is_file() or not e.name.endswith(_REPLACEABLE)]
        if not entries:
            return out
        if strangers:
            raise ValueError(f"{path}: not replaced: it holds {strangers[0]!r}, which is no part of a checkpoint")
        if not any(e.suffix == ".safetensors" for e in entries):
            raise ValueError(f"{path}: not replaced: it holds files, but no checkpoint")
    if not overwrite:
        raise FileExistsError(f"{path}: exists already (overwrite=True or --force replaces it)")
    return out


class CheckpointWriter:
    """Writes a checkpoint whose names, shapes and dtypes are known beforehand, one tensor at a time, in any order.

    >>> with CheckpointWriter("merged.safetensors", layout) as writer:
    ...     for name, tensor in stream:
    ...         writer.write(name, tensor)

    The output appears under its name when the block ends well, complete and synced to disk. When it ends with any
    exception, Ctrl-C included, the temporary is removed and what was there before is untouched.

    path: ends in ``.safetensors`` for one file; anything else is a folder, cut into shards of ``max_shard_size``.
    layout: name -> TensorInfo(shape, dtype), the order in which tensors are dealt to the shards.
    metadata: strings for the header of every file; ``format`` is added.
    inputs: files and folders that the output must not replace.
    companions: a folder whose config and tokenizer files are copied to a folder output.
    companion_dtype: the dtype that the copied config.json says, if it says one.
    texts: further files of a folder output, {name: content}.
    keep: a folder for the unfinished output, which then outlives a failure. A writer of the same arguments that finds
        it there goes on: `own` has the names of the tensors that are not known to be written. The caller answers for
        the arguments being the same, and removes the folder at the end.
    world: the processes that write together, each with a writer of the same arguments: shards are dealt out to them,
        `own` has the names of this process's tensors, and the output appears once all are written, or not at all.

    Raises what ``check_output`` raises, ValueError for tensors outside the layout, and OSError with the path for a full
    or read-only disk; the free space is checked before the first byte.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        layout: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        inputs: Iterable[str | PathLike[str]] = (),
        companions: Path | None = None,
        companion_dtype: torch.dtype | None = None,
        texts: Mapping[str, str] | None = None,
        keep: Path | None = None,
        world: World | None = None,
    ) -> None:
        if not layout:
            raise ValueError("layout: expected at least one tensor, got none")
        self._world = world
        self.path = check_output(path, inputs, overwrite)
        self.layout = dict(layout)
        self.is_file = self.path.suffix == ".safetensors"
        limit = None if self.is_file else parse_size(max_shard_size)
        header = {"format": "pt", **(metadata or {})}
        self.shards = plan_shards(self.layout, header, limit)
        self.companions = None if self.is_file else companions
        self.companion_dtype = companion_dtype
        self._shard_of = {name: i for i, shard in enumerate(self.shards) for name in shard.offsets}
        self.texts = {} if self.is_file else dict(texts or {})
        self._keep = keep
        self._temporary = (
            keep / "output" if keep else self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.tmp"
        )
        done = self._done = self._found() if world is None else world.first(self._found)
        self._mine = [i for i, shard in enumerate(self.shards) if not done.issuperset(shard.offsets)]
        if world is not None:
            self._mine = world.own(self._mine)
        self.own = {name for i in self._mine for name in self.shards[i].offsets if name not in done}
        self._files: dict[int, FileIO] = {}
        self._left = {name: _height(self.layout[name]) for name in self.layout if name in self.own}
        self._open = [sum(name in self.own for name in shard.offsets) for shard in self.shards]
        self._unsafe: dict[int, list[str]] = {}  # written since the shard was last synced

    def _found(self) -> set[str]:
        """Tensors that stand finished in `keep`."""
        if self._keep is None:
            return set()
        done = finished.noted(self._keep)
        places = {i: self._place(i) for i in range(len(self.shards))}
        whole = {i for i, p in places.items() if p.is_file() and p.stat().st_size == self.shards[i].nbytes}
        return {name for name, i in self._shard_of.items() if i in whole and name in done}

    def _place(self, index: int) -> Path:
        """Where a shard is while it is unfinished."""
        return self._temporary if self.is_file else self._temporary / self.shards[index].filename

    def __enter__(self) -> CheckpointWriter:
        try:
            self._temporary = self._begin() if self._world is None else self._world.first(self._begin)
            for i in self._mine:
                shard = self.shards[i]
                begun = not self.own.issuperset(shard.offsets)
                file = FileIO(str(self._place(i)), "xb+" if self._keep is None else "rb+" if begun else "wb+")
                self._files[i] = file
                file.truncate(shard.nbytes)
                _write_at(file, 0, shard.header)
        except OSError as error:
            self._remove()
            raise self._explained(error) from error
        except BaseException:
            self._remove()
            raise
        return self

    def _begin(self) -> Path:
        self._check_space()
        if not self.is_file:
            self._temporary.mkdir(exist_ok=self._keep is not None)
        if self._keep is not None:
            finished.forget_all_but(self._done, self._keep)
        return self._temporary

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to the layout's dtype.

        Raises ValueError for a name that is unknown or was written before, for another shape, and for finite values
        that the layout's dtype cannot hold; OSError if the disk is full.
        """
        self._require_left(name)
        info = self.layout[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: expected shape {info.shape}, got {tuple(tensor.shape)}")
        self._put(name, 0, tensor, _height(info))

    def write_rows(self, name: str, start: int, tensor: Tensor) -> None:
        """Write rows of a tensor, from row `start` of dim 0 on; every row once, in any order. Errors as `write`."""
        self._require_left(name)
        info = self.layout[name]
        end = start + (tensor.shape[0] if tensor.dim() else 0)
        if not info.shape or tuple(tensor.shape[1:]) != info.shape[1:] or not 0 <= start <= end <= info.shape[0]:
            raise ValueError(f"{name}: expected rows of shape {info.shape}, got {tuple(tensor.shape)} from {start} on")
        self._put(name, start, tensor, end - start)

    def _require_left(self, name: str) -> None:
        if name not in self._left:
            what = "was written before" if name in self.own else "is not in the layout"
            raise ValueError(f"{name}: this tensor {what}")

    def _put(self, name: str, start: int, tensor: Tensor, height: int) -> None:
        info, index = self.layout[name], self._shard_of[name]
        data = _cast(name, tensor.detach(), info.dtype).cpu().resolve_conj().resolve_neg().contiguous()
        if self._left[name] < height:
            raise ValueError(f"{name}: rows were written twice")
        try:
            view = data.reshape(-1).view(torch.uint8).numpy().data
            offset = start * (info.nbytes // _height(info)) if start else 0
            _write_at(self._files[index], self.shards[index].offsets[name] + offset, view)
            self._left[name] -= height
            if self._left[name] <= 0:
                del self._left[name]
                self._open[index] -= 1
                self._finished(index, name)
        except OSError as error:
            raise self._explained(error) from error

    def _finished(self, index: int, name: str) -> None:
        if self._keep is None:
            return
        unsafe = self._unsafe.setdefault(index, [])
        unsafe.append(name)
        if self._open[index] == 0 or sum(self.layout[n].nbytes for n in unsafe) >= _SAFE_EVERY:
            self._mark(index, self._keep)
        if self._open[index] == 0:
            self._files.pop(index).close()

    def _mark(self, index: int, keep: Path) -> None:
        """Note which tensors of a shard are finished, once they are safe on the disk."""
        # Taken first: after a sync that failed, a second one may succeed although data are lost.
        names = self._unsafe.pop(index)
        os.fsync(self._files[index].fileno())
        finished.note(names, keep, None if self._world is None else self._world.rank)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._world is not None and isinstance(value, Exception):
                self._tell(value)
            self._remove()
            return
        try:
            self._commit()
        except OSError as error:
            self._remove()
            raise self._explained(error) from error
        except BaseException:
            self._remove()
            raise

    def _commit(self) -> None:
        if self._world is None:
            self._finish()
            self._publish()
            return
        self._world.exchange(self._finish)
        self._world.first(self._publish)

    def _tell(self, error: Exception) -> None:
        """The other processes wait in `_commit`: let them fail for the same reason."""

        def fail() -> None:
            raise error

        with suppress(Exception):
            if self._world is not None:
                self._world.exchange(fail)

    def _finish(self) -> None:
        """This process's files, complete and on disk."""
        if self._left:
            raise ValueError(f"{self.path}: {len(self._left)} tensors were not written, first {min(self._left)!r}")
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()

    def _publish(self) -> None:
        if not self.is_file:
            self._write_extras()
            finished.sync_folder(self._temporary)
        _put_in_place(self._temporary, self.path)

    def _write_extras(self) -> None:
        extras = []
        if len(self.shards) > 1:
            index = self._temporary / INDEX_NAME
            index.write_bytes(encode_index(self.shards, self.layout))
            extras.append(index)
        if self.companions is not None:
            extras += copy_companions(self.companions, self._temporary, self.companion_dtype)
        for name, text in self.texts.items():
            (self._temporary / name).write_text(text, encoding="utf-8")
            extras.append(self._temporary / name)
        for path in extras:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def _check_space(self) -> None:
        # What stands in finished tensors has its place already.
        data = sum(info.nbytes for name, info in self.layout.items() if name not in self._done)
        needed = data + sum(len(shard.header) for shard in self.shards if not self._done.issuperset(shard.offsets))
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed} bytes needed, {free} free")

    def _explained(self, error: OSError) -> OSError:
        # The temporary name would only confuse: the message speaks of the output that the user named.
        return OSError(error.errno, f"cannot write the checkpoint ({error.strerror or error})", str(self.path))

    def _remove(self) -> None:
        if self._keep is not None:
            with suppress(OSError):  # as much as can be kept
                for index in list(self._unsafe):
                    self._mark(index, self._keep)
        for file in self._files.values():
            file.close()
        if self._keep is not None:
            return
        if self._temporary.is_dir():
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            self._temporary.unlink(missing_ok=True)


def save_checkpoint(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    inputs: Iterable[str | PathLike[str]] = (),
    companions: Path | None = None,
) -> Path:
    """Write a state dict as a safetensors file or folder; the arguments are those of ``CheckpointWriter``.

    tensors: name -> tensor, any dtype and device; a ``Checkpoint`` is copied tensor by tensor.
    dtype: the dtype of the floating tensors in the output; None keeps each tensor's own.
    Returns the real path of the output.
    """
    infos = tensors.layout if isinstance(tensors, Checkpoint) else layout_of(tensors)
    writer = CheckpointWriter(
        path,
        cast_layout(infos, dtype),
        metadata=metadata,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        inputs=[*inputs, *(tensors.files if isinstance(tensors, Checkpoint) else ())],
        companions=companions,
        companion_dtype=dtype,
    )
    with writer:
        for name in infos:
            writer.write(name, tensors[name])
    return writer.path


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The layout of a state dict."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def cast_layout(layout: Mapping[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """The layout with its floating tensors in ``dtype``; integers, booleans and complex tensors keep theirs."""
    return {
        name: TensorInfo(info.shape, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype)
        for name, info in layout.items()
    }


def _height(info: TensorInfo) -> int:
    """Rows of a tensor, by which it is written; 1 for scalars, so that nothing counts as written from the start."""
    return max(info.shape[0], 1) if info.shape else 1


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype.is_floating_point and tensor.dtype.is_floating_point:
        # float8 tensors have no isfinite of their own
        lost = torch.isfinite(tensor.float()) & ~torch.isfinite(cast.float())
        if lost.any():
            largest = tensor.float()[lost].abs().max().item()
            raise ValueError(f"{name}: expected values that fit in {dtype}, got {largest:g}")
    return cast


def _write_at(file: FileIO, offset: int, data: bytes | memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(data):
        # A raw file may take less than it is given.
        done += file.write(data[done : done + _CHUNK])


def _put_in_place(temporary: Path, path: Path) -> None:
    if temporary.is_dir() and path.exists() and any(path.iterdir()):
        # A folder cannot be renamed over a full one: the old one steps aside for the moment between two renames.
        aside = temporary.with_suffix(".old")
        path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(temporary, path)
    finished.sync_folder(path.parent)
