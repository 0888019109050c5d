"""A journal of a match: each finished visit in a file of its own, from which an interrupted match goes on.

The sweeps are deterministic but for what each visit finds. So a match that starts again runs from its beginning and
takes what the journal holds, visit by visit, instead of computing it: all its state (order, best labels, what is
remembered) comes out as it was, and so does the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mudsc_fast.records import PathLike, read_record, write_record

if TYPE_CHECKING:
    from mudsc_fast.rematch import Match

_KIND = "visit"

Duals = dict[str, tuple[Tensor, Tensor]]


class Journal:
    """The visits of one match, in a folder.

    folder: made if it is not there. about: what the match was asked for, plain values by name; a folder that holds the
        visits of another match is refused with a ValueError, which names what differs. ways: how each space is
        compared; where the folder knows them, `ways` is what it says, since another way rounds otherwise.
    """

    def __init__(self, folder: PathLike, about: Mapping[str, Any], ways: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.taken = 0
        self._next = 0
        check_same(self.folder / "match.json", about, "journal")
        self.ways = dict(ways)
        path = self.folder / "ways.json"
        if path.exists():
            self.ways = json.loads(path.read_text(encoding="utf-8"))
        else:
            check_same(path, ways, "journal")

    def holds_next(self) -> bool:
        """Whether the next visit was recorded earlier."""
        return self._path().exists()

    def _path(self) -> Path:
        return self.folder / f"{self._next:06d}.safetensors"

    def visit(
        self, spaces: Sequence[str], duals: Duals, compute: Callable[[], list[Match]], make: Callable[..., Match]
    ) -> list[Match]:
        """What the visit of these spaces found: recorded earlier, or computed now and recorded.

        duals: by space, where the next search of each starts; set to what it was after this visit.
        """
        path = self._path()
        self._next += 1
        if not path.exists():
            found = compute()
            tensors: dict[str, Tensor] = {}
            meta: dict[str, Any] = {"spaces": list(spaces), "values": [match.value for match in found]}
            for k, (name, match) in enumerate(zip(spaces, found, strict=True)):
                tensors[f"{k}.labels"] = match.labels
                if name in duals:
                    tensors[f"{k}.u"], tensors[f"{k}.v"] = duals[name]
            write_record(path, _KIND, tensors, meta)
            return found
        tensors, meta = read_record(path, _KIND)
        if meta.get("spaces") != list(spaces) or len(meta.get("values", ())) != len(spaces):
            raise ValueError(f"{path}: holds a visit of {meta.get('spaces')}, expected {list(spaces)}")
        self.taken += 1
        for k, name in enumerate(spaces):
            if f"{k}.u" in tensors:
                duals[name] = tensors[f"{k}.u"], tensors[f"{k}.v"]
        return [make(tensors[f"{k}.labels"], float(value)) for k, value in enumerate(meta["values"])]


def check_same(path: Path, about: Mapping[str, Any], what: str) -> None:
    """Write plain values to a JSON file, or compare them with those it holds: ValueError, naming a difference."""
    wanted = json.loads(json.dumps(about))
    if not path.exists():
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what}: {path} is damaged ({error}); remove {path.parent} to begin anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}: {path} is damaged; remove {path.parent} to begin anew")
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{what}: {name} is {_short(wanted.get(name))} now and was {_short(found.get(name))} in the run that "
                f"was interrupted; give what it was, or remove {path.parent} to begin anew"
            )


def digest(text: str) -> str:
    """A short name of a long text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
