"""Parts of documents that are made from results files: each stands between ``<!-- NAME: begin -->`` and its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def part(text: str, name: str) -> str:
    """What stands between the marks of ``name``; ValueError unless each is there once."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one part between {begin.strip()} and {end.strip()}")
    return text.split(begin)[1].split(end)[0].strip("\n")


def renewed(text: str, parts: Mapping[str, str]) -> str:
    """The text with these parts in place of what stands there; ValueError for one that it lacks."""
    for name, body in parts.items():
        part(text, name)
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        text = text.split(begin)[0] + f"{begin}\n{body}\n{end}" + text.split(end)[1]
    return text


def write(path: Path, parts: Mapping[str, str]) -> None:
    """Renew a document's parts; it appears whole or stays as it was."""
    made = path.with_suffix(".part")
    made.write_text(renewed(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
    made.replace(path)
