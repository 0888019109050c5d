"""The official module for plain ResNets: its permutation dictionary, and its class with the arguments of one script."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mudsc_fast as mf
from benchmarks.official import OfficialMatch


def get_resnet_perm(num_blocks: Sequence[int] = (3, 3, 3)) -> dict[int, list[list[Any]]]:
    """{id: [[axis, tensor, cfg]]}: a residual stream a layer, and the units inside each block."""

    def made(conv: str, norm: str) -> list[list[Any]]:
        running = [[0, f"{norm}.{name}", {"ignore": None}] for name in ("running_mean", "running_var")]
        return [[0, f"{conv}.weight"], [0, f"{norm}.weight"], [0, f"{norm}.bias"], *running]

    stream = made("conv1", "bn1")
    perms = [stream]
    for layer, count in enumerate(num_blocks, 1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            first = layer > 1 and block == 0
            inner = [*made(f"{at}.conv1", f"{at}.bn1"), [1, f"{at}.conv2.weight", {"in": None}]]
            stream.append([1, f"{at}.conv1.weight", {"in": None}])
            perms.append(inner)
            if first:
                stream.append([1, f"{at}.shortcut.0.weight", {"in": None}])
                stream = made(f"{at}.shortcut.0", f"{at}.shortcut.1")
                perms.append(stream)
            stream += made(f"{at}.conv2", f"{at}.bn2")
    stream.append([1, "linear.weight", {"in": "avgpool"}])
    return dict(enumerate(perms))


class WeightFusion:
    def __init__(self, a: float, b: float, fix_sims: bool, iter: int = 100, fix_rate: float = 0.5) -> None:
        if (a, b, fix_sims) != (0.5, 1, True):
            raise ValueError("only the call of docs/adapters.md is restated")
        self.sweeps, self.fix_rate = iter, fix_rate

    def transform(
        self, nets: list[nn.Module], perm: Mapping[int, Any], act_loader: Iterable[Any], in_weight_space: bool
    ) -> nn.Module:
        states = [net.state_dict() for net in nets]
        spaces = []
        for key, entries in perm.items():
            axes = [
                mf.Axis(name, axis, "in" if "in" in cfg else "out", compare="ignore" not in cfg)
                for axis, name, cfg in ([*entry, {}][:3] for entry in entries)
            ]
            spaces.append(mf.Space(str(key), states[0][axes[0].tensor].shape[0], tuple(axes)))
        match = OfficialMatch(
            states, mf.PermutationSpec(tuple(spaces)), _activations(nets, perm, act_loader), "zip", self.fix_rate
        )
        match.run(self.sweeps)
        result = copy.deepcopy(nets[0])
        result.load_state_dict({k: x.to(states[0][k].dtype) for k, x in match.merge().items()})
        return result


def _activations(nets: list[nn.Module], perm: Mapping[int, Any], loader: Iterable[Any]) -> dict[str, Tensor]:
    """Correlations at the last module that reads the units of each permutation."""
    seen: dict[str, list[list[Tensor]]] = {str(key): [[] for _ in nets] for key in perm}
    handles = []
    for m, net in enumerate(nets):
        modules = dict(net.named_modules())
        for key, entries in perm.items():
            name, cfg = [(entry[1], entry[2]) for entry in entries if len(entry) > 2 and "in" in entry[2]][-1]
            place = modules[cfg["in"] or name.rpartition(".")[0]]

            def keep(module: nn.Module, inputs: Any, own: list[Tensor] = seen[str(key)][m]) -> None:
                own.append(inputs[0].transpose(0, 1).flatten(1))

            handles.append(place.register_forward_pre_hook(keep))
    with torch.no_grad():
        for inputs, _ in loader:
            for net in nets:
                net(inputs)
    for handle in handles:
        handle.remove()
    return {key: torch.corrcoef(torch.cat([torch.cat(own, 1) for own in each])) for key, each in seen.items()}
