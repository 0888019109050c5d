"""python -m fashion_mnist table: collects the measured rows in one results file, writes the tables of the document."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from fashion_mnist.evaluate import CACHE
from fashion_mnist.heterogeneous import TASKS
from fashion_mnist.methods import CONTROLS, METHODS, REFERENCE, ROTATED
from fashion_mnist.parents import NETWORKS

RESULTS = Path("benchmarks/results/quality.json")
DOCUMENT = Path("docs/quality.md")
SPLIT_NAMES = {
    "halves": "Classes 0-4 and 5-9, separate initialisations",
    "evenodd": "Even and odd classes, separate initialisations",
    "halves-base": "Classes 0-4 and 5-9, fine-tuned from one base",
}
PAPER = "MuDSC zip"
BETTER_BODY = "control: better body, last layer solved, heads"
ELASTIC_CONTROLS = (BETTER_BODY, "control: random halves + refit, heads")
NO_REFIT = ("zip + rescaling", "zip + decoder", "zip + decoder + rescaling", "selection", "selection + decoder",
            "selection + decoder + rescaling", "whole blocks + decoder + rescaling", *ROTATED)  # fmt: skip

Rows = dict[str, dict[str, dict[str, float]]]  # {seed: {method: scores}}


def collect(cache: Path) -> dict[str, Any]:
    """{split: {network: {seed: rows}}} of everything measured so far."""
    found: dict[str, Any] = {}
    for path in sorted((cache / "results").glob("*.json")):
        network, _, rest = path.stem.partition("-")
        split, _, seed = rest.rpartition("-")
        found.setdefault(split, {}).setdefault(network, {})[seed] = json.loads(path.read_text())
    if (cache / "cost.json").exists():
        found["cost"] = json.loads((cache / "cost.json").read_text())
    for path in sorted((cache / "landscapes").glob("*.summary.json")):
        found.setdefault("landscapes", {})[path.name.removesuffix(".summary.json")] = json.loads(path.read_text())
    for path in sorted((cache / "elastic").glob("*-halves-*.json")):
        network, _, seed = path.stem.partition("-halves-")
        found.setdefault("elastic", {}).setdefault(network, {})[seed] = json.loads(path.read_text())
    return found


def values(pairs: dict[str, Any], method: str, score: str) -> list[float]:
    """The score of a method for every seed that has it; of several controls of one name, the better one."""
    result = []
    for pair in pairs.values():
        rows = pair["rows"]
        if method == BETTER_BODY:
            each = [rows[n] for n in CONTROLS if "body" in n and n.endswith("heads") and n in rows]
            if each:
                result.append(max(r[score] for r in each))
        elif method in rows and score in rows[method]:
            result.append(rows[method][score])
    return result


def cell(numbers: list[float], seeds: int | None = None, digits: int = 1) -> str:
    """Mean and spread (standard deviation over seeds); how many, where these are not all `seeds`."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    short = f" ({len(numbers)})" if seeds is not None and len(numbers) < seeds else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}{short}"


def table(split: dict[str, Any], score: str) -> str:
    """The markdown table of one split: a row a method, a column a network."""
    networks = [n for n in NETWORKS if n in split]
    seeds = {n: len(values(split[n], "parents", "mean")) for n in networks}
    lines = ["| | " + " | ".join(f"{n} ({seeds[n]})" for n in networks) + " |", "|---|" + "---|" * len(networks)]
    for method in ("parents", "ensemble", *(m for m in METHODS if m not in REFERENCE)):
        cells = [cell(values(split[n], method, score), seeds[n]) for n in networks]
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(split: dict[str, Any]) -> str:
    """What was aimed at, and what came out, for every network."""
    networks = [n for n in NETWORKS if n in split]

    def gain(network: str, method: str, base: str) -> float | None:
        """Mean difference over the seeds that have both."""
        pairs = [{"": pair} for pair in split[network].values()]
        found = [
            left[0] - right[0]
            for pair in pairs
            if (left := values(pair, method, "mean")) and (right := values(pair, base, "mean"))
        ]
        return statistics.mean(found) if found else None

    def line(title: str, number: Callable[[str], float | None], reached: Callable[[float], bool]) -> str:
        found = [number(n) for n in networks]
        cells = ["" if v is None else f"{v:+.1f}{' ✓' if reached(v) else ' ✗'}" for v in found]
        measured = [v for v in found if v is not None]
        good = sum(map(reached, measured))
        return f"| {title} | " + " | ".join(cells) + f" | {good} of {len(measured)} measured |"

    def difference(a: str, b: str) -> Callable[[str], float | None]:
        return lambda network: gain(network, a, b)

    def best_without_refit(network: str) -> float | None:
        return max((v for m in NO_REFIT if (v := gain(network, m, PAPER)) is not None), default=None)

    rows = [
        line("fast path - reference pipeline, same checkpoints and images (within 3)",
             difference(*REFERENCE), lambda v: abs(v) <= 3),
        line("zip + decoder + rescaling - MuDSC zip (5 or more)",
             difference("zip + decoder + rescaling", PAPER), lambda v: v >= 5),
        line("selection + decoder + rescaling - MuDSC zip (5 or more)",
             difference("selection + decoder + rescaling", PAPER), lambda v: v >= 5),
        line("best row without a refit - MuDSC zip (5 or more)", best_without_refit, lambda v: v >= 5),
        line("best with heads - parents (-4 or better)", difference("best, heads known", "parents"), lambda v: v >= -4),
        line("best with heads - better one-body control (3 or more)",
             difference("best, heads known", BETTER_BODY), lambda v: v >= 3),
        line("best without heads - ensemble (-3 or better)",
             difference("best, without heads", "ensemble"), lambda v: v >= -3),
    ]  # fmt: skip
    head = "| mean of tasks, points | " + " | ".join(networks) + " | reached |"
    measured = [row for row in rows if not row.endswith(" 0 of 0 measured |")]
    return "\n".join([head, "|---|" + "---|" * (len(networks) + 1), *measured])


def heterogeneous_table(found: dict[str, Any]) -> str:
    """Scores of four tasks on one merged encoder."""
    pairs = found["mlp"] if "mlp" in found else next(iter(found.values()))
    methods = list(next(iter(pairs.values()))["rows"])
    lines = ["| | " + " | ".join(TASKS) + " | mean of parents' score |", "|---|" + "---|" * (len(TASKS) + 1)]
    for method in methods:
        cells = [cell([100 * p["rows"][method][t] for p in pairs.values() if method in p["rows"]]) for t in TASKS]
        share = cell([100 * p["rows"][method]["share"] for p in pairs.values() if method in p["rows"]])
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines)


def landscape_table(found: dict[str, Any]) -> str:
    """Where merges stand between the parents, and the barriers between these."""
    lines = ["| | merge | share | inside | barrier as trained | after MuDSC align |", "|---|---|---|---|---|---|"]
    for network in (n for n in NETWORKS if n in found):
        row = found[network]
        ends = [" / ".join(f"{b:.2f}" for b in barriers.values()) for barriers in row["barriers"].values()]
        for k, (merge, about) in enumerate(row["landscapes"].items()):
            cells = [
                network,
                merge,
                f"{about['share']:.0%}",
                "yes" if about["inside"] else "no",
                *(ends if k == 0 else ("", "")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(found: dict[str, Any]) -> str:
    """Seconds, of one machine."""
    lines = [
        "| | refit | one match | one merge | a whole search | search / match | its matches alone / match |",
        "|---|---|---|---|---|---|---|",
    ]

    for network, row in found.items():
        cells = [f"{row['refit']['clock']:.1f} s ({row['refit']['processor']:.1f} s)"]
        cells += [f"{1000 * row[what]['clock']:.1f} ms" for what in ("match", "merge", "search")]
        cells += [f"{row[w]['clock'] / row['match']['clock']:.1f}" for w in ("search", "search, matches alone")]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    first = next(iter(found.values()))
    about = (
        f"By the clock (of the refit also the processor's seconds), {first['images']} images, {first['threads']} "
        "threads: `python -m fashion_mnist cost`. A search matches and merges at five balances; judging the merged "
        "networks is the caller's and not in it."
    )
    return "\n".join([*lines, "", about])


def elastic_table(found: dict[str, Any], halves: dict[str, Any]) -> str:
    """Uniform and elastic widths of the same number of parameters: a row a method, budget and kind of widths.

    halves: the rows of the same pairs without a budget, among them the two controls that a refit is read against.
    """
    networks = [n for n in NETWORKS if n in found]
    seeds = {n: len(found[n]) for n in networks}
    lines = ["| | parameters | widths | " + " | ".join(f"{n} ({seeds[n]})" for n in networks) + " |"]
    lines.append("|---|---|---|" + "---|" * len(networks))
    for name in next(iter(found[networks[0]].values())):
        method, kind, budget = name.rsplit(", ", 2)
        cells = [cell([pair[name]["mean"] for pair in found[n].values() if name in pair], seeds[n]) for n in networks]
        lines.append(f"| {method} | {budget} | {kind.removesuffix(' widths')} | " + " | ".join(cells) + " |")
    lines[2:] = sorted(lines[2:], key=_by_method)
    for control in ELASTIC_CONTROLS:
        cells = [cell(values(halves.get(n, {}), control, "mean"), seeds[n]) for n in networks]
        lines.append(f"| {control} | 1.0 | uniform | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_method(line: str) -> tuple[str, str, bool]:
    _, method, budget, kind, *_ = (part.strip() for part in line.split("|"))
    return method, budget, kind == "elastic"


def sections(found: dict[str, Any]) -> dict[str, str]:
    """{marker: markdown} for everything that the document shows."""
    result = {}
    if "cost" in found:
        result["cost"] = cost_table(found["cost"])
    for split, title in SPLIT_NAMES.items():
        if split in found:
            parts = [f"**{title}.** Mean of both tasks, each among its own five classes; % of test images.", ""]
            parts += [
                table(found[split], "mean"),
                "",
                "Joint: among all ten classes.",
                "",
                table(found[split], "joint"),
            ]
            if split != "halves":
                parts += ["", "Targets:", "", targets(found[split])]
            result[split] = "\n".join(parts)
    if "halves" in found:
        result["targets"] = targets(found["halves"])
    if "landscapes" in found:
        result["landscapes"] = landscape_table(found["landscapes"])
    if "elastic" in found:
        result["elastic"] = elastic_table(found["elastic"], found.get("halves", {}))
    if "heterogeneous" in found:
        result["heterogeneous"] = heterogeneous_table(found["heterogeneous"])
    return result


def write(text: str, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def filled(document: str, parts: dict[str, str]) -> str:
    """The document with the text between `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    for name, text in parts.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        if first in document and last in document:
            before, _, rest = document.partition(first)
            document = before + first + "\n" + text + "\n" + last + rest.partition(last)[2]
    return document


@click.command("table")
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--document", type=click.Path(path_type=Path), default=DOCUMENT, show_default=True)
def main(cache: Path, results: Path, document: Path) -> None:
    """Write the results file and the document's tables from what is measured; from the results file if nothing is."""
    found = collect(cache)
    if found:
        about = {
            "command": "make quality",
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write(json.dumps({"about": about, "results": found}, indent=1) + "\n", results)
    else:
        found = json.loads(results.read_text())["results"]
    if document.exists():
        write(filled(document.read_text(encoding="utf-8"), sections(found)), document)
    for name, text in sections(found).items():
        click.echo(f"## {name}\n{text}\n")
