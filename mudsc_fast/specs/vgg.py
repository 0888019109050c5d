"""VGG: a chain of convolutions, with or without BatchNorm, flattened into a chain of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs.family import Family, Shapes, covers, norm_axes, numbers, produced

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    config: int | Sequence[int | str] = 16,
    batch_norm: bool = False,
    width: int = 64,
    hidden: Sequence[int] = (4096, 4096),
    spatial: int = 49,
) -> PermutationSpec:
    """The spec of a VGG with torchvision's names: features.N and classifier.0, .3, .6.

    config: 11, 13, 16 or 19 (stages of width, 2, 4, 8 and 8 times width), or the list of channels with "M" for a
    pooling. hidden: units of the classifier's hidden layers. spatial: positions of the last feature map, which the
    classifier's first layer reads flattened.
    """
    if isinstance(config, int):
        if config not in _STAGES:
            raise ValueError(f"config: expected one of {', '.join(map(str, _STAGES))} or a list, got {config}")
        config = [
            c
            for count, times in zip(_STAGES[config], (1, 2, 4, 8, 8), strict=True)
            for c in [width * times] * count + ["M"]
        ]
    layers: list[tuple[str, int]] = []
    norms: list[str | None] = []
    place = 0
    for channels in config:
        if isinstance(channels, int):
            layers.append((f"features.{place}", channels))
            norms.append(f"features.{place + 1}" if batch_norm else None)
            place += 3 if batch_norm else 2
        else:
            place += 1
    convs = len(layers)
    layers += [(f"classifier.{3 * i}", units) for i, units in enumerate(hidden)]
    norms += [None] * len(hidden)
    return _build(layers, norms, convs, f"classifier.{3 * len(hidden)}", spatial, lambda name: True)


def _build(
    layers: Sequence[tuple[str, int]],
    norms: Sequence[str | None],
    convs: int,
    head: str,
    spatial: int,
    has: Callable[[str], bool],
) -> PermutationSpec:
    """layers: (name, units) of all but the last, the first `convs` of them convolutions."""
    spaces = []
    names = [*(name for name, _ in layers), head]
    for i, (name, width) in enumerate(layers):
        axes = produced([f"{name}.weight", f"{name}.bias"], has)
        norm = norms[i]
        axes += norm_axes(norm, has) if norm is not None else []
        after = names[i + 1]
        if i == convs - 1 and spatial > 1:  # flattened (channels, positions)
            view = (width, spatial)
            axes.append(Axis(f"{after}.weight", 1, "in", view, 0))
            tap = Tap(after, "input", -1, view, 0)
        else:
            axes.append(Axis(f"{after}.weight", 1, "in"))
            tap = Tap(after, "input", 1 if i < convs - 1 else -1)
        spaces.append(Space(name, width, tuple(axes), (tap,)))
    return PermutationSpec(tuple(spaces))


def recognise(shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int]) -> PermutationSpec | None:
    """features.N, convolutions one after the other, then linear layers, and every tensor accounted for."""
    # Files list their tensors by the alphabet: classifier before features, 10 before 2.
    modules = sorted(
        dict.fromkeys(n.rpartition(".")[0] for n in shapes), key=lambda n: (n[:9] != "features.", numbers(n))
    )
    layers: list[tuple[str, int]] = []
    norms: list[str | None] = []
    convs, before, spatial = 0, 0, 1
    for name in modules:
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 4 and name.startswith("features.") and convs == len(layers):
            if layers and shape[1] != before:
                return None
            convs += 1
        elif len(shape) == 2 and name.startswith("classifier") and convs:
            if len(layers) == convs:
                spatial, left = divmod(shape[1], before)
                if left or not spatial:
                    return None
            elif shape[1] != before:
                return None
        elif f"{name}.running_mean" in shapes and shape == (before,) and norms and norms[-1] is None:
            norms[-1] = name
            continue
        else:
            return None
        layers.append((name, shape[0]))
        norms.append(None)
        before = shape[0]
    if not convs or len(layers) == convs or norms[-1] is not None:
        return None
    (head, _) = layers.pop()
    spec = _build(layers, norms[:-1], convs, head, spatial, shapes.__contains__)
    return spec if covers(spec, shapes, [head]) else None


FAMILY = Family(
    "vgg",
    "features.0.weight, features.N.weight, ... (a chain of convolutions, BatchNorms after them) and "
    "classifier.0.weight, classifier.N.weight",
    recognise,
)
