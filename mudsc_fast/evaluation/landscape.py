"""Losses of every task around merged networks: on the plane through parents and merge, and along lines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mudsc_fast.evaluation.plane import Plane, between, check_alike, fingerprint
from mudsc_fast.progress import Progress, bar

PathLike = str | os.PathLike[str]
# Given a state dict, the loss of every task. A network with batch norm is judged with statistics of its own, so its
# function recomputes them first (mudsc_fast.reset_batchnorm).
Evaluate = Callable[[dict[str, Tensor]], Mapping[str, float]]

LOW = 0.1  # a loss this share of the way from the better to the worse parent's counts as low
_SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid of the plane through three networks.

    xs, ys: coordinates of the grid, distances in weight space. losses: {task: rows of losses, losses[task][i][j] at
    (xs[j], ys[i])}; NaN where the loss was not finite. points: {name: (x, y)} of the three networks. at_points: {name:
    {task: loss}}.
    """

    xs: list[float]
    ys: list[float]
    losses: dict[str, list[list[float]]]
    points: dict[str, tuple[float, float]]
    at_points: dict[str, dict[str, float]]

    def low(self, task: str, share: float = LOW) -> float:
        """The loss up to which a point counts as low: this share of the way from the better to the worse parent's."""
        best, worst = self._parents(task)
        return best + share * (worst - best)

    def in_overlap(self, name: str, share: float = LOW) -> bool:
        """Whether every task's loss at this network is low."""
        return all(loss <= self.low(task, share) for task, loss in self.at_points[name].items())

    def needed_share(self, name: str) -> float:
        """The smallest share, 0 at least, at which this network lies in the overlap; NaN where a loss is not finite."""
        shares = [0.0]
        for task, loss in self.at_points[name].items():
            best, worst = self._parents(task)
            gap = worst - best
            shares.append((loss - best) / gap if gap != 0 else (math.inf if loss > best else 0.0))
        return math.nan if any(map(math.isnan, shares)) else max(shares)

    def _parents(self, task: str) -> tuple[float, float]:
        """The losses of the first two networks, rising."""
        first, second = (self.at_points[name][task] for name in list(self.points)[:2])
        return (first, second) if first <= second else (second, first)


@dataclass(frozen=True)
class Path1D:
    """Losses along the straight line between two networks: losses[task][k] at share shares[k] of the second one."""

    shares: list[float]
    losses: dict[str, list[float]]

    def barrier(self, task: str) -> float:
        """The largest excess over the straight line between the ends' losses (Frankle et al., arXiv 1912.05671)."""
        values = self.losses[task]
        ends = values[0], values[-1]
        return max(v - (1 - s) * ends[0] - s * ends[1] for s, v in zip(self.shares, values, strict=True))


def landscape(
    state_dicts: Sequence[Mapping[str, Tensor]],
    evaluate: Evaluate,
    names: Sequence[str] = ("A", "B", "merged"),
    resolution: int = 21,
    margin: float = 0.3,
    path: PathLike | None = None,
    progress: Progress = True,
) -> Landscape:
    """Evaluate every task on a grid of the plane through two parents and their merge.

    state_dicts: three mappings of tensors of one architecture and width: parent, parent, merge.
    evaluate: state dict -> {task: loss}, the same tasks every time. A loss that is NaN or infinite leaves a hole.
    names: of the three, for the figures. resolution: points a side, >= 2. margin: how far the grid reaches beyond the
        three, as a share of their extent.
    path: a JSON file that takes the losses as they come in. If it holds those of an interrupted run on the same
        networks and grid, that run goes on; losses of anything else are refused.

    Raises ValueError or TypeError for other input, and RuntimeError, naming the point, where `evaluate` raises; what
    was evaluated before is in `path`.
    """
    states = list(state_dicts)
    if len(states) != 3:
        raise ValueError(
            f"state_dicts: expected three (two parents and a merge), got {len(states)}; between two networks there is "
            "only a line: loss_path"
        )
    if len(names) != 3 or len(set(names)) != 3:
        raise ValueError(f"names: expected three different ones, got {list(names)}")
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 2:
        raise ValueError(f"resolution: expected an integer >= 2, got {resolution!r}")
    if not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise ValueError(f"margin: expected a number >= 0, got {margin!r}")
    plane = Plane(states)
    xs, ys = (_ticks([p[k] for p in plane.corners], resolution, margin) for k in (0, 1))
    jobs = {f"{i},{j}": (x, y) for i, y in enumerate(ys) for j, x in enumerate(xs)}
    jobs |= {f"network {k}": corner for k, corner in enumerate(plane.corners)}
    key = {"networks": fingerprint(states), "resolution": resolution, "margin": margin}
    found = _evaluated(jobs, lambda at: plane.at(*at), evaluate, key, path, "landscape", progress)
    tasks = list(found["0,0"])
    grid = range(resolution)
    return Landscape(
        xs,
        ys,
        {task: [[found[f"{i},{j}"][task] for j in grid] for i in grid] for task in tasks},
        dict(zip(names, plane.corners, strict=True)),
        {name: found[f"network {k}"] for k, name in enumerate(names)},
    )


def loss_path(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    evaluate: Evaluate,
    steps: int = 21,
    path: PathLike | None = None,
    progress: Progress = True,
) -> Path1D:
    """Evaluate every task along the straight line between two networks; arguments and errors as for `landscape`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps: expected an integer >= 2, got {steps!r}")
    check_alike([first, second])
    shares = [k / (steps - 1) for k in range(steps)]
    jobs = {str(k): share for k, share in enumerate(shares)}
    key = {"networks": fingerprint([first, second]), "steps": steps}
    found = _evaluated(jobs, lambda at: between(first, second, at), evaluate, key, path, "path", progress)
    return Path1D(shares, {task: [found[str(k)][task] for k in range(steps)] for task in found["0"]})


def _ticks(values: Sequence[float], resolution: int, margin: float) -> list[float]:
    low, high = min(values), max(values)
    reach = margin * (high - low)
    return [low - reach + k * (high - low + 2 * reach) / (resolution - 1) for k in range(resolution)]


def _evaluated(
    jobs: Mapping[str, Any],
    network: Callable[[Any], dict[str, Tensor]],
    evaluate: Evaluate,
    key: Mapping[str, Any],
    path: PathLike | None,
    what: str,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """{job: {task: loss}}; what is in `path` already is not evaluated again."""
    found = _resumed(path, key)
    tasks = list(next(iter(found.values()))) if found else None
    saved = time.monotonic()
    with bar(what, len(jobs), progress) as steps:
        steps.advance(len(found))
        for name, at in jobs.items():
            if name in found:
                continue
            try:
                losses = dict(evaluate(network(at)))
            except Exception as error:
                _save(path, key, found)
                raise RuntimeError(f"evaluate: raised at {what} point {name}: {error}") from error
            found[name] = _checked(losses, tasks)
            tasks = list(found[name])
            steps.advance()
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _save(path, key, found)
                saved = time.monotonic()
    _save(path, key, found)
    return found


def _checked(losses: Mapping[str, Any], tasks: list[str] | None) -> dict[str, float]:
    """The losses as floats, NaN for what is not finite; the tasks are the same at every point."""
    if not losses:
        raise ValueError("evaluate: expected {task: loss} with at least one task, got none")
    if tasks is not None and set(losses) != set(tasks):
        raise ValueError(f"evaluate: expected the tasks {sorted(tasks)} at every point, got {sorted(losses)}")
    try:
        values = {str(task): float(loss) for task, loss in losses.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate: expected a number for every task, got {losses!r}") from error
    return {task: value if math.isfinite(value) else math.nan for task, value in values.items()}


def _resumed(path: PathLike | None, key: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    if path is None or not Path(path).exists():
        return {}
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        known, losses = record["key"], record["losses"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of losses: {error}") from error
    if known != dict(key):
        raise ValueError(f"{path}: holds losses of other networks or of another grid; name another file or remove it")
    return {name: {t: math.nan if v is None else v for t, v in row.items()} for name, row in losses.items()}


def _save(path: PathLike | None, key: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> None:
    if path is None:
        return
    rows = {n: {t: v if math.isfinite(v) else None for t, v in row.items()} for n, row in found.items()}
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps({"key": dict(key), "losses": rows}), encoding="utf-8")
    os.replace(part, target)
