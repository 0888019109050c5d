"""Residual streams that every reader reads through a norm: found, and freed of the norms' own factors."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.batches import evaluation, feed, home
from mudsc_fast.hooks import first_tensor
from mudsc_fast.layout import dims_of
from mudsc_fast.orthogonal import Map
from mudsc_fast.spaces import Axis, Tap

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec


@dataclass(frozen=True)
class Norm:
    """A norm of the stream. offset: what is added to its weight (1 in Gemma). centred: it takes the mean away.

    readers: the axes that read what it gives.
    """

    module: str
    offset: float
    centred: bool
    readers: tuple[Axis, ...]


@dataclass(frozen=True)
class Stream:
    """A space that may be rotated once its norms are folded: their factors and shifts moved into their readers."""

    space: Space
    norms: tuple[Norm, ...]

    @property
    def writers(self) -> list[Axis]:
        norms = {f"{norm.module}.{end}" for norm in self.norms for end in ("weight", "bias")}
        return [axis for axis in self.space.axes if axis.role == "out" and axis.tensor not in norms]

    def vectors(self, state: Mapping[str, Tensor]) -> list[str]:
        """Writers that are one number a unit and no layer's bias: added, as a class token, or a layer scale."""
        names = [axis.tensor for axis in self.writers if state[axis.tensor].dim() == 1]
        return [name for name in names if not name.endswith(".bias")]

    def as_map(self) -> Map:
        """What is rotated, of folded models, seen where it is normalised."""
        axes = (*self.writers, *(axis for norm in self.norms for axis in norm.readers))
        taps = tuple(Tap(norm.module, "output", -1) for norm in self.norms)
        kind = "mean" if any(norm.centred for norm in self.norms) else "any"
        return Map(self.space.name, self.space.width, 1, axes, taps, kind)

    def fold_(self, state: MutableMapping[str, Tensor]) -> None:
        """The same function with every norm's factor at 1 and shift at 0, in place.

        Where a norm takes the mean over the units away, the writers no longer write one.
        """
        for norm in self.norms:
            weight, bias = state[f"{norm.module}.weight"], state.get(f"{norm.module}.bias")
            for axis in norm.readers:
                reader = state[axis.tensor].movedim(dims_of(axis)[0], -1)
                if bias is not None:
                    into = _bias(axis.tensor)
                    state[into] += reader @ bias
                reader *= weight + norm.offset
            weight.fill_(1.0 - norm.offset)
            if bias is not None:
                bias.zero_()
        if any(norm.centred for norm in self.norms):
            for axis in self.writers:
                state[axis.tensor] -= state[axis.tensor].mean(axis.dim, keepdim=True)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def find_streams(model: nn.Module, spec: PermutationSpec, batch: Any) -> tuple[list[Stream], dict[str, str]]:
    """The spaces that are streams behind norms, and why each other space that has norms is none."""
    modules = dict(model.named_modules())
    state = model.state_dict()
    reasons: dict[str, str] = {}
    candidates = {}
    for space in spec.spaces:
        vectors = [a.tensor for a in space.axes if a.role == "out" and state[a.tensor].dim() == 1]
        norms = [name.removesuffix(".weight") for name in vectors if name.endswith(".weight")]
        reading = [a for a in space.axes if a.role == "in"]
        if norms and reading and space.tie is None:
            candidates[space.name] = space, norms, reading
    sources = _sources(model, batch, {n for _, ns, _ in candidates.values() for n in ns}, candidates)
    found = []
    for name, (space, norms, reading) in candidates.items():
        try:
            twice = _tied(model, space)
            if twice is not None:
                raise ValueError(
                    f"{twice[0]} and {twice[1]} are one tensor, which folding a norm would take apart; untie them "
                    "first, with transformers by tie_word_embeddings=False and a copy of the weight"
                )
            found.append(_stream(space, norms, reading, modules, state, sources))
        except ValueError as error:
            reasons[name] = str(error)
    return found, reasons


def _sources(
    model: nn.Module, batch: Any, norms: set[str], candidates: Mapping[str, Any]
) -> dict[str, set[str | None]]:
    """{module: the norms whose output it is called with; None for anything else}, seen in one forward pass."""
    readers = {axis.tensor.rpartition(".")[0] for _, _, reading in candidates.values() for axis in reading}
    alive: list[Tensor] = []  # so that no storage is used twice
    made: dict[int, str] = {}
    seen: dict[str, set[str | None]] = {}
    handles = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = first_tensor(output)
            if x is not None:
                alive.append(x)
                made[x.untyped_storage().data_ptr()] = name

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_tensor((args, kwargs))
            source = None if x is None else made.get(x.untyped_storage().data_ptr())
            seen.setdefault(name, set()).add(source)

        return hook

    try:
        for name, module in model.named_modules():
            if name in norms:
                handles.append(module.register_forward_hook(after(name)))
            if name in readers:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        with evaluation([model]):
            feed(model, batch, home(model))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _stream(
    space: Space,
    norms: list[str],
    reading: list[Axis],
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    sources: Mapping[str, set[str | None]],
) -> Stream:
    readers: dict[str, list[Axis]] = {name: [] for name in norms}
    for axis in reading:
        name = axis.tensor.rpartition(".")[0]
        found = sources.get(name, set())
        source = next(iter(found), None)
        if len(found) != 1 or source is None or source not in readers or axis.view or axis.part:
            raise ValueError(f"{name} does not read what one norm gives")
        readers[source].append(axis)
    made = []
    for name, axes in readers.items():
        if not axes:
            raise ValueError(f"{name} is no norm that linear layers read (a norm on the stream itself, or a scale)")
        centred, offset = _kind(name, modules[name])
        if f"{name}.bias" in state and not all(_bias(a.tensor) in state and state[a.tensor].dim() == 2 for a in axes):
            raise ValueError(f"{name} has a shift, and a layer that reads it has none that could take it up")
        made.append(Norm(name, offset, centred, tuple(axes)))
    stream = Stream(space, tuple(made))
    for axis in stream.writers:
        if axis.view or axis.part or len(dims_of(axis)) > 1:
            raise ValueError(f"{axis.tensor} has its units on a part of a dim")
    return stream


def _kind(name: str, module: nn.Module) -> tuple[bool, float]:
    """Whether a norm takes the mean away, and what is added to its weight; by what it gives for random numbers."""
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} is a scale and no norm")
    factor = weight.detach().double()
    x = 10 * torch.randn(8, len(factor), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = module(x.to(weight)).double()
    x = x.to(factor)
    for centred in (False, True):
        z = x - x.mean(-1, keepdim=True) if centred else x
        z = z / z.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            wanted = z * (factor + offset) + (0.0 if bias is None else bias.detach().double())
            if float((y - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max()):
                return centred, offset
    raise ValueError(f"{name} ({type(module).__name__}) is neither a layer norm nor an RMS norm")


def _tied(model: nn.Module, space: Space) -> tuple[str, str] | None:
    """Two names of one tensor of the space, of which one layer reads the stream and one writes it; None without."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(name)
    modules, touched = dict(model.named_modules()), {axis.tensor for axis in space.axes}
    for names in owners.values():
        reading = [n for n in names if isinstance(modules.get(n.rpartition(".")[0]), nn.Linear)]
        others = [n for n in names if n not in reading]
        if reading and others and touched & set(names):
            return others[0], reading[0]
    return None
