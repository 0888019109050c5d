"""Specs of transformers networks, in the names that their tensors have in a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint
from mudsc_fast.checkpoints.stacked import Blocks, blocks_of, scaled
from mudsc_fast.spaces import Axis
from mudsc_fast.spec import PermutationSpec
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
        self._network = network
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

    def seen_in(self, checkpoint: Checkpoint) -> Checkpoint | StackedCheckpoint:
        """The checkpoint by the network's names, if it stores one by one what the network stacks; else itself."""
        if all(name in checkpoint for name in self._state if len(self._tied[name]) == 1):
            return checkpoint
        found = stacked_as(self._network, [checkpoint])
        return checkpoint if found is None else found[0]

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


def stacked_as(network: nn.Module, checkpoints: Sequence[Checkpoint]) -> list[StackedCheckpoint] | None:
    """The checkpoints by the network's names, where transformers stacks what their files hold one by one.

    None if the tensors do not correspond to the network's in a known way; ValueError if the shapes do not.
    """
    first = checkpoints[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        blocks = dict(blocks_on_disk(network))
    except Exception:  # noqa: BLE001 (not a public function of transformers: whatever it raises, it does not tell)
        return None
    for name in [n for n, parts in blocks.items() if not any(part.name in first for part in parts)]:
        if any(twin in blocks for twin in twins(network, name)):
            del blocks[name]
    if {part.name for parts in blocks.values() for part in parts} != set(first):
        return None
    return [StackedCheckpoint(checkpoint, blocks, shapes) for checkpoint in checkpoints]


def blocks_on_disk(network: nn.Module) -> Blocks:
    """Which part of which tensor of the network each tensor on disk is; small stand-ins go through the conversion."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    large = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    small = {name: tuple(_smaller(size) for size in shape) for name, shape in large.items()}
    starts, numbered, start = {}, {}, 0
    for name, shape in small.items():
        count = torch.Size(shape).numel()
        starts[name], numbered[name] = start, torch.arange(start, start + count).reshape(shape)
        start += count
    return scaled(blocks_of(loading.revert_weight_conversion(network, numbered), small, starts), small, large)


def twins(network: nn.Module, name: str) -> list[str]:
    """The other names of a tied tensor."""
    state = network.state_dict(keep_vars=True)
    return [other for other, tensor in state.items() if other != name and tensor is state[name]]


def _smaller(size: int) -> int:
    """A divisor of the size that is small but can be halved as often, for equal parts."""
    while size > 128 and size % 2 == 0:
        size //= 2
    return size
