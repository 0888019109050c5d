"""A spec is found from a checkpoint file as from the network: files keep no order of tensors but the alphabet's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
from safetensors.torch import save_file
from torch import nn

import mudsc_fast as mf
from mudsc_fast.checkpoints import open_checkpoint


def with_norms() -> nn.Module:
    layers: list[tuple[str, nn.Module]] = []
    for i in range(1, 12):
        layers += [(f"fc{i}", nn.Linear(6, 6)), (f"bn{i}", nn.BatchNorm1d(6)), (f"relu{i}", nn.ReLU())]
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(6, 2))]))


def sequential() -> nn.Module:
    hidden = [layer for _ in range(12) for layer in (nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(5, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "mlp": (lambda: networks.MLP(widths=(8, 9)), {}),
    "deep mlp": (lambda: networks.MLP(widths=(8,) * 12), {}),
    "norms": (with_norms, {}),
    "sequential": (sequential, {}),
    "vgg": (networks.VGG, {}),
    "resnet": (lambda: networks.ResNet(blocks=(1, 2), width=8), {}),
    "deep resnet": (lambda: networks.ResNet(blocks=(12, 1), width=4, block="bottleneck"), {}),
    "vit": (lambda: networks.ViT(depth=12, width=16), {"heads": 4}),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_file_gives_the_networks_spec(tmp_path: Path, name: str) -> None:
    build, hints = NETWORKS[name]
    model = build()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = mf.spec_for(open_checkpoint(tmp_path / "a.safetensors").meta(), **hints)
    expected = mf.spec_for(model)
    # The order of the spaces counts too: the matching draws them by their place.
    assert found == expected
