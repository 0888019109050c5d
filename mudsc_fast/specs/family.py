"""What a family of architectures offers to spec_for, and small helpers to write its axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from mudsc_fast.spaces import Axis
from mudsc_fast.spec import PermutationSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """name: of the family. looks_for: the names and shapes by which it is recognised, for error messages.

    recognise: (shapes of the state dict, the module or None, hints such as {"heads": 12}) -> its spec, or None if it is
    another family; ValueError if it is this family, but the spec needs to know more.
    """

    name: str
    looks_for: str
    recognise: Callable[[Shapes, nn.Module | None, Mapping[str, int]], PermutationSpec | None]


def produced(names: Iterable[str], has: Callable[[str], bool]) -> list[Axis]:
    """Dim 0 of the tensors that the model has, role "out"."""
    return [Axis(name, 0, "out") for name in names if has(name)]


def norm_axes(prefix: str, has: Callable[[str], bool]) -> list[Axis]:
    """The axes of a norm layer: weight and bias, and running statistics, which are moved but not compared."""
    axes = produced((f"{prefix}.weight", f"{prefix}.bias"), has)
    statistics = (f"{prefix}.running_mean", f"{prefix}.running_var")
    return axes + [Axis(name, 0, "out", compare=False) for name in statistics if has(name)]


def covers(spec: PermutationSpec, shapes: Shapes, outputs: Iterable[str]) -> bool:
    """Does the spec fit the tensors and name all of them, but counters and the biases of the output layers?"""
    free = {f"{name}.bias" for name in outputs}
    if any(s and n not in spec.entries and n not in free for n, s in shapes.items()):
        return False
    try:
        spec.check(shapes)
    except ValueError:
        return False
    return True


def numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name, by which modules stand in order."""
    return tuple(int(digits) for digits in re.findall(r"\d+", name))


def norm_blocks(norms: Iterable[str], has: Callable[[str], bool], module: nn.Module | None, groups: int) -> int:
    """The blocks that the norms of one space force on it: its GroupNorms' groups, 1 under BatchNorm.

    groups: what a GroupNorm has where there is no module to ask (0: unknown). ValueError if they disagree or if a
    state dict alone cannot tell.
    """
    layers = dict(module.named_modules()) if module is not None else {}
    found: dict[str, int] = {}
    for name in norms:
        if has(f"{name}.running_mean") or not has(f"{name}.weight"):
            continue
        layer = layers.get(name)
        found[name] = layer.num_groups if isinstance(layer, nn.GroupNorm) else groups
        if found[name] < 1:
            raise ValueError(
                f"{name}: a norm without running statistics; a state dict does not tell its number of groups, give "
                "the module or write the spec with groups=..."
            )
    if len(set(found.values())) > 1:
        raise ValueError(f"the GroupNorms of one space have different numbers of groups: {found}")
    return next(iter(found.values()), 1)
