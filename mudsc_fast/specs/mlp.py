"""Multi-layer perceptrons: a chain of linear layers, each hidden layer a space."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs.family import Family, Shapes, covers, norm_axes, numbers, produced


def mlp(
    widths: Sequence[int],
    layers: Sequence[str] | None = None,
    norms: Sequence[str | None] | None = None,
    bias: bool = True,
    norm: str = "batch",
) -> PermutationSpec:
    """The spec of an MLP: one space a hidden layer, named after the layer that produces it.

    widths: units of each hidden layer. layers: names of all linear layers, one more than widths; by default fc1, fc2,
    ..., head. norms: the name of the norm that follows each hidden layer, or None. bias: the layers have one.
    norm: "batch" or "layer".
    """
    names = list(layers) if layers is not None else [*(f"fc{i + 1}" for i in range(len(widths))), "head"]
    if len(names) != len(widths) + 1:
        raise ValueError(f"layers: expected {len(widths) + 1} names, one more than widths, got {len(names)}")
    after = list(norms) if norms is not None else [None] * len(widths)
    if len(after) != len(widths):
        raise ValueError(f"norms: expected {len(widths)} names, one a hidden layer, got {len(after)}")
    if norm not in ("batch", "layer"):
        raise ValueError(f"norm: expected 'batch' or 'layer', got {norm!r}")
    biases = set() if bias else {f"{name}.bias" for name in names}
    return _build(widths, names, after, lambda name: name not in biases and (norm == "batch" or "running" not in name))


def _build(
    widths: Sequence[int], layers: Sequence[str], norms: Sequence[str | None], has: Callable[[str], bool]
) -> PermutationSpec:
    spaces = []
    for i, width in enumerate(widths):
        axes = [Axis(f"{layers[i]}.weight", 0, "out"), *produced([f"{layers[i]}.bias"], has)]
        after = norms[i]
        if after is not None:
            axes += norm_axes(after, has)
        axes.append(Axis(f"{layers[i + 1]}.weight", 1, "in"))
        spaces.append(Space(layers[i], width, tuple(axes), (Tap(layers[i + 1], "input", -1),)))
    return PermutationSpec(tuple(spaces))


def _stem(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def recognise(shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int]) -> PermutationSpec | None:
    """A chain of at least two linear layers, the hidden ones alike but for a rising number, and their norms."""
    return _recognise_in_order(shapes) or _recognise_in_order(_by_number(shapes))


def _by_number(shapes: Shapes) -> Shapes:
    """Files list their tensors by the alphabet: here by number, a norm after its layer, the layer without one last."""

    def place(name: str) -> tuple[bool, tuple[int, ...], bool, str]:
        layer = name.rpartition(".")[0]
        return not numbers(layer), numbers(layer), len(shapes.get(f"{layer}.weight", ())) != 2, name

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def _recognise_in_order(shapes: Shapes) -> PermutationSpec | None:
    linear = [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]
    others = list(dict.fromkeys(n.rpartition(".")[0] for n in shapes if n.rpartition(".")[0] not in linear))
    if len(linear) < 2 or len({_stem(n) for n in linear[:-1]}) > 1 or any(len(s) > 2 for s in shapes.values()):
        return None
    rising = [numbers(n) for n in linear[:-1]]
    if rising != sorted(rising) or (len(linear) > 2 and not all(rising)):
        return None
    widths = [shapes[f"{n}.weight"][0] for n in linear[:-1]]
    if any(shapes[f"{n}.weight"][1] != w for n, w in zip(linear[1:], widths, strict=True)):
        return None
    order = list(dict.fromkeys(n.rpartition(".")[0] for n in shapes))
    norms: list[str | None] = [None] * len(widths)
    for name in others:
        place = order.index(name)
        before = sum(order.index(n) < place for n in linear) - 1
        if not 0 <= before < len(widths) or norms[before] is not None:
            return None
        sizes = {s for n, s in shapes.items() if n.rpartition(".")[0] == name and s}
        if sizes != {(widths[before],)}:
            return None
        norms[before] = name
    spec = _build(widths, linear, norms, shapes.__contains__)
    return spec if covers(spec, shapes, linear[-1:]) else None


FAMILY = Family(
    "mlp",
    "a chain of 2-d weights such as fc1.weight, fc2.weight, ..., head.weight (hidden layers numbered), nothing else "
    "but biases and norms of the hidden layers",
    recognise,
)
