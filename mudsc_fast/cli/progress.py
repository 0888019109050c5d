"""Progress of the commands' own loops, on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None, quiet: bool) -> Iterator[Item]:
    """The items, with a bar where stderr is a terminal."""
    from mudsc_fast.progress import bar

    with bar(description, total, not quiet) as steps:
        for item in items:
            yield item
            steps.advance()
