"""The official MuDSC module: ``WeightFusion(...).transform(...)`` with its permutation dictionaries and metrics.

A script of the published code runs after changing its import to ``from mudsc_fast.adapters import mudsc``. What differs
is in docs/adapters.md: the corrections of docs/method.md, of which ``tie_heads=False`` takes one back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast.adapters import zipit
from mudsc_fast.adapters.matrices import merge_and_unmerge
from mudsc_fast.adapters.mudsc_perms import (
    IGNORE_CFG,
    IN_CFG,
    LINEAR_IN_CFG,
    Perms,
    Seen,
    Translated,
    act_module_cfg,
    get_resnet_perm,
    get_resnet_perm_group,
    get_swin_perm,
    get_vit_clip_perm,
    get_vit_perm,
    group_cfg,
    split_dim_cfg,
    translate,
)
from mudsc_fast.averaging import expressed_tensors
from mudsc_fast.calibration import ActivationStats
from mudsc_fast.covariance import Covariance
from mudsc_fast.matching import match
from mudsc_fast.plan import MergePlan
from mudsc_fast.progress import bar
from mudsc_fast.spaces import Axis, Space
from mudsc_fast.spec import PermutationSpec

__all__ = [
    "IGNORE_CFG",
    "IN_CFG",
    "LINEAR_IN_CFG",
    "RESHAPE_FUNC",
    "CorrelationMetric",
    "CovarianceMetric",
    "WeightFusion",
    "act_module_cfg",
    "get_resnet_perm",
    "get_resnet_perm_group",
    "get_swin_perm",
    "get_vit_clip_perm",
    "get_vit_perm",
    "group_cfg",
    "split_dim_cfg",
]

_TWIN = "\N{MINUS SIGN}"


def _heads() -> Callable[[Tensor], Tensor]:
    """(batch, heads, tokens, dims) to (batch, heads * dims, tokens)."""
    return lambda x: x.transpose(2, 3).flatten(1, 2)


def _grouped_channels(group: int) -> Callable[[Tensor], Tensor]:
    """(batch, groups * units, ...) to (batch, units, samples): the groups' units are samples of the same units."""
    return lambda x: x.reshape(len(x), group, -1, *x.shape[2:]).transpose(1, 2).flatten(2)


# Reshapes that an act_module may name; a script may add its own.
RESHAPE_FUNC: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "norm_qk": _heads,
    "group_conv": _grouped_channels,
}


class CovarianceMetric:
    """The official streaming metric: ``update(*feats)``, one (batch, channels, ...) tensor a model."""

    def __init__(self) -> None:
        self._metric = zipit.CorrelationMetric()

    def update(self, *feats: Tensor, **aux_params: Any) -> None:
        """Add a batch; every position of every item counts once."""
        self._metric.update(0, *(f.transpose(0, 1).flatten(1) if f.dim() > 1 else f[:, None] for f in feats))

    def finalize(self, eps: float = 1e-7) -> Tensor:
        """The (N * channels, N * channels) correlation; may be called again. eps is not used: see docs/adapters.md."""
        return self._metric.finalize()


class CorrelationMetric(CovarianceMetric):
    """The same under its other name."""


class WeightFusion:
    """Merges networks by the published method.

    reduce: share of all units to be merged away (0.5 of two models keeps one model's width). a, b: attenuation and
    budget of the zip. relax: accepted, not used, as there. iter: most sweeps. use_cos: compare weights by cosine.
    no_fusion: average without matching. fix_sims: also compare activations in the sweeps, with fix_rate the share of
    the weights. use_permute: align instead of zipping. verbose: progress bars.

    tie_heads: q, k and v move their heads together. False: independently, as in the published code, whose merged
    attention then mixes heads.
    """

    def __init__(
        self,
        reduce: float = 0.5,
        a: float = 0.5,
        b: float = 1,
        relax: int = 5,
        iter: int = 100,
        use_cos: bool = False,
        no_fusion: bool = False,
        fix_sims: bool = False,
        fix_rate: float = 0.5,
        use_permute: bool = False,
        verbose: bool = True,
        tie_heads: bool = True,
    ) -> None:
        if not 0 <= reduce < 1:
            raise ValueError(f"reduce: expected a share in 0..1, got {reduce!r}")
        if not 0 <= fix_rate <= 1:
            raise ValueError(f"fix_rate: expected a share in 0..1, got {fix_rate!r}")
        for name, value in (("a", a), ("b", b)):
            if not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        self.reduce, self.a, self.b, self.iter = reduce, a, b, iter
        self.use_cos, self.no_fusion, self.use_permute = use_cos, no_fusion, use_permute
        self.fix_sims, self.fix_rate = fix_sims, fix_rate
        self.verbose, self.tie_heads = verbose, tie_heads
        self.plan: MergePlan | None = None
        self.fusion_model: nn.Module | None = None
        self._translated: Translated | None = None

    def transform(
        self,
        nets: Sequence[nn.Module],
        perm: Perms,
        act_loader: Iterable[Any] | None = None,
        in_weight_space: bool = False,
        return_state_dict: bool = False,
        random_state: int = 0,
    ) -> Any:
        """The merged network, a copy of the first with its tensors (and widths) replaced.

        perm: the permutation dictionary. act_loader: batches whose first item is the input; None: weights alone.
        in_weight_space: also sweep over the weights after matching by activations. return_state_dict: instead of the
        network {tensor: [each model's, regrouped]}, with cut tensors in their parts, and averages of all other tensors.
        random_state: seed of the order of visits.

        Batch-norm statistics are averaged; reset them, as the official scripts do. Raises ValueError or TypeError,
        naming the permutation or tensor, for input that does not fit.
        """
        nets = list(nets)
        if len(nets) < 2:
            raise ValueError(f"nets: expected two or more, got {len(nets)}")
        odd = [type(net).__name__ for net in nets if not isinstance(net, nn.Module)]
        if odd:
            raise TypeError(f"nets: expected modules, got {odd[0]}")
        states = [net.state_dict() for net in nets]
        translated = translate(perm, states[0], self.tie_heads)
        translated.spec.check(states[0])
        stats = None
        if act_loader is not None and not self.no_fusion:
            stats = self._activations(nets, act_loader, translated)
        self.plan = self._match(states, translated.spec, stats, in_weight_space, random_state)
        self._translated = translated
        merged = self.plan.merge(states)
        self.fusion_model = copy.deepcopy(nets[0])
        _install(self.fusion_model, merged)
        if return_state_dict:
            return _regrouped(self.plan, translated, states, merged)
        return self.fusion_model

    @property
    def perm_mats(self) -> dict[Any, tuple[Tensor, Tensor]]:
        """{id: (merge times the number of models, unmerge)}, both (models * units, merged units)."""
        if self.plan is None or self._translated is None:
            raise ValueError("perm_mats: transform has not run yet")
        result = {}
        for key, name in self._translated.names.items():
            merge, unmerge = merge_and_unmerge(self.plan.labels[name], self.plan.widths[name], "cpu")
            result[key] = (merge * self.plan.models, unmerge)
        return result

    def _match(
        self,
        states: Sequence[Mapping[str, Tensor]],
        spec: PermutationSpec,
        stats: ActivationStats | None,
        in_weight_space: bool,
        seed: int,
    ) -> MergePlan:
        if self.no_fusion:
            same = {space.name: torch.arange(space.width).repeat(len(states), 1) for space in spec.spaces}
            return MergePlan(spec, same, "align")
        balance = 1.0
        if stats is not None:
            balance = (self.fix_rate if self.fix_sims else 1.0) if in_weight_space else 0.0
        given, compared = _with_twins(states, spec) if self.use_cos else (list(states), spec)
        plan = match(
            given,
            compared,
            stats,
            "align" if self.use_permute else "zip",
            balance=balance,
            width=None if self.use_permute else self._widths(spec, len(states)),
            attenuation=self.a,
            budget=self.b,
            seed=seed,
            max_sweeps=self.iter,
            progress=self.verbose,
        )
        return MergePlan(spec, plan.labels, plan.method, plan.values, plan.history)

    def _widths(self, spec: PermutationSpec, models: int) -> dict[str, int | float]:
        def width(space: Space) -> int:
            units = models * space.width // space.blocks
            return space.blocks * int(units * (1 - self.reduce) + 1e-4)

        return {space.name: width(space) for space in spec.spaces}

    def _activations(self, nets: list[nn.Module], loader: Iterable[Any], translated: Translated) -> ActivationStats:
        home = next(nets[0].parameters()).device
        spec = translated.spec
        covariances = {
            space.name: Covariance(space.width, models=len(nets), device=home)
            for space in spec
            if translated.seen[space.name]
        }
        total = len(loader) if isinstance(loader, Sized) else None
        with (
            _watched(nets, translated.seen) as features,
            torch.no_grad(),
            bar("activations", total, self.verbose) as steps,
        ):
            for batch in loader:
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                if not isinstance(inputs, Tensor):
                    raise TypeError(f"act_loader: expected batches whose first item is a tensor, got {_kind(batch)}")
                for net in nets:
                    net(inputs.to(home))
                for name, covariance in covariances.items():
                    for k, seen in enumerate(translated.seen[name]):
                        found = [each.pop((name, k), None) for each in features]
                        if any(x is None for x in found):
                            raise ValueError(f"perm {name}: module {seen.module!r} was not called")
                        covariance.update([x for x in found if x is not None], dim=1)
                steps.advance()
        if any(covariance.count == 0 for covariance in covariances.values()):
            raise ValueError("act_loader: expected at least one batch")
        return ActivationStats(covariances)


def _kind(batch: Any) -> str:
    return f"{type(batch).__name__} of {type(batch[0]).__name__}" if isinstance(batch, tuple) else type(batch).__name__


@contextmanager
def _watched(
    nets: Sequence[nn.Module], seen: Mapping[str, Sequence[Seen]]
) -> Iterator[list[dict[tuple[str, int], Tensor]]]:
    """The activations of the last forward pass of every net, (batch, units, ...), while the block runs in eval mode."""
    features: list[dict[tuple[str, int], Tensor]] = [{} for _ in nets]
    handles = []
    training = [net.training for net in nets]
    try:
        for net, own in zip(nets, features, strict=True):
            net.eval()
            modules = dict(net.named_modules())
            for name, places in seen.items():
                for k, place in enumerate(places):
                    if place.module not in modules:
                        raise ValueError(
                            f"perm {name}: the network has no module {place.module!r} to see activations at"
                        )
                    handles.append(_hooked(modules[place.module], place, own, (name, k)))
        yield features
    finally:
        for handle in handles:
            handle.remove()
        for net, before in zip(nets, training, strict=True):
            net.train(before)


def _hooked(module: nn.Module, place: Seen, own: dict[tuple[str, int], Tensor], key: tuple[str, int]) -> Any:
    if place.reshape is not None and place.reshape[0] not in RESHAPE_FUNC:
        raise ValueError(f"perm {key[0]}: reshape_func: expected {', '.join(RESHAPE_FUNC)}, got {place.reshape[0]!r}")
    reshape = None if place.reshape is None else RESHAPE_FUNC[place.reshape[0]](**place.reshape[1])

    def keep(x: Tensor) -> None:
        own[key] = reshape(x.detach()) if reshape is not None else x.detach().movedim(place.dim, 1)

    if place.hook == "pre":
        return module.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
    if place.hook == "post":
        return module.register_forward_hook(lambda module, inputs, output: keep(output))
    raise ValueError(f"perm {key[0]}: hook: expected 'pre' or 'post', got {place.hook!r}")


def _with_twins(
    states: Sequence[Mapping[str, Tensor]], spec: PermutationSpec
) -> tuple[list[Mapping[str, Tensor]], PermutationSpec]:
    """Every compared tensor beside its negative: rows then have mean 0, and their correlation is their cosine."""

    def twin(axis: Axis) -> Axis:
        return replace(axis, tensor=axis.tensor + _TWIN)

    spaces = [
        Space(
            space.name,
            space.width,
            (*space.axes, *(twin(axis) for axis in space.axes)),
            blocks=space.blocks,
            tie=space.tie,
        )
        for space in spec.spaces
    ]
    return [_Twins(state) for state in states], PermutationSpec(tuple(spaces))


class _Twins(Mapping[str, Tensor]):
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        return -self._state[name[: -len(_TWIN)]] if name.endswith(_TWIN) else self._state[name]

    def __iter__(self) -> Iterator[str]:
        for name in self._state:
            yield name
            yield name + _TWIN

    def __len__(self) -> int:
        return 2 * len(self._state)


def _regrouped(
    plan: MergePlan, translated: Translated, states: Sequence[Mapping[str, Tensor]], merged: Mapping[str, Tensor]
) -> dict[str, Any]:
    cut: dict[str, tuple[int, list[str]]] = {}
    for part, (whole, axis, _, _) in translated.parts.items():
        cut.setdefault(whole, (axis, []))[1].append(part)
    result: dict[str, Any] = {}
    for name, tensor in merged.items():
        if name not in plan.spec.entries:
            result[name] = tensor
            continue
        each = expressed_tensors(plan.spec, plan.labels, plan.widths, states, name)
        if name not in cut:
            result[name] = each
            continue
        axis, parts = cut[name]
        pieces = [tensor.chunk(len(parts), axis) for tensor in each]
        for k, part in enumerate(parts):
            result[part] = [piece[k] for piece in pieces]
    return result


# The attributes that tell a module its widths, from its weight's shape.
_SIZES: tuple[tuple[type[nn.Module], tuple[tuple[str, int], ...]], ...] = (
    (nn.Linear, (("out_features", 0), ("in_features", 1))),
    (nn.Conv2d, (("out_channels", 0), ("in_channels", 1))),
    (nn.modules.batchnorm._BatchNorm, (("num_features", 0),)),
    (nn.GroupNorm, (("num_channels", 0),)),
)


def _install(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the network these tensors, of other widths too, and tell its modules."""
    own = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        own[name].data = tensor.to(own[name].device)
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        for kind, attributes in _SIZES:
            if isinstance(module, kind):
                for attribute, dim in attributes:
                    setattr(module, attribute, weight.shape[dim])
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(weight.shape)
