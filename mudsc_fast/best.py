"""The recipe that merges best: matching chosen without labels, decoder, sequential refit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast.agreeing import agreement
from mudsc_fast.batches import check_batches, placed
from mudsc_fast.calibration import calibrate
from mudsc_fast.elastic import elastic_widths
from mudsc_fast.installing import installed
from mudsc_fast.matching import match
from mudsc_fast.progress import Progress
from mudsc_fast.repairs.decoding import calibrate_readers, decode
from mudsc_fast.repairs.refitting import refit
from mudsc_fast.repairs.rescaling import repair
from mudsc_fast.repairs.targets import last_target
from mudsc_fast.resizing import resizable_spaces
from mudsc_fast.searching import BALANCES, search_balance

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spec import PermutationSpec

CANDIDATES = ("zip", "select")


@dataclass(frozen=True)
class Best:
    """state_dict: the merged net. plan: the match behind it. balance: of a zip; None for a selection.

    agreement: {candidate: mean agreement with the parents after the refit}, by which it was chosen.
    """

    state_dict: dict[str, Tensor]
    plan: MergePlan
    balance: float | None
    agreement: dict[str, float]


def merge_best(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    heads: Sequence[Tensor] | None = None,
    candidates: Sequence[str] = CANDIDATES,
    balances: Sequence[float] = BALANCES,
    output: str | None = None,
    ridge: float = 0.01,
    judged_on: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress = True,
    width_budget: float | None = None,
    **options: Any,
) -> Best:
    """Match in several ways, decode, refit each, and keep the net that agrees best with the parents; no labels.

    models, batches, spec: as for `merge_models`; batches are read at once. heads: one (classes, features) matrix a
        model, if the outputs are features that such matrices read: they are then kept exactly where the width allows.
    candidates: "zip" (its balance found by `search_balance` with the agreement of decoded, rescaled nets) and
        "select". balances: tried for the zip. output, ridge: as for `refit`; None is "heads" where there are heads,
        else "unit".
    judged_on: how many of the batches the agreement is measured on; None is half of them, two at least.
    width_budget: as for `merge_models`: each candidate gets widths of its own. options: for `match`.

    Returns a Best. Raises ValueError or TypeError as the single steps do.
    """
    unknown = sorted(set(candidates) - set(CANDIDATES))
    if unknown or not candidates:
        raise ValueError(f"candidates: expected some of {', '.join(CANDIDATES)}, got {list(candidates)!r}")
    output = output or ("unit" if heads is None else "heads")
    last_target(output, heads, len(models))
    batches = list(check_batches(batches))
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    if judged_on is None:
        judged_on = max(2, len(batches) // 2)
    if isinstance(judged_on, bool) or not isinstance(judged_on, int) or judged_on < 1:
        raise ValueError(f"judged_on: expected an integer >= 1, got {judged_on!r}")
    few = batches[:judged_on]
    with placed(models, None if device is None else torch.device(device)):
        states = [model.state_dict() for model in models]
        stats = calibrate(models, batches, spec, "full", progress=progress)
        readers = calibrate_readers(models, batches, spec, progress=progress)
        judge = agreement(models, few, heads)
        able = [] if width_budget is None else resizable_spaces(models[0], spec, batches[0])

        def elastic(method: str) -> dict[str, Any]:
            """The options of a match, with its widths where these follow from a budget."""
            if width_budget is None:
                return options
            attenuation = options.get("attenuation", 0.5)
            widths = elastic_widths(states, spec, stats, width_budget, method, able, attenuation, progress)
            return {**options, "width": widths}

        def decoded(plan: MergePlan) -> dict[str, Tensor]:
            net = installed(models[0], decode(plan, states, readers))
            repair(net, models, few, plan)
            return net.state_dict()

        plans: dict[str, tuple[MergePlan, float | None]] = {}
        if "zip" in candidates and len(set(balances)) > 1:
            found = search_balance(
                states, spec, stats, judge, balances, method="zip", finish=decoded, progress=progress, **elastic("zip")
            )
            plans["zip"] = found.plan, found.balance
        elif "zip" in candidates:
            balance = next(iter(balances))
            plan = match(states, spec, stats, "zip", balance=balance, progress=progress, **elastic("zip"))
            plans["zip"] = plan, balance
        if "select" in candidates:
            unused = ("attenuation", "budget", "start")
            selecting = {key: value for key, value in elastic("select").items() if key not in unused}
            plans["select"] = match(states, spec, stats, "select", progress=progress, **selecting), None
        scores: dict[str, float] = {}
        kept: tuple[str, nn.Module] | None = None
        for name, (plan, _) in plans.items():
            net = installed(models[0], decode(plan, states, readers))
            refit(net, models, batches, plan, heads if output == "heads" else None, output, ridge, progress=progress)
            own = judge(net)
            scores[name] = sum(own) / len(own)
            if kept is None or scores[name] > scores[kept[0]]:
                kept = name, net
        if kept is None:
            raise ValueError("candidates: none could be merged")
        merged = {name: x.to(states[0][name].device) for name, x in kept[1].state_dict().items()}
    return Best(merged, *plans[kept[0]], scores)
