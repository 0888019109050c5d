"""For the site: lines such as `width: merged units` in a docstring become a list of arguments (see mkdocs.yml).

Docstrings are written to be read in the source, where a line for each argument needs no heading. Markdown would join
these lines into one paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

try:
    import griffe
except ImportError:  # the tests of `with_sections` need no site
    griffe = None

_ENTRY = re.compile(r"(?:^|(?<=\. ))(\w+(?:, \w+)*): ")


def with_sections(text: str, names: Collection[str], heading: str = "Args") -> str:
    """The docstring with its lines about `names` as one section, where the first of them stood."""
    out: list[str] = []
    entries: list[tuple[str, str]] = []
    place: int | None = None
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        first = next((k for k, line in enumerate(lines) if _begins(line, names)), len(lines))
        if first:
            out.append("\n".join(lines[:first]))
        if first < len(lines):
            place = len(out) if place is None else place
            entries += _entries(" ".join(line.strip() for line in lines[first:]), names)
    if place is not None:
        section = [f"{heading}:", *(f"    {name}: {about}" for name, about in entries)]
        out.insert(place, "\n".join(section))
    return "\n\n".join(out)


def _begins(line: str, names: Collection[str]) -> bool:
    found = _ENTRY.match(line)
    return found is not None and set(found.group(1).split(", ")) <= set(names)


def _entries(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """(name, what is said of it) in a text in which one stands behind the other."""
    starts = [m for m in _ENTRY.finditer(text) if set(m.group(1).split(", ")) <= set(names)]
    ends = [m.start() for m in starts[1:]] + [len(text)]
    found = []
    for start, end in zip(starts, ends, strict=True):
        head, *others = start.group(1).split(", ")
        found.append((head, text[start.end() : end].strip()))
        found += [(name, f"see `{head}`.") for name in others]
    return found


class Sections(griffe.Extension if griffe else object):  # type: ignore[misc]
    """Applied to every function and class when its source has been read."""

    def on_function_instance(self, *, func: Any, **_: Any) -> None:
        """Names of arguments."""
        if func.docstring:
            func.docstring.value = with_sections(func.docstring.value, [p.name for p in func.parameters])

    def on_class_members(self, *, cls: Any, **_: Any) -> None:
        """Names of the constructor's arguments; of a dataclass, of its fields."""
        if not cls.docstring:
            return
        made = cls.members.get("__init__")
        names = [p.name for p in made.parameters] if made is not None else [*cls.members]
        heading = "Args" if made is not None else "Attributes"
        cls.docstring.value = with_sections(cls.docstring.value, names, heading)
