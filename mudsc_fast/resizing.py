"""Which spaces a module can have in another width: found by trying, since a spec does not know what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mudsc_fast.agreeing import outputs
from mudsc_fast.arguments import check_spec
from mudsc_fast.counts import can_resize, doubled
from mudsc_fast.installing import installed
from mudsc_fast.plan import MergePlan

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the largest output; a wrong size or scale changes more
_COARSE = 0.03  # of types with fewer digits


def resizable_spaces(model: nn.Module, spec: PermutationSpec, inputs: Any) -> list[str]:
    """The spaces whose width may change in this module, in spec order.

    Each space that the spec lets change is tried: the module with every unit of it twice (and its readers' weights
    halved) has to run and give the same outputs. So spaces are left out whose sizes are written down in the module
    (heads that are reshaped by a number, grouped convolutions) or enter what it computes (the scale of attention).

    model: left as it was; copied once a space. spec: its spaces. inputs: one batch, as for `calibrate`.

    Raises ValueError or TypeError for a spec that does not fit, and whatever the module itself raises on the inputs.
    """
    check_spec(spec)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    state = model.state_dict()
    spec.check(state)
    wanted = outputs(model, [inputs])
    tolerance = max(
        (_TOLERANCE.get(x.dtype, _COARSE) for x in state.values() if x.is_floating_point()), default=_COARSE
    )
    limit = tolerance * float(wanted.abs().max().clamp(min=1e-30))
    kept = {space.name: torch.arange(space.width).repeat(2, 1) for space in spec.spaces}
    found = []
    for space in spec.spaces:
        if not can_resize(space, spec, state):
            continue
        plan = MergePlan(spec, {**kept, space.name: doubled(space, 2)}, "zip")
        try:
            own = outputs(installed(model, plan.merge([state, state])), [inputs])
        except Exception:  # noqa: BLE001 - whatever a module raises, in this width it cannot run
            continue
        if own.shape == wanted.shape and float((own - wanted).abs().max()) <= limit:
            found.append(space.name)
    return found
