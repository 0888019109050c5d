"""Activations of passes that stand still, in a file: memory then holds those of one batch at a time.

A pass that has stopped at a layer needs none of its tensors until it goes on. Their storages are written to a file
without a name, which vanishes with the process whatever happens, and emptied in place, so that every view of them stays
what it is. Whatever torch function reads one next brings it back first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Smaller tensors stay: they would cost more to write than to hold.
LEAST = 16 * 1024


@dataclass
class _Place:
    """A storage that is empty while its bytes lie at `offset` of the file.

    tensors: weak references to those that show it; when all have gone, nobody will ask for it again.
    """

    storage: torch.UntypedStorage
    offset: int
    size: int
    tensors: list[weakref.ref[Tensor]]


class Rest:
    """The file, and what lies in it.

    folder: where to make the file; it needs room for one layer's activations of all batches. least: bytes from which a
    tensor is put there. Raises ValueError for no folder, and OSError, from whatever is under way, where it is full.
    """

    def __init__(self, folder: str | Path, least: int = LEAST) -> None:
        if str(folder) == "":
            raise ValueError("spill: expected a folder, got ''; give '.' if the current one is meant")
        if not Path(folder).is_dir():
            raise ValueError(f"spill: expected an existing folder, got {str(folder)!r}")
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._least, self._end, self._folder = least, 0, folder
        self._free: dict[int, list[int]] = {}  # {size: offsets}
        self._owned: dict[int, dict[int, list[weakref.ref[Tensor]]]] = {}  # {pass: {storage: tensors that show it}}
        self._resting: dict[int, _Place] = {}
        self.most_bytes = 0  # that lay in the file at one time
        self._bytes = 0

    def close(self) -> None:
        """Bring back what somebody still holds, and give up the file."""
        for key in list(self._resting):
            if any(ref() is not None for ref in self._resting[key].tensors):
                self._bring(key)
        self._resting.clear()
        self._file.close()

    def before(self, tensors: Iterable[Tensor]) -> None:
        """Bring back what a torch function is about to read."""
        if self._resting:
            for x in tensors:
                if (key := _key(x)) in self._resting:
                    self._bring(key)

    def after(self, owner: int, given: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Note what a function of the pass `owner` has made: new storages, and new views of those it had made."""
        mine = self._owned.setdefault(owner, {})
        for x in results:
            if x.layout != torch.strided or x.device.type == "meta":
                continue
            key = _key(x)
            known = mine.get(key)
            if known is not None and any(ref() is not None for ref in known):
                known.append(weakref.ref(x))
            elif x.untyped_storage().nbytes() >= self._least and all(_key(g) != key for g in given):
                # What was there before this pass (parameters, inputs, tables) is others' too and stays.
                mine[key] = [weakref.ref(x)]

    def put_away(self, owner: int) -> None:
        """Write what the pass holds to the file, and empty it."""
        for key in [k for k, place in self._resting.items() if all(ref() is None for ref in place.tensors)]:
            self._forget(self._resting.pop(key))
        mine = self._owned.get(owner, {})
        for key, refs in list(mine.items()):
            held = [x for ref in refs if (x := ref()) is not None]
            mine[key] = [weakref.ref(x) for x in held]
            if not held:
                del mine[key]
            elif key not in self._resting:
                storage = held[0].untyped_storage()
                if storage.resizable() and storage.nbytes():
                    self._write(key, storage, mine[key])

    def finished(self, owner: int) -> None:
        """The pass has ended: what is left of it stays where it is."""
        for key in self._owned.pop(owner, {}):
            if key in self._resting and any(ref() is not None for ref in self._resting[key].tensors):
                self._bring(key)

    @contextmanager
    def present(self, tensors: Iterable[Tensor], changed: Iterable[Tensor] = ()) -> Iterator[None]:
        """These tensors in memory inside, and where they were afterwards; `changed` are written again."""
        written = {_key(x) for x in changed}
        places = [(key, self._resting[key]) for key in {_key(x) for x in tensors} if key in self._resting]
        for _, place in places:
            self._read(place)
        try:
            yield
        finally:
            for key, place in places:
                if key in written:
                    self._transfer(place, os.pwritev)
                place.storage.resize_(0)

    def _write(self, key: int, storage: torch.UntypedStorage, tensors: list[weakref.ref[Tensor]]) -> None:
        size = storage.nbytes()
        free = self._free.get(size)
        if free:
            offset = free.pop()
        else:
            offset, self._end = self._end, self._end + size
        place = _Place(storage, offset, size, tensors)
        self._transfer(place, os.pwritev)
        storage.resize_(0)
        self._resting[key] = place
        self._bytes += size
        self.most_bytes = max(self.most_bytes, self._bytes)

    def _bring(self, key: int) -> None:
        place = self._resting.pop(key)
        self._read(place)
        self._forget(place)

    def _read(self, place: _Place) -> None:
        place.storage.resize_(place.size)
        self._transfer(place, os.preadv)

    def _forget(self, place: _Place) -> None:
        self._free.setdefault(place.size, []).append(place.offset)
        self._bytes -= place.size

    def _transfer(self, place: _Place, move: Any) -> None:
        """Read or write the bytes of a storage; on a GPU by way of a copy."""
        flat = torch.empty(0, dtype=torch.uint8, device=place.storage.device).set_(place.storage)
        near = flat if flat.device.type == "cpu" else flat.cpu()
        # Not by numpy: a storage that an array shows can never be emptied again.
        view = memoryview((ctypes.c_char * place.size).from_address(near.data_ptr())).cast("B")
        done = 0
        while done < place.size:
            try:
                step = move(self._file.fileno(), [view[done:]], place.offset + done)
            except OSError as error:
                raise self._failed(error.errno, error.strerror) from error
            if step <= 0:
                raise self._failed(errno.EIO, "it ended early")
            done += step
        if near is not flat and move is os.preadv:
            flat.copy_(near)

    def _failed(self, number: int | None, reason: str | None) -> OSError:
        return OSError(
            number, f"spill: the file of activations in {self._folder} failed ({reason}); give a folder with more room"
        )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [x for item in value for x in tensors_in(item)]


def _key(x: Tensor) -> int:
    """The storage's identity, as long as somebody holds it; 0 for a tensor without one."""
    return int(x.untyped_storage()._cdata) if x.layout == torch.strided else 0
