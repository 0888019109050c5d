"""Several processes as one: torch.distributed, the engine that torchrun starts.

Every process makes the same calls with the same arguments. Work is shared out by names and numbers alone, so that each
process knows what is its own without asking.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
Node = TypeVar("Node", bound=Hashable)


class World:
    """The processes of a group, and this one's place among them.

    group: a torch.distributed process group, or None for the default one. RuntimeError where torch.distributed is not
    initialised.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group: torch.distributed is not initialised; call init_process_group, or use torchrun")
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"World(rank {self.rank} of {self.size})"

    def exchange(self, work: Callable[[], Item]) -> list[Item]:
        """Do this process's work and give every process the results of all, in the order of ranks.

        An error of one process is raised on all, with its type where that is a builtin, and its rank. RuntimeError if a
        process is gone.
        """
        import torch.distributed as dist

        mine: tuple[Any, str | None, str] = None, None, ""
        error: Exception | None = None
        try:
            mine = work(), None, ""
        except Exception as raised:  # noqa: BLE001 (the others have to hear of it, whatever it is)
            error = raised
            mine = None, type(raised).__name__, str(raised)
        everyone: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyone, mine, group=self.group)
        except RuntimeError as lost:
            if error is not None:
                raise error from lost
            reason = str(lost).strip().splitlines()[0] if str(lost).strip() else "no reason given"
            raise RuntimeError(f"a process of the group is gone, and so this run ends ({reason})") from lost
        if any(kind is not None for _, kind, _ in everyone):
            # A process that ends at once may take with it what others have not read yet.
            with suppress(RuntimeError):
                dist.barrier(group=self.group)
        if error is not None:
            raise error
        for rank, (_, kind, text) in enumerate(everyone):
            if kind is not None:
                found = getattr(builtins, kind, RuntimeError)
                known = isinstance(found, type) and issubclass(found, ValueError | TypeError | MemoryError)
                said = text if known else f"{kind}: {text}"
                raise (found if known else RuntimeError)(f"rank {rank}: {said}")
        return [result for result, _, _ in everyone]

    def first(self, work: Callable[[], Item]) -> Item:
        """What the first process's work gives, on every process; the others do nothing."""
        results: list[Any] = self.exchange(lambda: work() if self.rank == 0 else None)
        found: Item = results[0]
        return found

    def own(self, items: Iterable[Item]) -> list[Item]:
        """This process's share of items: every size-th one."""
        return [item for k, item in enumerate(items) if k % self.size == self.rank]


def world_of(group: Any) -> World | None:
    """The World of a group: None for None, and for a group of one process; True means the default group."""
    if group is None or group is False:
        return None
    world = group if isinstance(group, World) else World(None if group is True else group)
    return world if world.size > 1 else None


def levels(visits: Sequence[Node], near: Mapping[Node, set[Node]]) -> list[list[int]]:
    """Which visits may happen at once, so that the result is the same as one after another.

    visits: what is visited, in order. near: whose state a visit reads beside its own, symmetric. Returns the places in
    `visits`, level by level: a visit comes after all earlier ones that it reads, or that read it.
    """
    last: dict[Node, int] = {}
    found: list[list[int]] = []
    for k, node in enumerate(visits):
        level = max((last[other] + 1 for other in (node, *near[node]) if other in last), default=0)
        last[node] = level
        if level == len(found):
            found.append([])
        found[level].append(k)
    return found


def hubs(near: Mapping[Node, set[Node]]) -> set[Node]:
    """What more than half of all others read."""
    return {node for node, others in near.items() if 2 * len(others - {node}) > len(near)}


def owners(costs: Mapping[Node, float], near: Mapping[Node, set[Node]], size: int) -> dict[Node, int]:
    """Which process matches what: the costs spread evenly over processes, largest first.

    What most others read (a residual stream) can hardly be matched beside them, so such hubs are spread apart.
    """
    apart = hubs(near)
    result: dict[Node, int] = {}
    for part in (apart, set(costs) - apart):
        loads = [0.0] * size
        for node in sorted((n for n in costs if n in part), key=lambda n: -costs[n]):
            rank = loads.index(min(loads))
            loads[rank] += costs[node]
            result[node] = rank
    return result
