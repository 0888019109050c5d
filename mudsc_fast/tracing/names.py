"""Readable names of traced spaces: `residual`, `layers.3.mlp`, `layers.3.qk`, or the layer that makes the units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from mudsc_fast.tracing.drafts import Draft
from mudsc_fast.tracing.layouts import Atom, leaves
from mudsc_fast.tracing.state import State

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def _common(names: Sequence[str]) -> str:
    """The module that holds all of these."""
    shared: list[str] = []
    for level in zip(*(name.split(".") for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _layer(name: str) -> str:
    """A module's name up to its first number: the layer it stands in."""
    found = _NUMBER.search(name)
    return name[: found.end()] if found else ""


class Namer:
    """Names for all spaces of a model; no two alike."""

    def __init__(self, state: State, drafts: Sequence[Draft], is_weight: Callable[[str], bool]) -> None:
        self._kinds: dict[Atom, str] = {}
        for layout, kind in state.kinds:
            for atom in leaves(layout):
                self._kinds.setdefault(atom, kind)
        self._weight = is_weight
        self._blocks = Counter(d.key.block for d in drafts if d.key.block is not None and d.key.index is None)
        self._attentive = {self._home(d) for d in drafts if d.key.inner in self._kinds}
        self._taken: Counter[str] = Counter()
        tensors = [axis.tensor for d in drafts for axis in d.axes]
        layers = {_layer(t) for t in tensors} - {""}
        self._prefix = _common([layer.rpartition(".")[0].rpartition(".")[0] for layer in layers]) if layers else ""
        self._ties: dict[Atom, str] = {}

    def _home(self, draft: Draft) -> str:
        """The innermost module that holds all tensors of a space."""
        return _common([axis.tensor.rpartition(".")[0] for axis in draft.axes])

    def _short(self, name: str) -> str:
        return name.removeprefix(self._prefix + ".") if self._prefix else name

    def name(self, draft: Draft) -> str:
        """The name of a space."""
        name = self._short(self._candidate(draft)) or "units"
        self._taken[name] += 1
        return name if self._taken[name] == 1 else f"{name}.{self._taken[name]}"

    def tie(self, draft: Draft) -> str | None:
        """The name of the block permutation that a space shares with others; None if it shares none."""
        block = draft.key.block
        if block is None or self._blocks[block] < 2 or draft.key.index is not None:
            return None
        if block not in self._ties:
            layer = self._within(draft)
            name = f"{layer}.heads" if layer else "heads"
            known = set(self._ties.values())
            self._ties[block] = name if name not in known else f"{name}.{len(known)}"
        return self._ties[block]

    def _within(self, draft: Draft) -> str:
        home = self._home(draft)
        return self._short(_layer(home) or home)

    def _candidate(self, draft: Draft) -> str:
        key, home = draft.key, self._home(draft)
        layer = _layer(home)
        if key.block is not None:
            where = layer or home
            kind = self._kinds.get(key.inner, "") if key.inner is not None else "heads"
            if key.inner is not None and not kind:
                kind = "q" if self._blocks[key.block] > 1 else ""
            suffix = "" if key.index is None else f".{key.index}"
            if kind:
                return f"{where}.{kind}{suffix}" if where else f"{kind}{suffix}"
            return (home if home != layer else self._maker(draft)) + suffix
        if key.inner in self._kinds:
            return f"{layer or home}.{self._kinds[key.inner]}"
        makers = {a.tensor for a in draft.axes if a.role == "out" and self._weight(a.tensor)}
        spread = {_layer(t) for t in {a.tensor for a in draft.axes}}
        if len(makers) > 1 and len(spread) > 1:
            return f"{home}.residual" if home else "residual"
        if home and home != layer and not home.rpartition(".")[2].isdigit() and len(draft.axes) > 1:
            return home
        return self._maker(draft)

    def _maker(self, draft: Draft) -> str:
        """The layer that makes the units."""
        made = [a.tensor for a in draft.axes if a.role == "out"] or [a.tensor for a in draft.axes]
        weights = [t for t in made if self._weight(t)] or made
        return _common([t.rpartition(".")[0] for t in weights]) or weights[0].rpartition(".")[0] or weights[0]
