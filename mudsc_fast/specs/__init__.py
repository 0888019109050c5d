"""Specs of known architectures, and spec_for, which recognises them and traces all others.

To add a family: one file with its function and its FAMILY, and one line in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mudsc_fast.spec import PermutationSpec, shape_of
from mudsc_fast.specs import mlp as _mlp
from mudsc_fast.specs import resnet as _resnet
from mudsc_fast.specs import vgg as _vgg
from mudsc_fast.specs import vit as _vit
from mudsc_fast.specs.examples import example_inputs, randomise, shrunken
from mudsc_fast.specs.family import Family

# The functions take the place of the modules of the same names.
mlp, resnet, vgg, vit = _mlp.mlp, _resnet.resnet, _vgg.vgg, _vit.vit

_FAMILIES: tuple[Family, ...] = (_resnet.FAMILY, _vgg.FAMILY, _vit.FAMILY, _mlp.FAMILY)  # tried in this order

__all__ = ["example_inputs", "mlp", "randomise", "resnet", "shrunken", "spec_for", "vgg", "vit"]


def spec_for(
    model: nn.Module | Mapping[str, Any],
    *,
    heads: int | None = None,
    groups: int | None = None,
    inputs: Any = None,
) -> PermutationSpec:
    """The spec of a model, recognised from its module and tensor names and shapes, or else found by tracing.

    model: a module, a state dict, or {name: shape}. heads, groups: attention heads and GroupNorm groups, which a state
    dict alone does not tell. inputs: for a module of no known family, what it is traced with: a tensor, a tuple of
    arguments or a dict of keyword arguments; a Hugging Face model, on "meta" too, needs none. ValueError says which
    names each family was looked for by, what is not told, or why the model cannot be traced.
    """
    module = model if isinstance(model, nn.Module) else None
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise TypeError(f"model: expected a module or a state dict, got {type(model).__name__}")
    shapes = {name: shape_of(state[name]) for name in state}
    hints = {name: value for name, value in (("heads", heads), ("groups", groups)) if value is not None}
    for family in _FAMILIES:
        spec = family.recognise(shapes, module, hints)
        if spec is not None:
            return spec
    untold = "a state dict cannot be traced"
    if module is not None:
        kwargs = inputs if isinstance(inputs, Mapping) else example_inputs(module) if inputs is None else None
        if inputs is not None and kwargs is None:
            return PermutationSpec.trace(module, inputs)
        if kwargs is not None:
            return PermutationSpec.trace(module, (), kwargs)
        untold = "give inputs, with which it can be traced"
    looked = "; ".join(f"{family.name}: {family.looks_for}" for family in _FAMILIES)
    have = ", ".join(f"{n} {s}" for n, s in list(shapes.items())[:6])
    raise ValueError(
        f"spec_for: no known architecture ({untold}). The model has {have or 'no tensors'}, ... Looked for {looked}"
    )
