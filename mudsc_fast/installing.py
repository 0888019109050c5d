"""A state dict of other widths put into a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def installed(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that holds these tensors; widths may differ from its own, which `load_state_dict` refuses.

    Layer norms and group norms follow the width of their weights.
    """
    network = copy.deepcopy(model)
    install(network, state_dict)
    return network


def install(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """The same in place. The tensors become the module's own and are not shared with the state dict."""
    own = network.state_dict(keep_vars=True)
    for name, tensor in state_dict.items():
        own[name].data = tensor.detach().clone()
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.LayerNorm) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            module.num_channels = len(weight)
