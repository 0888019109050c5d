"""Files of tensors with JSON metadata: safetensors written under a temporary name and renamed, never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

PathLike = str | os.PathLike[str]

KEY = "mudsc_fast"


def write_record(path: PathLike, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` and `meta` to one safetensors file; a killed or failed write leaves an older file as it was.

    `kind` names what the file holds, so that `read_record` refuses another kind. OSError: folder missing or full.
    """
    from safetensors.torch import save_file

    target = Path(path)
    header = {KEY: json.dumps({"kind": kind, "version": 1, **meta})}
    # In the target's own folder: a rename is atomic only inside one file system.
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, name, metadata=header)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_record(path: PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write_record` wrote; ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="pt") as record:
            header = json.loads((record.metadata() or {}).get(KEY, "null"))
            if not isinstance(header, dict) or header.get("kind") != kind:
                raise ValueError(f"{os.fspath(path)}: not a file of {kind}")
            if header.get("version") != 1:
                raise ValueError(f"{os.fspath(path)}: version {header.get('version')!r} of {kind}, expected 1")
            return {key: record.get_tensor(key) for key in record.keys()}, header  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged file: {error}") from error


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
