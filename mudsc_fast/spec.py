"""The spec of an architecture: which tensor axes must be regrouped together, as frozen data (docs/design.md).

The law every spec obeys: a model regrouped by any random permutation of its spaces computes the same function.
"""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast import law, layout
from mudsc_fast.axes import axis_labels, split_blocks, take
from mudsc_fast.scalars import check_seed
from mudsc_fast.spaces import Axis, Frozen, Space, Tap

Permutation = dict[str, Tensor]


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor (or of anything with a shape), or the shape itself."""
    return tuple(value.shape) if hasattr(value, "shape") else tuple(value)


class Resolved(OrderedDict[tuple[object, ...], Any]):
    """Things that follow from a spec and take time to find; a copy of the spec finds its own."""

    def __reduce__(self) -> tuple[type[Resolved], tuple[()]]:
        return Resolved, ()


@dataclass(frozen=True)
class PermutationSpec:
    """All spaces of an architecture. Raises ValueError, naming the tensor, if they do not fit each other."""

    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.spaces, Sequence) or not all(isinstance(s, Space) for s in self.spaces):
            raise ValueError(f"spaces: expected a sequence of Space, got {self.spaces!r}")
        object.__setattr__(self, "spaces", tuple(self.spaces))
        object.__setattr__(self, "frozen", tuple(self.frozen))
        seen: set[str] = set()
        for space in self.spaces:
            if space.name in seen:
                raise ValueError(f"two spaces have the name {space.name!r}")
            seen.add(space.name)
        for tie, names in self.ties.items():
            blocks = {n: self[n].blocks for n in names}
            if len(set(blocks.values())) > 1:
                raise ValueError(f"tie {tie!r}: its spaces have different numbers of blocks, {blocks}")
        for name in self.entries:
            sizes = self._known_sizes(name)
            if sizes is not None:
                layout.groups(name, self.entries[name], sizes)

    def __iter__(self) -> Iterator[Space]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, name: str) -> Space:
        """The space of this name; KeyError lists the names there are."""
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no space {name!r}; there are {', '.join(self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Space]:
        return {s.name: s for s in self.spaces}

    @cached_property
    def index(self) -> dict[str, int]:
        """{space: its place in spec order}."""
        return {s.name: k for k, s in enumerate(self.spaces)}

    @cached_property
    def entries(self) -> dict[str, tuple[layout.Entry, ...]]:
        """{tensor: its (space, axis) pairs, in spec order}."""
        found: dict[str, list[layout.Entry]] = defaultdict(list)
        for space in self.spaces:
            for axis in space.axes:
                found[axis.tensor].append((space, axis))
        return {name: tuple(e) for name, e in found.items()}

    @cached_property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """{tie: names of its spaces, in spec order}."""
        found: dict[str, list[str]] = defaultdict(list)
        for space in self.spaces:
            if space.tie is not None:
                found[space.tie].append(space.name)
        return {tie: tuple(names) for tie, names in found.items()}

    @cached_property
    def tied(self) -> dict[str, tuple[Space, ...]]:
        """{space: the spaces of its tie, in spec order; itself where it has none}."""
        ties = {tie: tuple(self[name] for name in names) for tie, names in self.ties.items()}
        return {s.name: (s,) if s.tie is None else ties[s.tie] for s in self.spaces}

    @cached_property
    def _neighbours(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, set[str]] = {s.name: set() for s in self.spaces}
        for entries in self.entries.values():
            for space, axis in entries:
                if axis.compare:
                    dims = set(layout.dims_of(axis))
                    for other, b in entries:
                        apart = not dims & set(layout.dims_of(b))
                        if apart or (other is not space and b.pick == axis.pick and b.part == axis.part):
                            found[space.name].add(other.name)
        return {name: tuple(s.name for s in self.spaces if s.name in near) for name, near in found.items()}

    def neighbours(self, space: str) -> tuple[str, ...]:
        """The spaces whose labels enter this space's weight similarity: they share a compared tensor with it.

        A space on two dims of one tensor is its own neighbour.
        """
        return self._neighbours[self[space].name]

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """Names of the tensors that weight similarities read, in spec order."""
        names = (axis.tensor for space in self.spaces for axis in space.axes if axis.compare)
        return tuple(dict.fromkeys(names))

    @cached_property
    def resolved(self) -> Resolved:
        """What is found once for tensors of one kind, and kept with the spec (mudsc_fast.network)."""
        return Resolved()

    def _known_sizes(self, name: str) -> dict[int, int] | None:
        """The size of each dim that the axes of a tensor name, as far as the views tell; None if they do not."""
        sizes: dict[int, int] = {}
        least: dict[int, int] = {}
        for space, axis in sorted(self.entries[name], key=lambda e: len(layout.dims_of(e[1]))):
            dims = layout.dims_of(axis)
            if axis.part is not None:
                least[dims[0]] = max(least.get(dims[0], 0), sum(axis.part))
                continue
            view = axis.view or (space.width,)
            if len(dims) == 1:
                told = {dims[0]: prod(view)}
            elif len(dims) == len(view):
                told = dict(zip(dims, view, strict=True))
            else:
                unknown = [d for d in dims if d not in sizes]
                if len(unknown) > 1:
                    return None
                rest = prod(view) // prod(sizes[d] for d in dims if d in sizes)
                told = dict.fromkeys(unknown, rest)
            for d, size in told.items():
                if sizes.setdefault(d, size) != size:
                    raise ValueError(f"{name} dim {d}: has size {sizes[d]} in one axis and {size} in another")
        for d, size in least.items():
            if sizes.setdefault(d, size) < size:
                raise ValueError(f"{name} dim {d}: a part ends at {size}, past its size {sizes[d]}")
        return sizes

    def groups(self, name: str, shape: Sequence[int]) -> list[layout.Group]:
        """How the spaces lie on the tensor `name` of this shape: its groups of dims (see mudsc_fast.layout)."""
        key = name, tuple(shape)
        if key not in self._groups:
            self._groups[key] = self._find_groups(name, shape)
        return self._groups[key]

    @cached_property
    def _groups(self) -> dict[tuple[str, tuple[int, ...]], list[layout.Group]]:
        return {}

    def _find_groups(self, name: str, shape: Sequence[int]) -> list[layout.Group]:
        entries = self.entries.get(name, ())
        sizes = {}
        for space, axis in entries:
            for d in layout.dims_of(axis):
                if d >= len(shape):
                    raise ValueError(f"{name}: space {space.name!r} names dim {d}, but the shape is {tuple(shape)}")
                sizes[d] = shape[d]
            if axis.view is None and axis.part is None and shape[layout.dims_of(axis)[0]] != space.width:
                raise ValueError(
                    f"{name} dim {axis.dim}: expected the width {space.width} of space {space.name!r}, got shape "
                    f"{tuple(shape)}"
                )
        return layout.groups(name, entries, sizes)

    def check(self, tensors: Mapping[str, Any], modules: Sequence[str] | None = None) -> None:
        """Raise ValueError if the spec names a tensor (or a tap's module) that is missing, or a shape that disagrees.

        tensors: a state dict, or {name: shape}. modules: the names of the model's modules, where known.
        """
        for name in self.entries:
            if name not in tensors:
                near = ", ".join(list(tensors)[:4])
                raise ValueError(f"spec: unknown tensor {name!r}; the model has {near}, ...")
            self.groups(name, shape_of(tensors[name]))
        if modules is not None:
            known = set(modules)
            for space in self.spaces:
                for tap in space.taps:
                    if tap.module not in known:
                        raise ValueError(f"spec: space {space.name!r} is tapped at an unknown module {tap.module!r}")

    def random_permutation(self, seed: int = 0) -> Permutation:
        """{space: (width,) int64}, new unit i is old unit indices[i]; keeps blocks, fixed units and ties.

        No order drawn is the identity where there is another.
        """
        generator = torch.Generator().manual_seed(check_seed(seed))
        of_tie: dict[str, Tensor] = {}
        result = {}
        for space in self.spaces:
            block = law.shuffled(space.blocks, generator)
            if space.tie is not None:
                block = of_tie.setdefault(space.tie, block)
            result[space.name] = law.shuffle(space, block, generator)
        return result

    def permute(self, state_dict: Mapping[str, Tensor], perm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same function in another unit order: a new dict of new tensors; spaces left out stay as they are.

        perm: {space: (width,) int64}, new unit i is old unit indices[i]. ValueError if it does not keep
        blocks, fixed units or ties, or if a tensor is missing or does not fit.
        """
        self.check(state_dict)
        labels = self._labels(perm)
        result = {}
        for name in state_dict:
            tensor = state_dict[name].detach()
            maps = axis_labels(self, name, tensor.shape, labels) if name in self.entries else []
            for part in maps:
                tensor = take(tensor, part.dims, torch.argsort(part.labels))
            result[name] = tensor if maps else tensor.clone()
        return result

    def _labels(self, permutation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(permutation, Mapping):
            raise TypeError(f"perm: expected a mapping from spaces to indices, got {type(permutation).__name__}")
        labels = {}
        for name, indices in permutation.items():
            if name not in self:
                raise ValueError(f"perm: unknown space {name!r}; there are {', '.join(self._by_name)}")
            space, indices = self[name], torch.as_tensor(indices).cpu()
            if indices.dtype.is_floating_point or not torch.equal(
                indices.reshape(-1).sort().values, torch.arange(space.width)
            ):
                raise ValueError(f"permutation of space {name!r}: expected each of 0..{space.width - 1} once")
            labels[name] = torch.empty(space.width, dtype=torch.int64)
            labels[name][indices.long()] = torch.arange(space.width)
            _, inner = split_blocks(space, labels[name], space.width)
            if space.within == "fixed" and not torch.equal(inner, torch.arange(inner.shape[1]).expand_as(inner)):
                raise ValueError(f"permutation of space {name!r}: only whole blocks may move (within='fixed')")
        for tie, names in self.ties.items():
            moved = [split_blocks(self[n], labels[n], self[n].width)[0] for n in names if n in labels]
            if len(moved) < len(names) and moved:
                moved.append(torch.arange(self[names[0]].blocks))
            if any(not torch.equal(m, moved[0]) for m in moved):
                raise ValueError(f"perm: the tied spaces {', '.join(names)} ({tie}) move blocks differently")
        return labels

    def verify_each(
        self, model: nn.Module, inputs: Any, seed: int = 0, select: Callable[[Any], Any] | None = None
    ) -> dict[str, float]:
        """{space, "tie NAME" or "all": largest relative change of the outputs when it is permuted at random}.

        A tied space alone is permuted inside its blocks; the tie as a whole moves its blocks too. inputs: a tensor, a
        tuple of arguments or a dict of keyword arguments. select: the part of the output to compare (by default its
        logits, or all floating tensors where it has none). The model runs in eval mode and is left as it was.
        """
        return law.changes(self, model, inputs, seed, select)

    def verify(
        self,
        model: nn.Module,
        inputs: Any,
        seed: int = 0,
        select: Callable[[Any], Any] | None = None,
        each: bool = True,
    ) -> float:
        """The largest relative change of the outputs over random permutations (see verify_each).

        each: False tries all spaces together only, which is one forward pass instead of one a space.
        """
        return max(law.changes(self, model, inputs, seed, select, each).values(), default=0.0)

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_args: Any = (),
        example_kwargs: Mapping[str, Any] | None = None,
        select: Callable[[Any], Any] | None = None,
    ) -> PermutationSpec:
        """The spec of a model that nobody wrote one for, found by following axes through its exported graph.

        model: on any device, "meta" too; left as it was. example_args, example_kwargs: inputs on this device, no dim of
        size 1 that may be larger in use. select: the part of the output that has to stay the same (by default logits
        alone, where there are). What may not move is in `frozen`. ValueError if torch.export cannot read the model.
        """
        from mudsc_fast.tracing import trace

        return trace(model, example_args, example_kwargs, select)

    def to_json(self) -> str:
        """The spec as JSON text, data only; defaults are left out."""
        return json.dumps({"spaces": [_plain(s) for s in self.spaces], "frozen": [_plain(f) for f in self.frozen]})

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """The spec that to_json wrote; ValueError if it is none."""
        try:
            data = json.loads(text)
            spaces = []
            for s in data["spaces"]:
                axes = tuple(Axis(**a) for a in s.pop("axes"))
                taps = tuple(Tap(**t) for t in s.pop("taps", ()))
                spaces.append(Space(**s, axes=axes, taps=taps))
            return cls(tuple(spaces), tuple(Frozen(**f) for f in data.get("frozen", ())))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the JSON of a PermutationSpec: {error}") from error


def _plain(part: Any) -> dict[str, Any]:
    result = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if f.default is MISSING or value != f.default:
            many = isinstance(value, tuple) and value and isinstance(value[0], (Axis, Tap))
            result[f.name] = [_plain(v) for v in value] if many else value
    return result
