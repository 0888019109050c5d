"""Readable names of traced spaces: `residual`, `layers.3.mlp`, `layers.3.qk`, or the layer that makes the units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from mudsc_fast.tracing.drafts import Draft
from mudsc_fast.tracing.layouts import Atom, leaves
from mudsc_fast.tracing.state import State

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def _common(names: Iterable[str]) -> str:
    """The module that holds all of these."""
    shared: list[str] = []
    for level in zip(*(name.split(".") for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _layer(name: str, number: int = -1) -> str:
    """A module's name up to its last number (or another one): the layer it stands in."""
    ends = [found.end() for found in _NUMBER.finditer(name)]
    return name[: ends[number]] if ends else ""


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


class Namer:
    """Names for all spaces of a model; no two alike."""

    def __init__(self, state: State, drafts: Sequence[Draft], is_weight: Callable[[str], bool]) -> None:
        self._kinds: dict[Atom, str] = {}
        for layout, kind in state.kinds:
            for atom in leaves(layout):
                self._kinds.setdefault(atom, kind)
        self._weight = is_weight
        self._shared = Counter(d.key.block for d in drafts if d.key.block is not None and d.key.index is None)
        self._attentive = {
            _layer(_common(_module(axis.tensor) for axis in d.axes)) for d in drafts if d.key.inner in self._kinds
        }
        self._taken: set[str] = set()
        self._ties: dict[Atom, str] = {}
        layers = {_layer(_module(axis.tensor), 0) for d in drafts for axis in d.axes} - {""}
        self._prefix = _common(layer.rpartition(".")[0].rpartition(".")[0] for layer in layers) if layers else ""

    def name(self, draft: Draft) -> str:
        """The name of a space: the first good one that is not taken."""
        names = [name for found in self._candidates(draft) if (name := self._short(found))]
        names += [f"{name}.{k}" for k in range(2, len(self._taken) + 3) for name in names[:1] or ["units"]]
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return name

    def tie(self, draft: Draft) -> str | None:
        """The name of the block permutation that a space shares with others; None if it shares none."""
        block = draft.key.block
        if block is None or self._shared[block] < 2 or draft.key.index is not None:
            return None
        if block not in self._ties:
            home = _common(_module(axis.tensor) for axis in draft.axes)
            where, kind = self._short(_layer(home) or home), self._kinds.get(block, "blocks")
            names = [f"{where}.{kind}{more}".lstrip(".") for more in ("", *(f".{k}" for k in range(2, 999)))]
            self._ties[block] = next(name for name in names if name not in self._ties.values())
        return self._ties[block]

    def _short(self, name: str) -> str:
        """A name without what all layers' names begin with."""
        if not self._prefix:
            return name
        if f"{self._prefix}.".startswith(f"{name}."):
            return ""
        return name.removeprefix(f"{self._prefix}.")

    def _candidates(self, draft: Draft) -> Iterator[str]:
        """Names for a space, the best first, whole."""
        modules = [_module(axis.tensor) for axis in draft.axes]
        home = _common(modules)
        made = [a.tensor for a in draft.axes if a.role == "out"] or [a.tensor for a in draft.axes]
        weights = [t for t in made if self._weight(t)] or made
        makers = _common(_module(t) for t in weights)
        end = "" if draft.key.index is None else f".{draft.key.index}"
        part = self._part(draft)
        if part:
            for where in (_layer(home), home):
                yield self._join(where, part + end)
        elif len({_layer(m) for m in modules}) > 1 and len(set(weights)) > 1:
            yield self._join(makers, "residual")
            yield self._join(home, "residual")
        elif home != _layer(home):
            yield home + end
        elif home and home in self._attentive:
            yield f"{home}.mlp{end}"
        yield (makers or _module(weights[0]) or weights[0]) + end
        yield _module(weights[0]) + end

    def _join(self, where: str, part: str) -> str:
        where = self._short(where)
        # The prefix is put back: every candidate is shortened once more.
        return f"{where}.{part}" if where else part

    def _part(self, draft: Draft) -> str:
        """What the units are in attention, where it is known: qk, v, heads, q (the query heads of a group)."""
        key = draft.key
        kind = self._kinds.get(key.inner, "") if key.inner is not None else ""
        if key.block is None:
            return kind
        block = self._kinds.get(key.block, "")
        if key.inner is None:
            return block
        if block == "heads" and not kind.startswith("qk") and kind != "v" and self._shared[key.block] > 1:
            return "q"
        return kind
