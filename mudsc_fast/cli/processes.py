"""Commands run by several processes: `torchrun -m mudsc_fast merge ...` on one machine or many."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from mudsc_fast.distributed import World

# What torchrun and other launchers set.
_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


def join() -> World | None:
    """The processes that a launcher started, connected; None where this one is alone. All but the first are quiet.

    ValueError for variables that are no numbers.
    """
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
    if rank:
        options.settings().quiet = True
    return world_of(True)
