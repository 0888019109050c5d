"""Rotations before an average: maps of residual streams and of heads that keep a model's function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast import law
from mudsc_fast.arguments import check_count, check_share, check_spec
from mudsc_fast.assignment import assign
from mudsc_fast.batches import check_batches, check_models, evaluation, home, moved
from mudsc_fast.calibration import calibrate
from mudsc_fast.installing import install
from mudsc_fast.layout import factors_at
from mudsc_fast.moments import joint_covariance
from mudsc_fast.orthogonal import Map, crossed_weights, nearest, rotate_
from mudsc_fast.progress import Progress, bar
from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.streams import find_streams

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance

PARTS = ("stream", "heads")
_CHANGE = 1e-3  # relative; what a map that is no symmetry changes is of the size of the outputs
_STAY = 1e-8  # share of the whole that speaks for no rotation: decides where nothing else does, as in few samples' rest


@dataclass(frozen=True)
class Rotations:
    """state_dicts: the models' own functions in model 0's coordinates, model 0 first, whose norms are folded.

    before, after: {map: how near the models' units are, a blend of cosines, mean over models 1.., before and after}.
    """

    state_dicts: list[dict[str, Tensor]]
    before: dict[str, float]
    after: dict[str, float]


def align_rotations(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    balance: float = 0.5,
    parts: Sequence[str] = PARTS,
    max_sweeps: int = 20,
    device: torch.device | str | None = None,
    progress: Progress = False,
) -> Rotations:
    """Rotate models 1.. where that keeps their function, so that they come nearest to model 0 before an average.

    A stream that is read only through layer norms or RMS norms may be rotated as a whole, once the norms' factors and
    shifts stand in the layers that read them; values inside a head too, and queries and keys together, or in the planes
    of a rotary embedding. What a spec cannot tell of that is tried: a map is used if random rotations of its kind leave
    the outputs on the first batch as they are.

    models: two or more modules of one architecture; they stay as they are. Other units than these are best matched
        before (`MergePlan.align`). Heads are paired here by how near they can come, or stay as given where query heads
        move with their group. batches: as for `calibrate`; read at once. spec: of the models.
    balance: share of the weights' cosine in what is made greatest, the rest is that of the activations; 0..1.
    parts: "stream", "heads" or both. max_sweeps: at most so many visits of each map; each is exact, given the others.
    device: where to calibrate; None: where the models are.

    Returns Rotations, with the models' dtypes and devices. They may be averaged, or matched further like any models.
    Raises ValueError or TypeError: unknown parts, nothing that can be rotated, with what stands in the way (norms on
    the stream itself, batch norms, tied embeddings), tensors or batches that do not fit, outputs on a batch that are
    not finite. Source: orthogonal Procrustes; arXiv 2506.22712 for the symmetries.
    """
    models = check_models(models)
    check_spec(spec)
    check_share("balance", balance)
    check_count("max_sweeps", max_sweeps, 1)
    chosen = tuple(parts) if isinstance(parts, Iterable) and not isinstance(parts, str) else ()
    if not chosen or any(part not in PARTS for part in chosen):
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {parts!r}")
    batches = list(check_batches(batches))
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    wide = any(x.is_floating_point() and x.element_size() < 4 for model in models for x in model.state_dict().values())
    works = [copy.deepcopy(model).float() if wide else copy.deepcopy(model) for model in models]
    batches = [_widened(batch) for batch in batches] if wide else batches
    works = [work if device is None else work.to(device) for work in works]
    states = [{n: x.detach().clone() for n, x in work.state_dict().items()} for work in works]
    _check(works, states, spec)
    with evaluation(works):
        first = _inputs(batches[0], home(works[0]))
        _check_outputs(works, first)
        maps = _streams(works, states, spec, first) if "stream" in chosen else []
        if "heads" in chosen:
            maps += _heads(works, spec, first)
        if not maps:
            raise ValueError("spec: it has no heads whose values, or queries and keys, may be rotated")
    seen: Mapping[str, Covariance] = {}
    if balance < 1:
        tapped = tuple(Space(part.name, part.width, part.axes, part.taps, part.blocks) for part in maps)
        with _finite_outputs(works):
            seen = calibrate(works, batches, PermutationSpec(tapped), progress=progress)
    before, after = ({part.name: 0.0 for part in maps} for _ in range(2))
    with bar("rotating", None, progress) as steps:
        for m in range(1, len(models)):
            crossed = {part.name: _crossed(seen[part.name], part, m) for part in maps if part.name in seen}
            descent = _Descent(spec, states[0], states[m], maps, crossed, balance)
            for part in maps:
                before[part.name] += descent.value(part) / (len(models) - 1)
            for _ in range(max_sweeps):
                if not descent.sweep():
                    break
                steps.advance()
            for part in maps:
                after[part.name] += descent.value(part) / (len(models) - 1)
            states[m] = descent.second
    homes = [model.state_dict() for model in models]
    results = [{n: x.to(home[n]) for n, x in state.items()} for home, state in zip(homes, states, strict=True)]
    return Rotations(results, before, after)


class _Descent:
    """One model's way to model 0: each visit of a map or of the heads' order is its optimum, given the others."""

    def __init__(
        self,
        spec: PermutationSpec,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        maps: Sequence[Map],
        crossed: Mapping[str, Tensor],
        balance: float,
    ) -> None:
        touched = {axis.tensor for part in maps for axis in part.axes}
        self.spec, self.maps, self.crossed, self.balance = spec, maps, dict(crossed), balance
        self.first = {name: x.double() if name in touched else x for name, x in first.items()}
        self.second = {name: x.double() if name in touched else x for name, x in second.items()}

    def _both(self, part: Map, all_blocks: bool = False) -> Tensor:
        """The blend of both spaces: (blocks, n, n), or with all_blocks (blocks, blocks, n, n)."""
        share = self.balance if part.name in self.crossed else 1.0
        total = torch.zeros((), dtype=torch.float64)
        if share > 0:
            total = total + share * crossed_weights(self.first, self.second, part, all_blocks)
        if share < 1:
            seen = self.crossed[part.name]
            total = total + (1 - share) * (seen if all_blocks else seen.diagonal().movedim(-1, 0))
        return total

    def value(self, part: Map) -> float:
        return float(self._both(part).diagonal(dim1=1, dim2=2).sum())

    def sweep(self) -> bool:
        """Pair all heads, visit each map; whether that changed anything."""
        gained = max([self._pair(tie) for tie in self.spec.ties], default=0.0)
        for part in self.maps:
            both = self._both(part)
            rotation = nearest(both + _STAY * both.norm() * torch.eye(part.each, dtype=both.dtype), part.kind)
            gained = max(gained, float((rotation * both).sum() - both.diagonal(dim1=1, dim2=2).sum()))
            rotate_(self.second, part, rotation)
            if part.name in self.crossed:
                self.crossed[part.name] = self.crossed[part.name] @ rotation.mT
        return gained > 1e-6

    def _pair(self, tie: str) -> float:
        """Put the heads into the order in which they are nearest to model 0's once each is rotated; what that gains."""
        spaces = [self.spec[name] for name in self.spec.ties[tie]]
        parts = [part for part in self.maps if part.tie == tie]
        covered = {part.name for part in parts}
        if spaces[0].blocks < 2 or not parts or any(s.width > s.blocks and s.name not in covered for s in spaces):
            return 0.0  # where other units move with the heads, as the query heads of a group, they stay as given
        scores = torch.zeros((), dtype=torch.float64)
        for part in parts:
            both = self._both(part, True)
            scores = scores + (nearest(both, part.kind) * both).sum((-1, -2))
        order = assign(scores).indices.cpu()
        gain = float(scores[torch.arange(len(order)), order].sum() - scores.diagonal().sum())
        if gain <= 1e-6:
            return 0.0
        moved = {s.name: (order[:, None] * (s.width // s.blocks) + torch.arange(s.width // s.blocks)) for s in spaces}
        self.second = self.spec.permute(self.second, {name: units.reshape(-1) for name, units in moved.items()})
        for part in parts:
            if part.name in self.crossed:
                self.crossed[part.name] = self.crossed[part.name][:, order]
        return gain


def _check(works: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]], spec: PermutationSpec) -> None:
    for m, (work, state) in enumerate(zip(works, states, strict=True)):
        spec.check(state, [name for name, _ in work.named_modules()])
        for name in spec.entries:
            if state[name].shape != states[0][name].shape:
                shapes = tuple(state[name].shape), tuple(states[0][name].shape)
                raise ValueError(f"models: {name} has shape {shapes[0]} in model {m} and {shapes[1]} in model 0")
            if not bool(state[name].isfinite().all()):
                raise ValueError(f"models: {name} of model {m} has NaN or inf")


def _widened(value: Any) -> Any:
    """A batch with its half-precision tensors in float32, as the models are."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.element_size() < 4 else value
    if isinstance(value, Mapping):
        return {key: _widened(item) for key, item in value.items()}
    return [_widened(item) for item in value] if isinstance(value, list | tuple) else value


def _crossed(statistics: Covariance, part: Map, m: int) -> Tensor:
    """(blocks, blocks, n, n) float64: mean products of the units of models 0 and m, as a share of their lengths."""
    mean, covariance = joint_covariance(statistics)
    moment = (covariance + torch.outer(mean, mean)).cpu()
    width, own = part.width, slice(m * part.width, (m + 1) * part.width)
    lengths = moment.diagonal()[:width].sum() * moment.diagonal()[own].sum()
    blocks = moment[:width, own].reshape(part.blocks, part.each, part.blocks, part.each).movedim(2, 1)
    cosines: Tensor = blocks / max(float(lengths) ** 0.5, 1e-300)
    return cosines


def _inputs(batch: Any, device: torch.device) -> Any:
    """A batch as arguments on a device: a tensor, or keyword arguments."""
    return moved(batch[0] if isinstance(batch, list | tuple) and batch else batch, device)


def _check_outputs(works: Sequence[nn.Module], inputs: Any) -> None:
    for m, work in enumerate(works):
        if not all(bool(y.isfinite().all()) for y in law.outputs(work, work.state_dict(), inputs, None)):
            raise ValueError(f"batches: outputs of model {m} on batch 0 are NaN or infinite")


@contextmanager
def _finite_outputs(works: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a model whose outputs are NaN or infinite raises ValueError; a call of it is a batch.

    A covariance takes such entries for 0 and so would hide them.
    """

    def watched(m: int) -> Callable[[nn.Module, Any, Any], None]:
        batches = count()

        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            batch = next(batches)
            if not all(bool(y.isfinite().all()) for y in law.floats(law.primary(output))):
                raise ValueError(f"batches: outputs of model {m} on batch {batch} are NaN or infinite")

        return watch

    handles = [work.register_forward_hook(watched(m)) for m, work in enumerate(works)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changed(model: nn.Module, state: Mapping[str, Tensor], other: Mapping[str, Tensor], inputs: Any) -> float:
    """The largest relative change of the model's outputs from one state to another."""
    before, after = (law.outputs(model, dict(s), inputs, None) for s in (state, other))
    return law.change(before, after)


def _tried(works: Sequence[nn.Module], parts: Sequence[Map], inputs: Any, vectors: Sequence[str] = ()) -> bool:
    """Do random rotations leave all models' outputs as they are? vectors: tensors that get random values before."""
    for work in works:
        generator = torch.Generator().manual_seed(0)
        state = {name: x.detach().clone() for name, x in work.state_dict().items()}
        for name in vectors:
            state[name].copy_(torch.randn(state[name].shape, generator=generator))
        rotated = {name: x.clone() for name, x in state.items()}
        for part in parts:
            drawn = torch.randn(part.blocks, part.each, part.each, generator=generator, dtype=torch.float64)
            rotate_(rotated, part, nearest(drawn, part.kind))
        if not _changed(work, state, rotated, inputs) <= _CHANGE:
            return False
    return True


def _streams(
    works: Sequence[nn.Module], states: Sequence[dict[str, Tensor]], spec: PermutationSpec, inputs: Any
) -> list[Map]:
    """The maps of all streams, whose norms are folded in `states` and in the models."""
    streams, reasons = find_streams(works[0], spec, inputs)
    if not streams:
        found = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "no norm reads one of its spaces"
        raise ValueError(f"spec: no residual stream that is read through norms alone can be rotated ({found})")
    # A layer scale that is nearly 0 in these models is one all the same: vectors are tried with other values.
    vectors = [name for stream in streams for name in stream.vectors(states[0])]
    hint = f"; what if {', '.join(vectors[:3])} are layer scales? Multiply the layers before by them" if vectors else ""
    for work, state in zip(works, states, strict=True):
        for stream in streams:
            stream.fold_(state)
        change = _changed(work, work.state_dict(), state, inputs)
        if not change <= _CHANGE:
            raise ValueError(f"spec: the norms of the stream cannot be folded: outputs change by {change:.1g}{hint}")
        install(work, state)
    maps = [stream.as_map() for stream in streams]
    if not _tried(works, maps, inputs, vectors):
        names = ", ".join(part.name for part in maps)
        raise ValueError(f"spec: rotating {names} changes the outputs; the stream is used elsewhere too{hint}")
    return maps


def _heads(works: Sequence[nn.Module], spec: PermutationSpec, inputs: Any) -> list[Map]:
    """The maps inside heads that keep the function, each of the freest kind that does."""
    with_module = dict(works[0].named_modules())
    left = [part for part in _inside_heads(spec) if all(tap.module in with_module for tap in part.taps)]
    found: dict[str, Map] = {}
    for kind in ("any", "halves", "neighbours"):
        asked = [replace(part, kind=kind) for part in left if kind == "any" or part.each % 2 == 0]
        # All at once where that is right; what stands in one map's way is no reason against the others.
        together = bool(asked) and _tried(works, asked, inputs)
        found |= {part.name: part for part in asked if together or _tried(works, [part], inputs)}
        left = [part for part in left if part.name not in found]
    return list(found.values())


def _inside_heads(spec: PermutationSpec) -> list[Map]:
    """What may be a map inside heads: the units of tied spaces, and dims of heads that no space permutes."""
    maps = []
    for tie, names in spec.ties.items():
        spaces = [spec[name] for name in names]
        blocks = spaces[0].blocks
        for space in spaces:
            if space.width > blocks:
                maps.append(Map(space.name, space.width, blocks, space.axes, space.taps, tie=tie))
        found = [rest for space in spaces for axis in space.axes if (rest := _rest(spec, axis, blocks)) is not None]
        axes = tuple(dict.fromkeys(axis for axis, _ in found))
        sizes = {each for _, each in found}
        if len(sizes) == 1 and (each := sizes.pop()) > 1:
            taps = [Tap(_module(a), "output", -1, a.view, a.at, a.pick, a.part) for a in axes if "weight" in a.tensor]
            maps.append(Map(f"{tie} inside", blocks * each, blocks, axes, tuple(taps), tie=tie))
    return maps


def _module(axis: Axis) -> str:
    return axis.tensor.removesuffix(".weight")


def _rest(spec: PermutationSpec, axis: Axis, blocks: int) -> tuple[Axis, int] | None:
    """The factor of an axis that no space indexes, inside the blocks, and its size; None if there is not just one."""
    head = factors_at(axis)[0]
    if axis.view is None or axis.role != "out" or axis.view[head] != blocks:
        return None
    own = (axis.dim, axis.view, axis.pick, axis.part)
    alike = [a for _, a in spec.entries[axis.tensor] if (a.dim, a.view, a.pick, a.part) == own]
    used = {f for a in alike for f in factors_at(a)} | ({axis.pick[0]} if axis.pick else set())
    rest = [f for f in range(len(axis.view)) if f not in used]
    return (replace(axis, at=(head, rest[0])), axis.view[rest[0]]) if len(rest) == 1 else None
