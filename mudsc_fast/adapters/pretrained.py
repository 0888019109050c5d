"""Specs of transformers networks, in the names that their tensors have in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mudsc_fast.spec import Axis, PermutationSpec
from mudsc_fast.specs import spec_for

if TYPE_CHECKING:
    from torch import nn


_REMEMBERED = 4
_KNOWN: dict[str, OnDisk] = {}


def empty_network(config: Any) -> nn.Module:
    """The network of a transformers configuration, without weights, on the meta device.

    ValueError if transformers has no class of the configuration's ``architectures``; its own code is never run.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    found: Any = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    if found is None or not (hasattr(found, "from_config") or hasattr(found, "_from_config")):
        raise ValueError(f"transformers {transformers.__version__} has no network {names[0]!r}")
    with torch.device("meta"):
        build = found.from_config if hasattr(found, "from_config") else found._from_config
        network: nn.Module = build(config)
    return network.eval()


def network_spec(network: nn.Module) -> PermutationSpec:
    """The spec of a transformers network by its state dict's names: of its family, or traced with dummy inputs."""
    try:
        return spec_for(network)
    except ValueError:
        pass
    place = next(network.parameters()).device
    inputs: dict[str, Any] = {name: value.to(place) for name, value in _dummy_inputs(network).items()}
    return PermutationSpec.trace(network, (), inputs)


def _dummy_inputs(network: Any) -> dict[str, Any]:
    if getattr(network, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(network.config, "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(2, getattr(network.config, "num_channels", 3), height, width)}
    return dict(network.dummy_inputs)


def on_disk(config: Any) -> OnDisk:
    """The spec of a configuration's network for its checkpoints; remembered, since tracing takes seconds."""
    key = f"{type(config).__name__} {config.architectures} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        while len(_KNOWN) >= _REMEMBERED:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = OnDisk(empty_network(config))
    return _KNOWN[key]


class OnDisk:
    """The spec of a network, for checkpoints that name and keep its tensors in their own ways.

    network: on any device; only names and shapes are read.
    """

    def __init__(self, network: nn.Module) -> None:
        self.spec = network_spec(network)
        self._state = list(network.state_dict())
        self._prefix = str(getattr(network, "base_model_prefix", ""))
        groups: dict[int, list[str]] = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        self._tied = {name: group for group in groups.values() for name in group}
        ends = [m for m in (_part(network, "get_input_embeddings"), _part(network, "get_output_embeddings")) if m]
        weights = {id(parameter) for module in ends for parameter in module.parameters()}
        self._vocabulary = {
            self._bare(name) for name, p in network.state_dict(keep_vars=True).items() if id(p) in weights
        }

    def spec_of(self, names: Iterable[str]) -> PermutationSpec:
        """The spec for a checkpoint with these tensor names, a tied tensor only where it is kept.

        ValueError, naming the tensor, if one that the spec moves is not there under any name that it is known by.
        """
        there = set(names)
        renamed = {name: self._name_in(name, there) for name in self._state}
        spaces = []
        for space in self.spec.spaces:
            axes: list[Axis] = []
            for axis in space.axes:
                name = renamed[axis.tensor]
                if name is not None:
                    axes.append(replace(axis, tensor=name))
                elif not any(renamed[other] for other in self._tied[axis.tensor]):
                    raise ValueError(f"has no tensor {axis.tensor!r}")
            spaces.append(replace(space, axes=tuple(axes)))
        return PermutationSpec(tuple(spaces))

    def is_vocabulary(self, name: str) -> bool:
        """Whether this tensor has a row for each token."""
        return self._bare(name) in self._vocabulary

    def _bare(self, name: str) -> str:
        return name.removeprefix(f"{self._prefix}.")

    def _name_in(self, name: str, there: set[str]) -> str | None:
        prefixed = f"{self._prefix}."
        for candidate in (name, name.removeprefix(prefixed), prefixed + name):
            if candidate in there:
                return candidate
        return None


def _part(network: nn.Module, getter: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(network, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def restricted(spec: PermutationSpec, other: Iterable[str]) -> PermutationSpec:
    """The spec without tensors that another checkpoint lacks (of tied ones some keep one name, some both)."""
    there = set(other)
    return PermutationSpec(
        tuple(replace(space, axes=tuple(a for a in space.axes if a.tensor in there)) for space in spec.spaces)
    )
