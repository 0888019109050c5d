"""Which checkpoints statistics or a plan were made from, in which order: in their header, which ``merge`` looks at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint

ORIGINS = "checkpoints"


def digests(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Of each checkpoint: names, shapes, types, and the first row of every vector and matrix: little is read."""
    import torch

    found = []
    for checkpoint in checkpoints:
        digest = hashlib.blake2b(digest_size=8)
        for name, info in sorted(checkpoint.layout.items()):
            digest.update(f"{name} {info.dtype} {info.shape};".encode())
            if len(info.shape) in (1, 2) and min(info.shape) > 0:
                row = checkpoint.rows(name, slice(0, 1)).cpu().contiguous()
                digest.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def check_origins(flag: str, path: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """ValueError for a file made from these checkpoints in another order; a note for one made from others.

    flag: the option that names the file. What is no file of statistics and no plan, or does not say where it comes
    from, is left to others.
    """
    from mudsc_fast.checkpoints.reading import SafetensorsFile
    from mudsc_fast.records import KEY

    try:
        recorded = json.loads(SafetensorsFile(path).metadata.get(KEY, "null")).get(ORIGINS)
    except (AttributeError, OSError, RecursionError, ValueError):
        return
    if not isinstance(recorded, list) or not all(isinstance(digest, str) for digest in recorded):
        return
    here = digests(checkpoints)
    if recorded == here:
        return
    if sorted(recorded) == sorted(here):
        order = " ".join(str(checkpoints[here.index(digest)].path) for digest in recorded)
        raise ValueError(f"{flag} {path}: made from these checkpoints in another order; give them as {order}")
    if len(recorded) == len(here):  # another number is refused with its own message
        options.settings().say(f"note: {flag} {path} was made from other checkpoints than these")
