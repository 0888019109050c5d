"""A refit at a large language model's widths: `make refit-scale`.

Two parents of Llama-3-8B's width are made, a random bfloat16 decoder layer and the same with noise, and merged unit by
unit. `mf.refit` solves the merged layer on random tokens: seconds and the largest resident memory of every projection,
and the error of the decoder layer's output before and after, on those tokens and on others. Each run is a process of
its own; one keeps the activations in memory, one in a file, and one solves every projection in the plain way.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.scale import RESULTS, ROOT, about

WAYS = ("memory", "spill", "plain")


@dataclass(frozen=True)
class Case:
    """Sizes of a Llama of one decoder layer, and of the calibration."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    batches: int
    rows: int
    tokens: int
    ridge: float = 1.0
    noise: float = 0.5
    seed: int = 3


CASES = {
    # The vocabulary is cut down from 128,256, which changes nothing but the embedding and the last layer.
    "refit-llama-8b-width": Case("refit-llama-8b-width", 4096, 14336, 32, 8, 4096, 8, 2, 256),
    "half": Case("half", 2048, 7168, 16, 4, 4096, 8, 2, 128),
    "small": Case("small", 64, 224, 4, 2, 256, 4, 2, 32),
}


def parents(case: Case) -> list[nn.Module]:
    """Two models of one decoder layer, bfloat16: a random one, and it with noise on every tensor."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=case.hidden, intermediate_size=case.mlp, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, num_hidden_layers=1, vocab_size=case.vocabulary, rope_theta=500000.0,
        max_position_embeddings=8192, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    found = []
    for m in range(2):
        net = copy.deepcopy(empty).to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
        net.model.rotary_emb = type(net.model.rotary_emb)(config)
        for k, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(1000 * case.seed + k)
            flat = parameter.dim() == 1
            deviation = 0.1 if flat else 1.0 if k == 0 else parameter.shape[1] ** -0.5
            x = torch.randn(parameter.shape, generator=generator).mul_(deviation)
            if k == 0:  # the embedding: as in trained models, some directions are far stronger than others
                x *= torch.arange(1, x.shape[1] + 1) ** -0.75
            if m and not flat:
                x += torch.randn(x.shape, generator=generator).mul_(case.noise * deviation)
            parameter.copy_(x.add_(1.0) if flat else x)
        found.append(net)
    return found


def tokens(case: Case, seed: int, batches: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, case.vocabulary, (batches, case.rows, case.tokens), generator=generator)
    return [{"input_ids": x, "use_cache": False} for x in drawn]  # type: ignore[dict-item]


def layer_error(merged: nn.Module, models: Sequence[nn.Module], batches: Sequence[dict[str, Tensor]]) -> float:
    """Squared error of the decoder layer's output, over the variance of what it should be: the parents' mean."""
    found: list[Tensor] = []
    hooks = [
        net.get_submodule("model.layers.0").register_forward_hook(
            lambda module, given, y: found.append((y[0] if isinstance(y, tuple) else y).float())
        )
        for net in (merged, *models)
    ]
    wrong, size = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            found.clear()
            for net in (merged, *models):
                net.get_submodule("model")(**batch)
            wanted = torch.stack(found[1:]).mean(0)
            wrong += float((found[0] - wanted).double().square().sum())
            size += float((wanted - wanted.mean((0, 1))).double().square().sum())
    for hook in hooks:
        hook.remove()
    return wrong / size


def plain_solve(layer: Any, ridge: float) -> bool:
    """One projection with torch alone: all samples in float64, X'X and X'R by products, one general solve."""
    call = layer.calls[0]
    pairs = [(c.x.flatten(0, -2).double(), (t - c.y).flatten(0, -2).double()) for c, t in layer.targets()]
    x, r = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    gram = x.T @ x / len(x)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    step = torch.linalg.solve(gram, x.T @ r / len(x)).T
    weight = layer.merged.get_parameter(call.weight)
    weight.copy_(weight.double() + step)
    for each in layer.calls:
        each.y.copy_(each.apply(each.x, weight, None))
    return True


# ---- one run, in a process of its own ----


def peak_megabytes() -> float:
    """The largest resident memory since the last call (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return high * 1024 / 1e6


def run(case: Case, way: str, folder: str) -> dict[str, Any]:
    """Merge and refit; every projection's seconds and memory."""
    from mudsc_fast import MergePlan, PermutationSpec, installed, refit
    from mudsc_fast.repairs import refitting

    begin = time.perf_counter()
    models = parents(case)
    spec = PermutationSpec.trace(models[0], (), {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    plan = MergePlan(spec, {s.name: torch.arange(s.width).repeat(2, 1) for s in spec.spaces}, "align")
    merged = installed(models[0], plan.merge([m.state_dict() for m in models]))
    batches = tokens(case, case.seed, case.batches)
    held = tokens(case, 10 + case.seed, max(1, case.batches // 4))
    before = [layer_error(merged, models, x) for x in (batches, held)]
    rows: list[dict[str, Any]] = []
    solver: Any = refitting._Solver
    solve = solver.solve

    def timed(self: Any, layer: Any) -> bool:
        between, start, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
        changed = plain_solve(layer, case.ridge) if way == "plain" else solve(self, layer)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        row = {"layer": layer.weight, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
        rows.append({**row, "peak_mb": round(peak_megabytes()), "passes_mb": round(between)})
        return bool(changed)

    solver.solve = timed
    # The file should lie on a disk: where temporary files are kept in memory, a file there saves nothing.
    spill = folder if way == "spill" else None
    peak_megabytes()
    ready, start, cpu = time.perf_counter() - begin, time.perf_counter(), time.process_time()
    refit(merged, models, batches, plan, ridge=case.ridge, part="inner", **({} if spill is None else {"spill": spill}))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = [layer_error(merged, models, x) for x in (batches, held)]
    sizes = [sum(p.numel() * p.element_size() for p in net.parameters()) for net in (merged, *models)]
    return {
        "way": way,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "setup_seconds": round(ready, 1),
        "models_mb": round(sum(sizes) / 1e6),
        "peak_mb": max(max(row["peak_mb"], row["passes_mb"]) for row in rows),
        "samples": case.batches * case.rows * case.tokens,
        "error_before": {"calibration": before[0], "held_out": before[1]},
        "error_after": {"calibration": after[0], "held_out": after[1]},
        "layers": rows,
    }


def measured(case: Case, ways: Sequence[str], folder: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for way in ways:
        command = [sys.executable, "-m", "benchmarks.refit_scale", "--case", case.name, "--run", way, "--spill", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way}: {done.stderr[-2000:]}")
        result = json.loads(done.stdout)
        say(f"{way}: {result['seconds']} s, peak {result['peak_mb']} MB")
        yield result


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: seconds and peak of every projection, by way."""
    head = " | ".join(f"{run['way']}: s | GB" for run in runs)
    lines = [f"| | {head} |", "|---|" + "---|" * (2 * len(runs))]
    for k, row in enumerate(runs[0]["layers"]):
        cells = " | ".join(f"{r['layers'][k]['seconds']:.1f} | {r['layers'][k]['peak_mb'] / 1000:.1f}" for r in runs)
        lines.append(f"| {row['layer'].removeprefix('model.layers.0.').removesuffix('.weight')} | {cells} |")
    whole = " | ".join(f"{run['seconds']:.0f} | {run['peak_mb'] / 1000:.1f}" for run in runs)
    return [*lines, f"| the decoder layer, with all passes | {whole} |"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="refit-llama-8b-width")
    parser.add_argument("--ways", default=",".join(WAYS), help="of memory, spill, plain")
    parser.add_argument("--spill", help="a folder on a disk; default: beside the results")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/CASE.json")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    if options.run:
        sys.stdout.write(json.dumps(run(case, options.run, options.spill)) + "\n")
        return 0
    console = Console(stderr=True)
    path = options.json or RESULTS / f"{case.name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    runs = {r["way"]: r for r in known.get("runs", [])} if known.get("case") == asdict(case) else {}
    with tempfile.TemporaryDirectory(dir=options.spill or path.resolve().parent) as folder:
        for result in measured(case, options.ways.split(","), folder, console.print):
            runs[result["way"]] = result
    ordered = [runs[way] for way in WAYS if way in runs]
    result = {"about": {**about(), "command": "make refit-scale"}, "case": asdict(case), "runs": ordered}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    console.print("\n".join(table(ordered)), markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
