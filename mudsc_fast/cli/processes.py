"""Commands run by several processes: `torchrun -m mudsc_fast merge ...` on one machine or many."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from mudsc_fast.distributed import World

# What torchrun and other launchers set.
_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")

# Of join: what it connected, leave has to part.
_connected = False
_GIVING_BACK = 0.2  # seconds


def join() -> World | None:
    """The processes that a launcher started, connected; None where this one is alone. All but the first are quiet.

    ValueError for variables that are no numbers.
    """
    global _connected
    given = [os.environ.get(name) for name in _VARIABLES]
    if not all(given):
        return None
    try:
        size, rank = int(given[0] or 1), int(given[1] or 0)
    except ValueError:
        raise ValueError(f"WORLD_SIZE and RANK: expected numbers as torchrun sets them, got {given[:2]}") from None
    if size < 2:
        return None
    import torch.distributed as dist

    from mudsc_fast.distributed import world_of

    if not dist.is_initialized():
        # A process that dies closes its connections, which is noticed at once; a wide space may take an hour.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        _connected = True
    if rank:
        options.settings().quiet = True
    return world_of(True)


def leave() -> None:
    """End what ``join`` began, before the interpreter does.

    A thread of gloo's gives back the tensors of the last exchange, for which it waits until Python's lock is free; once
    the interpreter ends it would abort the process instead. Not after an interrupt: an exchange that others have not
    come to would be waited for.
    """
    global _connected
    if not _connected:
        return
    import torch.distributed as dist

    _connected = False
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(_GIVING_BACK)  # without Python's lock
