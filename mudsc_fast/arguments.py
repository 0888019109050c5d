"""Checks of what `match` is given, and the widths that follow from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mudsc_fast.covariance import Covariance
from mudsc_fast.scalars import check_number, integer
from mudsc_fast.spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spaces import Space

Width = int | float | Mapping[str, int | float]


def check_share(name: str, value: float, top: float | None = 1.0) -> float:
    """The value as a float; ValueError unless 0 <= value <= top (None: no upper limit)."""
    share = check_number(name, value)
    if not 0 <= share <= (sys.float_info.max if top is None else top):
        raise ValueError(f"{name}: expected a number {'in 0..1' if top == 1 else '>= 0 and finite'}, got {value!r}")
    return share


def check_count(name: str, value: int, least: int) -> int:
    """The value as an int; ValueError unless an integer >= least."""
    found = integer(value)
    if found is None or found < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return found


def check_spec(spec: PermutationSpec) -> None:
    """TypeError unless a PermutationSpec."""
    if not isinstance(spec, PermutationSpec):
        raise TypeError(f"spec: expected a PermutationSpec, got {type(spec).__name__}")


def check_plan(plan: MergePlan) -> None:
    """TypeError unless a MergePlan."""
    from mudsc_fast.plan import MergePlan

    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, as `match` gives one, got {type(plan).__name__}")


def two_or_more(state_dicts: Sequence[Mapping[str, Tensor]] | None) -> list[Mapping[str, Tensor]]:
    """The state dicts as a list, if there are at least two."""
    if isinstance(state_dicts, Mapping):
        raise TypeError("state_dicts: expected a sequence of mappings, one a model, got one mapping")
    given = list(state_dicts or ())
    if len(given) < 2:
        raise ValueError(f"state_dicts: expected two or more, got {len(given)}; only balance 0 needs no weights")
    return given


def check_activations(
    activations: Mapping[str, Covariance], spec: PermutationSpec, models: int | None, full: bool
) -> int:
    """The number of models in statistics that fit the spec; `models`: the number expected, where known.

    full: zipped spaces need statistics inside each model too.
    """
    if not isinstance(activations, Mapping):
        raise TypeError(f"activations: expected a mapping of Covariances, got {type(activations).__name__}")
    # Statistics on disk tell their sizes without being read (mudsc_fast.stats_files).
    look = getattr(activations, "info", None)
    for name in activations:
        if name not in spec:
            raise ValueError(f"activations: the spec has no space {name!r}")
        covariance = activations[name] if look is None else look(name)
        if look is None and not isinstance(covariance, Covariance):
            raise TypeError(f"activations: expected a Covariance, got {type(covariance).__name__} for space {name!r}")
        space = spec[name]
        if covariance.width != space.width:
            raise ValueError(
                f"activations: space {name!r} has width {space.width}, its statistics have {covariance.width}"
            )
        models = covariance.models if models is None else models
        if covariance.models != models:
            raise ValueError(f"activations: expected {models} models, got {covariance.models} in space {name!r}")
        if full and space.within == "free" and covariance.scope != "full":
            raise ValueError(
                f"activations: a zip needs statistics of scope 'full', space {name!r} has {covariance.scope!r}; "
                "calibrate with scope='full', or align"
            )
    for space in spec.spaces:
        if space.taps and space.name not in activations:
            raise ValueError(f"activations: no statistics of space {space.name!r}, which has taps; calibrate again")
    if models is None or models < 2:
        raise ValueError(f"activations: expected statistics of two or more models, got {models}")
    return models


def check_start(start: MergePlan, spec: PermutationSpec, models: int, method: str) -> None:
    """TypeError unless a plan, ValueError unless it has the spec's spaces, the method and the number of models."""
    if not hasattr(start, "labels"):
        raise TypeError(f"start: expected a MergePlan, got {type(start).__name__}")
    ours = {space.name: (space.width, space.blocks) for space in spec.spaces}
    theirs = {space.name: (space.width, space.blocks) for space in start.spec.spaces}
    if ours != theirs:
        name = sorted(name for name, _ in set(ours.items()) ^ set(theirs.items()))[0]
        raise ValueError(f"start: its space {name!r} is not that of the spec")
    if start.method != method or start.models != models:
        raise ValueError(
            f"start: expected a plan of method {method!r} for {models} models, got {start.method!r} for {start.models}"
        )


def merged_widths(spec: PermutationSpec, method: str, width: Width | None, models: int) -> dict[str, int]:
    """{space: merged units}; ValueError, naming the space, for a width that it cannot have."""
    result = {space.name: space.width for space in spec.spaces}
    if width is None:
        return result
    if method == "align":
        raise ValueError(f"width: only zip and select change widths, got {width!r} with method {method!r}")
    if isinstance(width, Mapping):
        for name, each in width.items():
            if name not in spec:
                raise ValueError(f"width: the spec has no space {name!r}")
            result[name] = _merged_width(spec[name], each, models)
            if spec[name].within == "fixed" and result[name] != spec[name].width:
                raise ValueError(f"width: space {name!r} is aligned (within='fixed') and keeps {spec[name].width}")
        return result
    for space in spec.spaces:
        if space.within == "free":
            result[space.name] = _merged_width(space, width, models)
    return result


def _merged_width(space: Space, width: int | float, models: int) -> int:
    total = models * space.width
    units = integer(width)
    if units is not None:
        width = units
    elif isinstance(width, bool) or not isinstance(width, float):
        raise TypeError(f"width: expected an int, a float share or a mapping of these, got {width!r}")
    else:
        if not 0 < width <= models:
            raise ValueError(f"width: expected a share in 0..{models} for space {space.name!r}, got {width}")
        width = max(1, round(space.width // space.blocks * width)) * space.blocks
    if not 0 < width <= total:
        raise ValueError(f"width: expected 1..{total} for space {space.name!r}, got {width}")
    if width % space.blocks:
        raise ValueError(f"width: expected a multiple of {space.blocks} blocks for space {space.name!r}, got {width}")
    return width
