"""Small architectures with their specs and inputs, on which the pipeline is compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from golden_models import CHANNELS, GroupedAttention, grouped_spec
from networks import MLP, ResNet, ViT, randomise_norms
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast import matching, specs


@dataclass(frozen=True)
class Architecture:
    """How to make a network of a seed, its spec, and the shape of one input."""

    build: Callable[[int], nn.Module]  # of a seed, after torch.manual_seed(seed)
    spec: mf.PermutationSpec
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def models(self, count: int, seed: int = 0) -> list[nn.Module]:
        """Networks of different random weights, norms and statistics, in eval mode."""
        made = []
        for k in range(count):
            torch.manual_seed(1000 * seed + k)
            model = randomise_norms(self.build(1000 * seed + k), seed=1000 * seed + k)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.uniform_(parameter, 0, 0.5)  # few dead units, whose order is free
            made.append(model.eval())
        return made

    def permuted(self, model: nn.Module, seed: int) -> nn.Module:
        """The same function in another unit order."""
        other = self.build(0).eval()
        other.load_state_dict(self.spec.permute(model.state_dict(), self.spec.random_permutation(seed)))
        return other

    def batches(self, count: int = 2, size: int = 24, seed: int = 5) -> list[Tensor]:
        """Inputs for calibration."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, *self.shape, generator=generator, dtype=self.dtype) for _ in range(count)]


def without_taps(spec: mf.PermutationSpec, names: Collection[str]) -> mf.PermutationSpec:
    """The spec with some spaces' taps taken away."""
    return mf.PermutationSpec(tuple(replace(s, taps=() if s.name in names else s.taps) for s in spec.spaces))


def _attention(within: str) -> Architecture:
    # Query heads have no tap: the only port that shows them, the output projection's input, has the value dimensions as
    # samples, and these are paired between models only after the values are matched.
    spec = without_taps(grouped_spec(within), ["queries"])
    return Architecture(GroupedAttention, spec, (3, CHANNELS), torch.float64)


ARCHITECTURES = {
    "mlp": Architecture(lambda _: MLP(7, (10, 9), 4), specs.mlp((10, 9)), (7,)),
    "resnet": Architecture(
        lambda _: ResNet((1, 1), 5, channels=2, num_outputs=4), specs.resnet((1, 1), 5, stem="cifar"), (2, 6, 6)
    ),
    "groupnorm": Architecture(
        lambda _: ResNet((1,), 6, norm="group", groups=3, channels=2, num_outputs=4),
        specs.resnet((1,), 6, norm="group", groups=3, stem="cifar"),
        (2, 6, 6),
    ),
    "vit": Architecture(
        lambda _: ViT(4, 2, 2, width=6, depth=1, num_heads=3, hidden=8, num_outputs=4),
        specs.vit(depth=1, width=6, heads=3, hidden=8),
        (2, 4, 4),
    ),
    "attention": _attention("free"),
    "rope": _attention("fixed"),
}


def op_by_op(*arguments: Any, **options: Any) -> mf.MergePlan:
    """`match` with an op a step, where visits would be single calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "network_of", lambda *_: None)
        return mf.match(*arguments, **options)


def assert_same(quick: mf.MergePlan, plain: mf.MergePlan) -> None:
    """The same labels, and the same values up to rounding."""
    for space, labels in plain.labels.items():
        assert torch.equal(quick.labels[space], labels), space
    assert quick.values == pytest.approx(plain.values, rel=1e-12, abs=1e-15)
    assert quick.history == pytest.approx(plain.history, rel=1e-12, abs=1e-15)
