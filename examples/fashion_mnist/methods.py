"""Every way of merging that the study compares: a function from a pair of parents to a merged net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.calibration import ActivationStats
from mudsc_fast.plan import MergePlan

BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Pair:
    """Two parents and what all methods share: statistics and matches are computed once, when first asked for.

    heads: the class vectors of each parent's task. calibration: unlabelled batches. few: some of them, for choices.
    judge: a net's score with labels, on held-out training images; plain matching methods choose their balance by it.
    """

    models: list[nn.Module]
    heads: list[Tensor]
    calibration: list[Tensor]
    judge: Callable[[nn.Module], float]
    chosen: dict[str, float] = field(default_factory=dict)

    @cached_property
    def spec(self) -> mf.PermutationSpec:
        return mf.spec_for(self.models[0])

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        return [model.state_dict() for model in self.models]

    @cached_property
    def stats(self) -> ActivationStats:
        return mf.calibrate(self.models, self.calibration, self.spec)

    @cached_property
    def readers(self) -> ActivationStats:
        return mf.calibrate_readers(self.models, self.calibration, self.spec)

    @property
    def few(self) -> list[Tensor]:
        return self.calibration[:4]

    def reset(self, net: nn.Module) -> nn.Module:
        """The net with its batch-norm statistics recomputed, where it has any."""
        mf.reset_batchnorm(net, self.few)
        return net

    def plain(self, plan: MergePlan) -> nn.Module:
        return self.reset(mf.installed(self.models[0], plan.merge(self.states)))

    def plan(self, method: str, balance: float) -> MergePlan:
        return mf.match(self.states, self.spec, self.stats, method, balance=balance, progress=False)

    def searched(self, method: str) -> MergePlan:
        """The match at the balance that does best on held-out training images."""
        if method not in self._found:
            found = mf.search_balance(
                self.states,
                self.spec,
                self.stats,
                lambda state: self.judge(self.reset(mf.installed(self.models[0], state))),
                BALANCES,
                method=method,
                progress=False,
            )
            self.chosen[method] = found.balance
            self._found[method] = found.plan
        return self._found[method]

    @cached_property
    def _found(self) -> dict[str, MergePlan]:
        return {}

    @cached_property
    def selected(self) -> MergePlan:
        return self.plan("select", 0.0)

    @cached_property
    def blocks(self) -> MergePlan:
        """A selection that takes heads and groups of a norm whole; the same as `selected` where there are none."""
        return mf.match(self.states, self.spec, self.stats, "select", balance=0.0, whole_blocks=True, progress=False)

    @cached_property
    def random_halves(self) -> MergePlan:
        """A selection by noise: a random half of each parent's units, whatever they do."""
        generator = torch.Generator().manual_seed(0)
        noise = {}
        for space in self.spec.spaces:
            noise[space.name] = mf.Covariance(space.width)
            size = torch.rand(2, space.width, generator=generator) + 0.5
            draws = torch.randn(2, 4 * space.width + 50, space.width, generator=generator) * size[:, None]
            noise[space.name].update(list(draws))
        return mf.match(None, self.spec, noise, "select", balance=0.0, progress=False)

    def repaired(self, net: nn.Module, plan: MergePlan) -> nn.Module:
        mf.repair(net, self.models, self.calibration, plan)
        return net

    def decoded(self, plan: MergePlan) -> nn.Module:
        return mf.installed(self.models[0], mf.decode(plan, self.states, self.readers))

    def refitted(self, plan: MergePlan, output: str) -> nn.Module:
        net = mf.installed(self.models[0], plan.merge(self.states))
        heads = self.heads if output == "heads" else None
        mf.refit(net, self.models, self.calibration, plan, heads, output)
        return net

    def one_body(self, model: int, output: str) -> nn.Module:
        """One parent as it is, but for its last layer, which is solved like the refit's."""
        net = mf.installed(self.models[model], self.states[model])
        heads = self.heads if output == "heads" else None
        mf.refit(net, self.models, self.calibration, self.selected, heads, output, part="last")
        return net

    def rotations(self, plan: MergePlan | None = None, parts: tuple[str, ...] = ("stream", "heads")) -> Pair:
        """The same parents' functions, the second one's units in the order of an align plan, and rotated."""
        models = self.models
        if plan is not None:
            models = [models[0], mf.installed(models[1], plan.align(self.states[1]))]
        found = mf.align_rotations(models, self.calibration, self.spec, parts=parts).state_dicts
        pair = Pair([mf.installed(models[0], s) for s in found], self.heads, self.calibration, self.judge)
        pair.spec = self.spec
        return pair

    @cached_property
    def rotated(self) -> Pair:
        """Aligned and rotated, both at balance 0.5: what further methods start from."""
        return self.rotations(self.plan("align", 0.5))

    @property
    def can_rotate(self) -> bool:
        """Whether there is a residual stream that is read through norms."""
        return any("LayerNorm" in type(m).__name__ or "RMSNorm" in type(m).__name__ for m in self.models[0].modules())

    def best(self, heads: bool) -> nn.Module:
        state = mf.merge_models(
            self.models,
            self.calibration,
            self.spec,
            "best",
            self.heads if heads else None,
            progress=False,
            judged_on=len(self.few),
        )
        return mf.installed(self.models[0], state)


def _identity(pair: Pair) -> nn.Module:
    state = {
        name: x if not x.is_floating_point() else torch.stack([s[name] for s in pair.states]).mean(0)
        for name, x in pair.states[0].items()
    }
    return pair.reset(mf.installed(pair.models[0], state))


# Rows in the order of the table. Without a refit first, in the order of the paper.
PLAIN: dict[str, Callable[[Pair], nn.Module]] = {
    "average": _identity,
    "weight align": lambda p: p.plain(p.plan("align", 1.0)),
    "activation align": lambda p: p.plain(p.plan("align", 0.0)),
    "MuDSC align": lambda p: p.plain(p.searched("align")),
    "weight zip": lambda p: p.plain(p.plan("zip", 1.0)),
    "activation zip (ZipIt)": lambda p: p.plain(p.plan("zip", 0.0)),
    "MuDSC zip": lambda p: p.plain(p.searched("zip")),
}
REPAIRED: dict[str, Callable[[Pair], nn.Module]] = {
    "zip + rescaling": lambda p: p.repaired(
        mf.installed(p.models[0], p.searched("zip").merge(p.states)), p.searched("zip")
    ),
    "zip + decoder": lambda p: p.reset(p.decoded(p.searched("zip"))),
    "zip + decoder + rescaling": lambda p: p.repaired(p.decoded(p.searched("zip")), p.searched("zip")),
    "selection": lambda p: p.plain(p.selected),
    "selection + decoder": lambda p: p.reset(p.decoded(p.selected)),
    "selection + decoder + rescaling": lambda p: p.repaired(p.decoded(p.selected), p.selected),
    "whole blocks + decoder + rescaling": lambda p: p.repaired(p.decoded(p.blocks), p.blocks),
}
# Transformers alone: the parents' functions after rotations of the stream and of heads, then as above.
ROTATED: dict[str, Callable[[Pair], nn.Module]] = {
    "rotations": lambda p: _identity(p.rotations()),
    "align + rotations of the stream": lambda p: _identity(p.rotations(p.plan("align", 0.5), ("stream",))),
    "align + rotations of heads": lambda p: _identity(p.rotations(p.plan("align", 0.5), ("heads",))),
    "align + rotations": lambda p: _identity(p.rotated),
    "align + rotations, zip": lambda p: p.rotated.plain(p.rotated.searched("zip")),
    "align + rotations, zip + decoder": lambda p: p.rotated.decoded(p.rotated.searched("zip")),
    "align + rotations, zip + decoder + rescaling": lambda p: p.rotated.repaired(
        p.rotated.decoded(p.rotated.searched("zip")), p.rotated.searched("zip")
    ),
    "align + rotations, whole blocks + decoder + rescaling": lambda p: p.rotated.repaired(
        p.rotated.decoded(p.rotated.blocks), p.rotated.blocks
    ),
}
REFITTED: dict[str, Callable[[Pair], nn.Module]] = {
    "zip + refit, mean": lambda p: p.refitted(p.searched("zip"), "mean"),
    "zip + refit, unit": lambda p: p.refitted(p.searched("zip"), "unit"),
    "zip + refit, heads": lambda p: p.refitted(p.searched("zip"), "heads"),
    "selection + refit, heads": lambda p: p.refitted(p.selected, "heads"),
    "whole blocks + refit, heads": lambda p: p.refitted(p.blocks, "heads"),
    "whole blocks + refit, unit": lambda p: p.refitted(p.blocks, "unit"),
    "best, without heads": lambda p: p.best(False),
    "best, heads known": lambda p: p.best(True),
}
CONTROLS: dict[str, Callable[[Pair], nn.Module]] = {
    "control: first body, last layer solved, heads": lambda p: p.one_body(0, "heads"),
    "control: second body, last layer solved, heads": lambda p: p.one_body(1, "heads"),
    "control: first body, last layer solved, unit": lambda p: p.one_body(0, "unit"),
    "control: second body, last layer solved, unit": lambda p: p.one_body(1, "unit"),
    "control: random halves + refit, heads": lambda p: p.refitted(p.random_halves, "heads"),
    "control: random halves + refit, unit": lambda p: p.refitted(p.random_halves, "unit"),
}


def _fast(pair: Pair) -> nn.Module:
    """MuDSC zip at balance 0.5 on some of the images, as the row below."""
    state = mf.merge_models(pair.models, pair.few, pair.spec, "zip", balance=0.5, progress=False)
    return mf.installed(pair.models[0], state)


def _reference(pair: Pair) -> nn.Module:
    """The same by the plain float64 pipeline, which stands in for the published algorithm."""
    state = mf.reference.merge_models(pair.models, pair.few, pair.spec, "zip", balance=0.5)
    return mf.installed(pair.models[0], state)


REFERENCE: dict[str, Callable[[Pair], nn.Module]] = {
    "zip at 0.5, fast path": _fast,
    "zip at 0.5, float64 reference": _reference,
}
METHODS = {**PLAIN, **REPAIRED, **ROTATED, **REFITTED, **CONTROLS, **REFERENCE}
