"""The parents and the merged net, layer by layer at the same time, over all calibration batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mudsc_fast.batches import check_batches, evaluation, home
from mudsc_fast.progress import Progress, bar
from mudsc_fast.repairs.resting import Rest
from mudsc_fast.repairs.units import Rows, rows_of
from mudsc_fast.repairs.walking import Call, Walk

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan


@dataclass
class Layer:
    """One layer at which all passes stand.

    calls: the merged net's Call of every batch. parents: for every batch, the parents' Calls. rows: how their outputs
    correspond. merged: the merged net. last: the output is the model's own. token, alone: the position of the sequence
    that the model goes on with, if any, and whether nothing else counts from here on. rest: where the Calls' tensors
    lie; they can be read inside `each`, `targets` and `outputs` alone, each batch's while it is its turn.
    """

    merged: nn.Module
    calls: list[Call]
    parents: list[list[Call]]
    rows: Rows
    token: int | None
    alone: bool
    rest: Rest | None = None

    @property
    def weight(self) -> str:
        return self.calls[0].weight

    @property
    def last(self) -> bool:
        return self.rows.free

    def each(self, change: bool = False) -> Iterator[tuple[Call, list[Call]]]:
        """Every batch's Calls of the merged net and the parents, in memory; change: the merged net's y is written."""
        for call, parents in zip(self.calls, self.parents, strict=True):
            with nullcontext() if self.rest is None else self._brought(call, () if change else parents, change):
                yield call, parents

    def targets(self) -> Iterator[tuple[Call, Tensor]]:
        """For every batch the merged net's Call and what its output should be, by the parents.

        Where the output is about to be added to something, what it is to be added to is counted as it is, with the
        errors it has by now. Half precision is widened, so that its rounding does not count as an error of the merge.
        """
        dim = self.calls[0].dim
        for call, parents in self.each():
            if call.skip is None:
                yield call, self.rows.expected([_single(p.y) for p in parents], dim)
            else:
                sums = [_single(p.y) if p.skip is None else _single(p.y) + _single(p.skip) for p in parents]
                yield call, self.rows.expected(sums, dim) - _single(call.skip)

    def outputs(self, parent: int | None = None) -> Iterator[Tensor]:
        """The merged layer's output of every batch, or a parent's."""
        for call, parents in zip(self.calls, self.parents, strict=True):
            of = call if parent is None else parents[parent]
            with nullcontext() if self.rest is None else self.rest.present([of.y]):
                yield of.y

    @contextmanager
    def _brought(self, call: Call, parents: Sequence[Call], change: bool) -> Iterator[None]:
        tensors = [call.x, *(x for c in (call, *parents) for x in (c.y, c.skip) if x is not None)]
        if self.rest is not None:
            with self.rest.present(tensors, [call.y] if change else ()):
                yield


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def walk_layers(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    plan: MergePlan,
    work: Callable[[Layer], None],
    what: str = "repairing",
    progress: Progress = False,
    spill: str | Path | None = None,
) -> int:
    """Run the parents and the merged net over all batches at once and call `work` at every layer, in order.

    `work` may change the layer's parameters in `merged` and must then change the outputs `call.y` in place. Layers that
    are called more than once, or share their weight with another part of the model, are passed over.
    spill: a folder for a file of the activations that no pass needs just now; None: they stay in memory.
    Returns the number of layers worked on.
    """
    batches, networks = list(check_batches(batches)), [merged, *models]
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    done = 0
    with evaluation(networks):
        once, token, attention = _survey(models[0], batches[0])
        named = [(_layers(net, once), _norms(net)) for net in networks]
        shapes = {name: tuple(p.shape) for name, p in models[0].named_parameters()}
        rows = {weight: rows_of(plan, weight, shapes[weight]) for weight in once}
        # A norm whose units belong to no space has nothing that could be repaired.
        rows = {w: None if len(shapes[w]) == 1 and w not in plan.spec.entries else r for w, r in rows.items()}
        with (
            _resting(spill) as rest,
            _walking(networks, batches, named, rest) as walks,
            bar(what, len(once), progress) as steps,
        ):
            while True:
                events = [[walk.step() for walk in batch] for batch in walks]
                names = {None if call is None else call.weight for batch in events for call in batch}
                if len(names) > 1:
                    raise ValueError(f"models: they run different layers at the same place: {sorted(map(str, names))}")
                if None in names:
                    return done
                calls = [[call for call in batch if call is not None] for batch in events]
                found = rows[calls[0][0].weight]
                if found is not None:
                    alone = token is not None and attention > 0 and calls[0][0].attended >= attention
                    layer = Layer(merged, [c[0] for c in calls], [c[1:] for c in calls], found, token, alone, rest)
                    work(layer)
                    done += 1
                steps.advance()


def check_networks(merged: nn.Module, models: Sequence[nn.Module], plan: MergePlan | None) -> None:
    """ValueError for other models than the plan's (None: any number), and for a merged net holding a parent's tensor.

    Such a tensor would change in the parent too. A plan of no spaces merges any number.
    """
    for net in (merged, *models):
        if not isinstance(net, nn.Module):
            raise TypeError(f"merged, models: expected torch modules, got {type(net).__name__}")
    if plan is not None and plan.labels and len(models) != plan.models:
        raise ValueError(f"models: expected the {plan.models} models of the plan, got {len(models)}")
    if not models:
        raise ValueError("models: expected at least one, got none")
    own = {id(p) for p in merged.parameters()}
    for m, model in enumerate(models):
        shared = next((name for name, p in model.named_parameters() if id(p) in own), None)
        if shared is not None:
            raise ValueError(
                f"merged: its {shared} is model {m}'s own tensor, which would change too; give a net of its own, as "
                "mf.installed makes one"
            )


@contextmanager
def _resting(spill: str | Path | None) -> Iterator[Rest | None]:
    rest = None if spill is None else Rest(spill)
    try:
        yield rest
    finally:
        if rest is not None:
            rest.close()


@contextmanager
def _walking(
    networks: Sequence[nn.Module],
    batches: Sequence[Any],
    named: Sequence[tuple[dict[int, str], dict[int, str]]],
    rest: Rest | None,
) -> Iterator[list[list[Walk]]]:
    walks: list[list[Walk]] = []
    try:
        for batch in batches:
            walks.append([])
            for net, (layers, norms) in zip(networks, named, strict=True):
                walks[-1].append(Walk(net, batch, home(net), layers, norms, rest))
        yield walks
    finally:
        for row in walks:
            for walk in row:
                walk.close()


def _survey(model: nn.Module, batch: Any) -> tuple[list[str], int | None, int]:
    """The weights of layers that are called exactly once and owned by one module; the token read; attention calls."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {id(p): name for name, p in model.named_parameters() if owners[id(p)] == 1}
    walk = Walk(model, _first_sample(batch), home(model), layers, {})
    seen: Counter[str] = Counter()
    try:
        while (call := walk.step()) is not None:
            seen[call.weight] += 1
        return [name for name, count in seen.items() if count == 1], walk.token, walk.attention
    finally:
        walk.close()


def _first_sample(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:1]
    if isinstance(batch, list | tuple):
        return [_first_sample(x) for x in batch[:1]]
    return batch


def _layers(model: nn.Module, once: Sequence[str]) -> dict[int, str]:
    parameters = dict(model.named_parameters())
    biases = {name.removesuffix("weight") + "bias" for name in once}
    return {id(p): name for name, p in parameters.items() if name in once or name in biases}


def _norms(model: nn.Module) -> dict[int, str]:
    """{identity of the running mean: the batch norm's module name}, of those that can carry a repair."""
    return {
        id(norm.running_mean): name
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.weight is not None
    }
