"""Merges of checkpoints that are larger than the memory they may use: `make scale`.

Two checkpoints of Llama-3-8B's width are made: random bfloat16 weights, and the same under a planted random permutation
of all spaces plus noise. The command line aligns and merges them under a memory limit, each command in a process of its
own whose resident memory is watched. The planted permutation must come back exactly, and the logits of the results,
loaded by transformers, are compared with the parents'. Everything is written to one JSON file and a plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale_watch import run_logged, watched

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "images" / "scale-memory.png"
GB = 10**9


@dataclass(frozen=True)
class Case:
    """Sizes of a Llama, and the limit of its merge."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    limit: str
    shard: str
    noise: float = 0.01
    seed: int = 3

    def config(self) -> Any:
        import transformers

        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            rope_theta=500000.0,
            max_position_embeddings=8192,
            dtype="bfloat16",
            bos_token_id=1,
            eos_token_id=2,
        )


CASES = {
    # The vocabulary is cut down from 128,256, which changes nothing but the size of two tensors.
    "llama-8b-width": Case("llama-8b-width", 4096, 14336, 32, 8, 4, 8192, "4GB", "1GB"),
    "small": Case("small", 128, 448, 8, 2, 2, 512, "900MB", "500KB"),
}


def make_pair(case: Case, folder: Path, permutation: Mapping[str, Tensor]) -> None:
    """Write the folders a and b, which is a in another unit order with noise. One tensor is in memory at a time."""
    from mudsc_fast.axes import axis_labels, take
    from mudsc_fast.checkpoints import CheckpointWriter, TensorInfo

    model, spec = _empty(case)
    labels = {name: torch.argsort(order) for name, order in permutation.items()}
    layout = {name: TensorInfo(tuple(x.shape), torch.bfloat16) for name, x in model.state_dict().items()}
    for name in "ab":
        with CheckpointWriter(folder / name, layout, max_shard_size=case.shard) as writer:
            for k, (key, info) in enumerate(layout.items()):
                generator = torch.Generator().manual_seed(1000 * case.seed + k)
                x = _random(key, info.shape, generator)
                if name == "b":
                    for part in axis_labels(spec, key, info.shape, labels):
                        x = take(x, part.dims, torch.argsort(part.labels))
                    noise = torch.randn(info.shape, generator=generator).mul_(case.noise * float(x.float().std()))
                    x = (noise.add_(x.float())).to(torch.bfloat16)
                writer.write(key, x)
        case.config().save_pretrained(folder / name)
        _name_architecture(folder / name / "config.json")


def _empty(case: Case) -> tuple[Any, Any]:
    import transformers

    from mudsc_fast import PermutationSpec

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(case.config())
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    return model, PermutationSpec.trace(model, (), {"input_ids": ids})


def _seed_of(case: Case) -> int:
    """A seed whose first visit is the residual stream's.

    In weight space alone an MLP that is visited before the residual stream is matched by noise, and visited again.
    """
    names = [space.name for space in _empty(case)[1].spaces]
    for seed in range(1000):
        if names[int(torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[0])] == "residual":
            return seed
    return 0


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    return (x.mul_(0.1).add_(1.0) if len(shape) == 1 else x.mul_(shape[-1] ** -0.5)).to(torch.bfloat16)


def _name_architecture(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}, indent=2) + "\n")


# ---- is the result right? ----


def check_labels(plan_file: Path, permutation: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many units of how many spaces were given back their planted place."""
    from mudsc_fast import MergePlan

    plan = MergePlan.load(plan_file)
    # Unit i of b is unit permutation[i] of a, so it must have this label.
    right = {name: int((plan.labels[name][1] == order).sum()) for name, order in permutation.items()}
    return {
        "spaces": len(permutation),
        "exact_spaces": sum(right[name] == len(order) for name, order in permutation.items()),
        "units": sum(len(order) for order in permutation.values()),
        "right_units": sum(right.values()),
        "sweeps": len(plan.history),
        "value": plan.history[-1],
    }


def compare_logits(folder: Path, names: list[str], tokens: Tensor) -> dict[str, float]:
    """Largest difference of each model's logits from those of a, over the largest logit of a."""
    logits = {}
    for name in names:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder / name), dtype=torch.float32)
        with torch.no_grad():
            logits[name] = model.eval()(tokens).logits
        del model
    scale = logits["a"].abs().max()
    found = {name: float((logits[name] - logits["a"]).abs().max() / scale) for name in names if name != "a"}
    found["b_aligned from b"] = float((logits["b_aligned"] - logits["b"]).abs().max() / scale)
    return {name: float(f"{value:.3g}") for name, value in found.items()}


# ---- the whole ----


def measure(case: Case, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the pair, merge and align it, check both; all figures."""
    start = time.perf_counter()
    permutation = _empty(case)[1].random_permutation(case.seed)
    if not (work / "b").exists():
        make_pair(case, work, permutation)
        say(f"made two checkpoints in {time.perf_counter() - start:.0f} s")
    a, b, plan = str(work / "a"), str(work / "b"), work / "plan.safetensors"
    common = ["--max-memory", case.limit, "--max-shard-size", case.shard, "-q"]
    seed = str(_seed_of(case))
    runs = {}
    arguments = ["merge", a, b, "-o", str(work / "merged"), "--save-plan", str(plan), "--seed", seed, *common]
    runs["merge"] = watched(arguments, work / "merge.log")
    say(f"merged: {runs['merge']['seconds']} s, peak {runs['merge']['peak_resident_mb']} MB")
    arguments = ["align", a, b, "-o", str(work / "b_aligned"), "--plan", str(plan), *common]
    runs["align"] = watched(arguments, work / "align.log")
    say(f"aligned: {runs['align']['seconds']} s, peak {runs['align']['peak_resident_mb']} MB")
    runs["average"] = watched(
        ["merge", a, b, "-o", str(work / "average"), "--method", "average", *common], work / "average.log"
    )
    labels = check_labels(plan, permutation)
    say(f"planted permutation: {labels}")
    tokens = torch.randint(0, case.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = compare_logits(work, ["a", "b", "b_aligned", "merged", "average"], tokens)
    say(f"logits: {logits}")
    sizes = {name: sum(f.stat().st_size for f in (work / name).glob("*.safetensors")) for name in ("a", "merged")}
    return {"case": asdict(case), "bytes": sizes, "runs": runs, "planted": labels, "logits": logits}


LARGE = {
    "Llama-3-8B": (Case("8b", 4096, 14336, 32, 8, 32, 128256, "5GB", "5GB"), ("5GB", "16GB")),
    "Llama-3-70B": (Case("70b", 8192, 28672, 64, 8, 80, 128256, "14GB", "5GB"), ("14GB", "64GB")),
}


def extrapolate(result: Mapping[str, Any]) -> dict[str, Any]:
    """What whole models cost: their plans of work, at the rates that were measured on four layers."""
    from mudsc_fast.workplan import TensorShape, plan_work

    run = result["runs"]["merge"]
    wide, spec = _empty(Case(**result["case"]))
    small = {name: TensorShape(tuple(x.shape), torch.bfloat16) for name, x in wide.state_dict().items()}
    flops = {step.spaces[0]: step.flops for step in plan_work(spec, small, 2).steps}
    visits = [step for step in run["steps"] if "visit" in step and flops[step["visit"][0]] > 1e11]
    rate = sum(flops[v["visit"][0]] for v in visits) / sum(v["cpu_seconds"] for v in visits)
    begin = next(step for step in run["steps"] if step.get("write") == "begin")
    end = next(step for step in run["steps"] if step.get("write") == "end")
    writing = result["bytes"]["merged"] / (end["cpu"] - begin["cpu"])
    found: dict[str, Any] = {"flops_a_cpu_second": round(rate / 1e9) * 1e9, "written_a_cpu_second": round(writing)}
    for name, (case, limits) in LARGE.items():
        model, spec = _empty(case)
        layout = {key: TensorShape(tuple(x.shape), torch.bfloat16) for key, x in model.state_dict().items()}
        size = sum(2 * x.numel() for x in model.state_dict().values())
        rows = []
        for limit in limits:
            plan = plan_work(spec, layout, 2, max_memory=_bytes(limit), base=600_000_000)
            sweep = sum(step.flops for step in plan.steps)
            residual = plan.step_of("residual").flops
            rows.append(
                {
                    "limit": limit,
                    "peak_gb": round(plan.peak / 1e9, 1),
                    "residual": plan.step_of("residual").way,
                    "mlp": plan.step_of("layers.0.mlp").way,
                    "sweep_cpu_hours": round(sweep / rate / 3600, 2),
                    "whole_cpu_hours": round((sweep + residual + 0.0) / rate / 3600 + size / writing / 3600, 2),
                }
            )
        try:
            plan_work(spec, layout, 2, max_memory=1, base=600_000_000)
        except ValueError as error:
            least = int(str(error).split("at least ")[1].split()[0])
        found[name] = {"checkpoint_gb": round(size / 1e9, 1), "least_gb": round(least / 1e9, 1), "rows": rows}
    return found


def tables(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The lines of the two tables in docs/scale.md: the measured steps, and whole models."""
    case, run = result["case"], result["runs"]["merge"]
    visits: dict[str, list[Mapping[str, Any]]] = {}
    for step in run["steps"]:
        if "visit" in step:
            kind = step["visit"][0].split(".")[-1]
            name = {"residual": "the residual stream", "mlp": "an MLP"}.get(kind, "the heads of a layer")
            visits.setdefault(name, []).append(step)
    lines = ["| step | how | visits | CPU seconds each |", "|---|---|---|---|"]
    for name, steps in visits.items():
        each = sum(step["cpu_seconds"] for step in steps) / len(steps)
        ways = " and ".join(sorted({"one by one" if step["way"] == "streamed" else "together" for step in steps}))
        lines.append(f"| {name} | {ways} | {len(steps)} | {each:.1f} |")
    begin = next(step for step in run["steps"] if step.get("write") == "begin")
    end = next(step for step in run["steps"] if step.get("write") == "end")
    first = next(step for step in run["steps"] if "visit" in step)
    writing = (end["cpu"] - begin["cpu"]) / case["layers"]
    lines += [
        f"| reading, averaging and writing a layer | | {case['layers']} | {writing:.1f} |",
        f"| start: imports, tracing the spec | | 1 | {first['cpu'] - first['cpu_seconds']:.1f} |",
        f"| the whole command | | 1 | {run['cpu_seconds']:.0f} |",
    ]
    wide = ["| model | limit | residual stream | MLPs | peak | a sweep, CPU | the match above and the merge, CPU |"]
    wide.append("|---|---|---|---|---|---|---|")
    words = {"joint": "together", "streamed": "one by one"}
    for name in LARGE:
        found = result["extrapolated"][name]
        for row in found["rows"]:
            cells = [f"{name} ({found['checkpoint_gb']} GB; least {found['least_gb']} GB)", row["limit"]]
            cells += [words[row["residual"]], words[row["mlp"]], f"{row['peak_gb']} GB"]
            cells += [f"{row['sweep_cpu_hours']} h", f"{row['whole_cpu_hours']} h"]
            wide.append("| " + " | ".join(cells) + " |")
    return lines, wide


def about() -> dict[str, Any]:
    """Where this was measured."""
    import transformers

    import mudsc_fast

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": "make scale",
        "cpu": model,
        "threads": torch.get_num_threads(),
        "versions": {
            "mudsc_fast": mudsc_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The resident memory of the merge over time, with its steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    case, run = result["case"], result["runs"]["merge"]
    figure, axes = pyplot.subplots(figsize=(8, 3.8), dpi=90)
    limit = _bytes(case["limit"]) / 1e9
    colours = {"residual stream": "tab:orange", "MLPs": "tab:green"}
    for step in run["steps"]:
        if "visit" in step and step["seconds"] > 0.01 * run["seconds"]:
            kind = "residual stream" if step["visit"][0] == "residual" else "MLPs"
            offset = run["seconds"] - run["steps"][-1]["at"]
            start, end = offset + step["at"] - step["seconds"], offset + step["at"]
            axes.axvspan(start, end, alpha=0.18, color=colours[kind], lw=0)
    for kind, colour in colours.items():
        axes.axvspan(0, 0, alpha=0.3, color=colour, lw=0, label=f"matching: {kind}")
    axes.plot([t for t, _ in run["curve"]], [m / 1e3 for _, m in run["curve"]], color="tab:blue", label="held")
    axes.axhline(limit, color="tab:red", lw=1.2, ls="--", label=f"--max-memory {case['limit']}")
    axes.set(xlabel="seconds", ylabel="resident memory, GB", ylim=(0, 1.15 * max(limit, 0.1)))
    size = result["bytes"]["a"] / 1e9
    axes.set_title(f"Merging two checkpoints of {size:.1f} GB, {case['layers']} layers of width {case['hidden']}")
    figure.legend(loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _bytes(size: str) -> int:
    from mudsc_fast.checkpoints import parse_size

    return parse_size(size)


@contextmanager
def temporary(folder: Path | None) -> Iterator[Path]:
    """The folder, or a temporary one that is removed afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    made = Path(tempfile.mkdtemp(prefix="mudsc-scale-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def main() -> int:
    """Measure a case and write its results file and plot."""
    if sys.argv[1:2] == ["--run"]:
        return run_logged(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), default="llama-8b-width")
    parser.add_argument("--work", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    parser.add_argument("--make", action="store_true", help="only make the checkpoints in --work")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/scale-CASE.json)")
    parser.add_argument("--plot", type=Path, help="plot of the memory (default: docs/images/scale-memory.png)")
    given = parser.parse_args()
    case = CASES[given.case]
    if given.make:
        given.work.mkdir(parents=True, exist_ok=True)
        make_pair(case, given.work, _empty(case)[1].random_permutation(case.seed))
        return 0
    with temporary(given.work) as work:
        result = {"about": about(), **measure(case, work, lambda text: sys.stderr.write(text + "\n"))}
    if case.name == "llama-8b-width":
        result["extrapolated"] = extrapolate(result)
    out = given.out or RESULTS / f"scale-{case.name}.json"
    out.write_text(json.dumps(result, indent=None, separators=(",", ":")).replace('"runs"', '\n"runs"') + "\n")
    draw(result, given.plot or PLOT)
    sound = result["planted"]["exact_spaces"] == result["planted"]["spaces"]
    within = all(run["peak_resident_mb"] * 1e6 <= _bytes(case.limit) for run in result["runs"].values())
    return 0 if sound and within else 1


if __name__ == "__main__":
    sys.exit(main())
