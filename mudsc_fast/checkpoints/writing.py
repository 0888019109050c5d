"""Checkpoints written tensor by tensor to a temporary name and renamed as a whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from io import FileIO
from os import PathLike
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .companions import copy_companions
from .layout import TensorInfo, encode_index, parse_size, plan_shards
from .reading import TORCH_SUFFIXES, Checkpoint

INDEX_NAME = "model.safetensors.index.json"

# One write call stays short enough for Ctrl-C to be noticed between two of them.
_CHUNK = 64 * 2**20

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
    ) -> None:
        if not layout:
            raise ValueError("layout: expected at least one tensor, got none")
        self.path = check_output(path, inputs, overwrite)
        self.layout = dict(layout)
        self.is_file = self.path.suffix == ".safetensors"
        limit = None if self.is_file else parse_size(max_shard_size)
        header = {"format": "pt", **(metadata or {})}
        self.shards = plan_shards(self.layout, header, limit)
        self.companions = None if self.is_file else companions
        self.companion_dtype = companion_dtype
        self._shard_of = {name: i for i, shard in enumerate(self.shards) for name in shard.offsets}
        self._temporary = self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.tmp"
        self._files: list[FileIO] = []
        self._left = set(self.layout)

    def __enter__(self) -> CheckpointWriter:
        try:
            self._check_space()
            if not self.is_file:
                self._temporary.mkdir()
            for shard in self.shards:
                target = self._temporary if self.is_file else self._temporary / shard.filename
                file = FileIO(str(target), "xb+")
                self._files.append(file)
                file.truncate(shard.nbytes)
                _write_at(file, 0, shard.header)
        except OSError as error:
            self._remove()
            raise self._explained(error) from error
        except BaseException:
            self._remove()
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to the layout's dtype.

        Raises ValueError for a name that is unknown or was written before, for another shape, and for finite values
        that the layout's dtype cannot hold; OSError if the disk is full.
        """
        if name not in self._left:
            what = "was written before" if name in self.layout else "is not in the layout"
            raise ValueError(f"{name}: this tensor {what}")
        info = self.layout[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: expected shape {info.shape}, got {tuple(tensor.shape)}")
        data = _cast(name, tensor.detach(), info.dtype).cpu().resolve_conj().resolve_neg().contiguous()
        index = self._shard_of[name]
        try:
            view = data.reshape(-1).view(torch.uint8).numpy().data
            _write_at(self._files[index], self.shards[index].offsets[name], view)
        except OSError as error:
            raise self._explained(error) from error
        self._left.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
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
        if self._left:
            raise ValueError(f"{self.path}: {len(self._left)} tensors were not written, first {min(self._left)!r}")
        for file in self._files:
            os.fsync(file.fileno())
            file.close()
        if not self.is_file:
            self._write_extras()
            _sync_folder(self._temporary)
        _put_in_place(self._temporary, self.path)

    def _write_extras(self) -> None:
        extras = []
        if len(self.shards) > 1:
            index = self._temporary / INDEX_NAME
            index.write_bytes(encode_index(self.shards, self.layout))
            extras.append(index)
        if self.companions is not None:
            extras += copy_companions(self.companions, self._temporary, self.companion_dtype)
        for path in extras:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def _check_space(self) -> None:
        needed = sum(shard.nbytes for shard in self.shards)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed} bytes needed, {free} free")

    def _explained(self, error: OSError) -> OSError:
        # The temporary name would only confuse: the message speaks of the output that the user named.
        return OSError(error.errno, f"cannot write the checkpoint ({error.strerror or error})", str(self.path))

    def _remove(self) -> None:
        for file in self._files:
            file.close()
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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Some network file systems refuse to open or sync a folder; the files in it are synced already.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
