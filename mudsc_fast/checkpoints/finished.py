"""Which tensors of an unfinished checkpoint are safe on the disk: their names in a file, one JSON string a line."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

_NAME = "tensors-done.jsonl"


def noted(folder: Path) -> set[str]:
    """The names on all lines that are whole."""
    lines = [line for path in folder.glob(f"{_NAME}*") for line in path.read_bytes().split(b"\n")]
    found = set()
    for line in lines:
        with suppress(ValueError):
            name = json.loads(line)
            if isinstance(name, str):
                found.add(name)
    return found


def note(names: Iterable[str], folder: Path, rank: int | None) -> None:
    """Add names. rank: of this process among several; network file systems do not append for two at once."""
    with open(folder / (_NAME if rank is None else f"{_NAME}.{rank}"), "ab") as file:
        # A line that a kill cut off would swallow the next one.
        file.write(b"".join(b"\n" + json.dumps(name).encode() for name in names) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def forget_all_but(names: Collection[str], folder: Path) -> None:
    """Note anew what is safe where files were lost: they are made again, and hold nothing of what was noted."""
    if noted(folder).issubset(names):
        return
    lists = sorted(folder.glob(f"{_NAME}*"))
    fresh = folder / "tensors-done.part"
    with open(fresh, "wb") as file:
        file.write(b"".join(json.dumps(name).encode() + b"\n" for name in sorted(names)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, lists[0])
    for path in lists[1:]:
        path.unlink()
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make names in a folder safe."""
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
