"""The balance chosen by what the merged networks do: one search over all of them, warm-started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mudsc_fast.arguments import check_share, check_spec, two_or_more
from mudsc_fast.matching import match
from mudsc_fast.plan import MergePlan
from mudsc_fast.progress import Progress, bar

if TYPE_CHECKING:
    from mudsc_fast.covariance import Covariance
    from mudsc_fast.spec import PermutationSpec

BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0)
Score = float | Mapping[str, float] | Sequence[float]


@dataclass(frozen=True)
class BalanceSearch:
    """balance, plan, score: the best. scores: {balance: what the objective made of it; NaN where that failed}.

    matching, evaluating: seconds spent on each, in all.
    """

    balance: float
    plan: MergePlan
    score: float
    scores: dict[float, float]
    matching: float
    evaluating: float


def mean_score(score: Score) -> float:
    """The mean over tasks: the default objective."""
    values = _values(score)
    return sum(values) / len(values) if values else math.nan


def worst_score(score: Score) -> float:
    """The score of the task that came out worst: the objective "min"."""
    values = _values(score)
    return math.nan if not values or any(math.isnan(v) for v in values) else min(values)


_OBJECTIVES: dict[str, Callable[[Any], float]] = {"mean": mean_score, "min": worst_score}


def search_balance(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    stats: Mapping[str, Covariance] | None,
    evaluate: Callable[[dict[str, Tensor]], Score],
    balances: Sequence[float] = BALANCES,
    objective: str | Callable[[Any], float] = "mean",
    method: str = "zip",
    warm_sweeps: int = 2,
    finish: Callable[[MergePlan], dict[str, Tensor]] | None = None,
    progress: Progress = True,
    **options: Any,
) -> BalanceSearch:
    """Match at every balance and keep the one whose merged network does best.

    state_dicts, spec, stats: as for `match`; the statistics and the match by activations alone, where every match
        starts, are computed once.
    evaluate: called with each merged state dict; a number, or one a task (a mapping or a sequence). More is better. It
        may repair the network first (batch norm!). To choose without labels, see `agreement`.
    balances: 0..1, in any order; they are visited rising, and each match begins with the labels of the one before.
    objective: "mean" or "min" over tasks, or a function from what `evaluate` gave to one number.
    method, options: as for `match`. warm_sweeps: most sweeps of a match that begins with another balance's labels.
    finish: makes the state dict of a plan that `evaluate` sees; None: `plan.merge`.

    A score that is NaN cannot win, and stays NaN in `scores`. Raises ValueError for no balances, balance 0 without
    statistics, scores that are all NaN, and, naming the balance, whatever `evaluate` raises; TypeError for scores that
    are not numbers.
    """
    check_spec(spec)
    states = two_or_more(state_dicts)
    order = sorted({float(b) for b in balances})
    if not order:
        raise ValueError("balances: expected at least one, got none")
    for balance in order:
        check_share("balances", balance)
    if not stats and order[0] == 0:
        raise ValueError("balances: balance 0 compares activations alone, but no stats were given")
    if not callable(evaluate):
        raise TypeError(f"evaluate: expected a function of a state dict, got {type(evaluate).__name__}")
    judge = _OBJECTIVES.get(objective) if isinstance(objective, str) else objective
    if judge is None or not callable(judge):
        raise ValueError(f"objective: expected a function or one of {', '.join(_OBJECTIVES)}, got {objective!r}")

    best: tuple[float, float, MergePlan] | None = None
    scores: dict[float, float] = {}
    matching = evaluating = 0.0
    plan: MergePlan | None = None
    with bar("searching the balance", len(order), progress) as steps:
        for balance in order:
            begin = time.perf_counter()
            sweeps = {} if plan is None or balance == 0 else {"start": plan, "max_sweeps": warm_sweeps, "patience": 1}
            plan = match(states, spec, stats, method, balance=balance, progress=False, **{**options, **sweeps})
            middle = time.perf_counter()
            score = _scored(plan, balance, evaluate, judge, finish or (lambda p: p.merge(states)))
            matching, evaluating = matching + middle - begin, evaluating + time.perf_counter() - middle
            scores[balance] = score
            if not math.isnan(score) and (best is None or score > best[0]):
                best = score, balance, plan
            steps.advance()
    if best is None:
        raise ValueError(f"evaluate: gave NaN at every balance ({', '.join(f'{b:g}' for b in order)})")
    return BalanceSearch(best[1], best[2], best[0], scores, matching, evaluating)


def _scored(
    plan: MergePlan,
    balance: float,
    evaluate: Callable[[dict[str, Tensor]], Score],
    judge: Callable[[Any], float],
    finish: Callable[[MergePlan], dict[str, Tensor]],
) -> float:
    merged = finish(plan)
    try:
        result = evaluate(merged)
    except Exception as error:
        raise ValueError(f"evaluate: failed at balance {balance:g}: {type(error).__name__}: {error}") from error
    try:
        return float(judge(result))
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate: expected a number or one a task at balance {balance:g}, got {result!r}") from error


def _values(score: Score) -> list[float]:
    if isinstance(score, Mapping):
        return [float(v) for v in score.values()]
    if isinstance(score, list | tuple):
        return [float(v) for v in score]
    return [float(score)]  # type: ignore[arg-type]
