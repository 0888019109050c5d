"""What a report of a merge shows, gathered from its record, its plan and the checkpoints that are still there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.calibration import ActivationStats
from mudsc_fast.checkpoints import open_checkpoint
from mudsc_fast.evaluation.charts import bar_chart, heat_map, line_chart
from mudsc_fast.evaluation.run_record import RunRecord, read_run
from mudsc_fast.plan import MergePlan
from mudsc_fast.progress import Progress, bar
from mudsc_fast.rematch import Match, Matcher
from mudsc_fast.weights import Weights

# A similarity of this width takes about ten seconds of one core and half a gigabyte.
WIDEST = 8192
_BINS = 24


@dataclass
class ModelRow:
    """One checkpoint of the run, or why it could not be read."""

    name: str
    path: str
    tensors: int = 0
    parameters: int = 0
    megabytes: float = 0.0
    dtypes: str = ""
    missing: str | None = None


@dataclass
class SpaceRow:
    """One space of the spec and its match."""

    name: str
    width: int
    merged: int
    blocks: int
    tie: str
    tensors: int
    value: float | None


@dataclass
class SpaceFigure:
    """The similarity of model 0's and another model's units, before and after the match. URLs of PNGs; SVGs."""

    name: str
    pair: str
    before: str
    after: str
    diagonal: float
    matched: float
    histogram: str


@dataclass
class Report:
    """All that the page shows. Whatever could not be had is named in `notes`."""

    record: RunRecord
    models: list[ModelRow]
    spaces: list[SpaceRow] = field(default_factory=list)
    sweeps: str = ""
    figures: list[SpaceFigure] = field(default_factory=list)
    group_sizes: str = ""
    norms: str = ""
    norm_rows: list[tuple[str, list[str]]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(
    run: Path,
    spaces: Sequence[str] = (),
    max_spaces: int = 12,
    table: Sequence[Mapping[str, Any]] = (),
    progress: Progress = True,
) -> Report:
    """Collect the report of the run in folder `run`.

    spaces: those whose similarity is drawn; none: up to max_spaces of them, evenly spread. table: rows to show as they
    are, such as accuracies.

    Raises ValueError or FileNotFoundError where `run` holds no record, or a space is unknown.
    """
    record, plan = read_run(run)
    paths = [*record.inputs, record.output]
    names = [f"model {m}" for m in range(len(record.inputs))] + ["merged"]
    opened = [_open(record.resolve(path)) for path in paths]
    report = Report(record, [_model_row(n, p, o) for n, p, o in zip(names, paths, opened, strict=True)])
    report.table = [dict(row) for row in table]
    if record.status != "done":
        report.notes.append(
            f"This run failed: {record.error}" if record.status == "failed" else "This run did not finish."
        )
    report.notes += [f"{row.name}: {row.missing}" for row in report.models if row.missing]
    if plan is None:
        report.notes.append("There is no match: the run ended before it was found, or method average needed none.")
    else:
        report.spaces = _space_rows(plan)
        report.sweeps = _sweep_chart(plan)
        report.group_sizes = _group_sizes(plan)
        parents = [o for o in opened[:-1] if isinstance(o, Mapping)]
        if len(parents) == len(record.inputs):
            _add_figures(report, record, plan, parents, _chosen(plan, spaces, max_spaces, report), progress)
    _add_norms(report, names, opened, progress)
    return report


def _open(path: Path) -> Mapping[str, Tensor] | str:
    try:
        return open_checkpoint(path)
    except (OSError, ValueError) as error:
        return f"could not be read, so what needs it is left out ({error})"


def _model_row(name: str, path: str, opened: Any) -> ModelRow:
    if isinstance(opened, str):
        return ModelRow(name, path, missing=opened)
    infos = list(opened.layout.values())
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in infos})
    parameters = sum(math.prod(info.shape) for info in infos)
    return ModelRow(name, path, len(infos), parameters, sum(i.nbytes for i in infos) / 1e6, ", ".join(dtypes))


def _space_rows(plan: MergePlan) -> list[SpaceRow]:
    widths = plan.widths
    return [
        SpaceRow(
            space.name,
            space.width,
            widths[space.name],
            space.blocks,
            space.tie or "",
            len({axis.tensor for axis in space.axes}),
            plan.values.get(space.name),
        )
        for space in plan.spec.spaces
    ]


def _sweep_chart(plan: MergePlan) -> str:
    if not plan.history:
        return ""
    lines = {name: list(values) for name, values in plan.sweeps.items()}
    mean = "mean of all spaces (L)"
    return line_chart({**lines, mean: plan.history}, "sweep", "match value", emphasised=mean)


def _group_sizes(plan: MergePlan) -> str:
    """How many units a merged unit has, over all zipped spaces; an alignment has one of each model everywhere."""
    if plan.method != "zip":
        return ""
    sizes = torch.cat([torch.bincount(rows.reshape(-1)) for rows in plan.labels.values()])
    counts = torch.bincount(sizes)[1:].double().tolist()
    edges = [k + 0.5 for k in range(len(counts) + 1)]
    names = [str(k) for k in range(1, len(counts) + 1)]
    return bar_chart(counts, edges, "units in a merged unit", "merged units", names)


def _chosen(plan: MergePlan, spaces: Sequence[str], most: int, report: Report) -> list[str]:
    known = [space.name for space in plan.spec.spaces]
    for name in spaces:
        if name not in known:
            raise ValueError(f"spaces: the plan has no space {name!r}; it has {', '.join(known[:8])}...")
    chosen = list(spaces) or known
    narrow = [name for name in chosen if plan.spec[name].width <= WIDEST]
    if len(narrow) < len(chosen):
        report.notes.append(f"Similarities of {len(chosen) - len(narrow)} spaces wider than {WIDEST} are not drawn.")
    if not spaces and len(narrow) > most:
        report.notes.append(f"Similarities are drawn for {most} of {len(narrow)} spaces, evenly spread.")
        narrow = [narrow[k * len(narrow) // most] for k in range(most)]
    return narrow


def _add_figures(
    report: Report,
    record: RunRecord,
    plan: MergePlan,
    parents: Sequence[Mapping[str, Tensor]],
    chosen: Sequence[str],
    progress: Progress,
) -> None:
    balance = float(record.options.get("balance", 1.0))
    stats: Mapping[str, Any] = {}
    if record.stats is not None:
        try:
            stats = ActivationStats.load(record.resolve(record.stats))
        except (OSError, ValueError) as error:
            report.notes.append(f"Similarities are those of the weights alone: the statistics cannot be read ({error})")
            balance = 1.0
    weights = Weights(parents, plan.spec) if balance > 0 else None
    widths = plan.widths
    matcher = Matcher(plan.spec, plan.models, "align", weights, stats, balance, widths, 0.5, 1.0, torch.device("cpu"))
    current = {name: Match(labels, plan.values.get(name, 0.0)) for name, labels in plan.labels.items()}
    with bar("similarities", len(chosen), progress) as steps:
        for name in chosen:
            found = matcher.similarity(plan.spec[name], current, balance)
            for m in range(1, plan.models):
                report.figures.append(_figure(name, m, found[m - 1], plan.labels[name]))
            steps.advance()


def _figure(name: str, model: int, similarity: Tensor, labels: Tensor) -> SpaceFigure:
    """`similarity`: (width, width) of model 0's units with those of `model`."""
    rows, columns = labels[0].argsort(stable=True), labels[model].argsort(stable=True)
    together = labels[0][:, None] == labels[model][None, :]
    matched = similarity[together].double()
    edges = torch.linspace(-1, 1, _BINS + 1)
    counts = torch.histc(matched.float().clamp(-1, 1), bins=_BINS, min=-1, max=1).tolist()
    return SpaceFigure(
        name,
        f"model 0 and model {model}",
        heat_map(similarity),
        heat_map(similarity[rows][:, columns]),
        float(similarity.diagonal().double().mean()),
        float(matched.mean()) if matched.numel() else math.nan,
        bar_chart(counts, edges.tolist(), "similarity of matched units", "pairs"),
    )


def _add_norms(report: Report, names: Sequence[str], opened: Sequence[Any], progress: Progress) -> None:
    """Root mean squares of every matrix-like tensor: an average of unmatched units shows as a dip of the merge."""
    there = [(n, o) for n, o in zip(names, opened, strict=True) if isinstance(o, Mapping)]
    if not there:
        return
    first = opened[0] if isinstance(opened[0], Mapping) else there[0][1]
    shown = [n for n, info in first.layout.items() if len(info.shape) >= 2 and info.dtype.is_floating_point]  # type: ignore[attr-defined]
    lines: dict[str, list[float]] = {name: [] for name, _ in there}
    with bar("norms", len(shown), progress) as steps:
        for tensor in shown:
            for name, checkpoint in there:
                lines[name].append(_rms(checkpoint[tensor]) if tensor in set(checkpoint) else math.nan)
            steps.advance()
    report.norms = line_chart(lines, "tensor", "root mean square", emphasised="merged", log=True)
    for k, tensor in enumerate(shown):
        report.norm_rows.append((tensor, [f"{lines[name][k]:.4g}" for name, _ in there]))


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float())) / math.sqrt(max(tensor.numel(), 1))
