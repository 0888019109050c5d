"""Specs of known architectures, and spec_for, which recognises them.

To add a family: one file with its function and its FAMILY, and one line in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs import mlp as _mlp
from mudsc_fast.specs import resnet as _resnet
from mudsc_fast.specs.family import Family

_FAMILIES: tuple[Family, ...] = (_resnet.FAMILY, _mlp.FAMILY)  # in the order in which they are tried

mlp, resnet = _mlp.mlp, _resnet.resnet

__all__ = ["mlp", "resnet", "spec_for"]


def spec_for(model: nn.Module | Mapping[str, Any]) -> PermutationSpec:
    """The spec of a model of a known family, recognised from its module and tensor names and shapes.

    model: a module, a state dict, or {name: shape}. ValueError says which names each family was looked for by.
    """
    module = model if isinstance(model, nn.Module) else None
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    for family in _FAMILIES:
        spec = family.recognise(shapes, module)
        if spec is not None:
            return spec
    looked = "; ".join(f"{family.name}: {family.looks_for}" for family in _FAMILIES)
    have = ", ".join(f"{n} {s}" for n, s in list(shapes.items())[:6])
    raise ValueError(f"spec_for: no known architecture. The model has {have or 'no tensors'}, ... Looked for {looked}")
