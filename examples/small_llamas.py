"""Two small Llamas, one trained on Python's documentation and one on its source, merged in many ways.

Both texts come with every Python: the topics of `help()` and the standard library's modules, as bytes. Prints bits per
byte on text that neither training nor calibration saw, for parents that were initialised separately and for parents
that go on from one base; writes them to a JSON file and the table of docs/quality.md. Trained parents are kept in a
folder; an interrupted run goes on. About five minutes on two cores: `python examples/small_llamas.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from fashion_mnist.methods import METHODS, ROTATED, Pair
from fashion_mnist.parents import load, save
from fashion_mnist.table import DOCUMENT, cell, filled, write
from regmean import regmean
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import mudsc_fast as mf

RESULTS = Path("benchmarks/results/small-llamas.json")
CACHE = Path("out/small_llamas")
CONTEXT, BYTES = 64, 128  # bytes a window; other bytes than ASCII's become 127
TEXTS = ("documentation", "source")
KINDS = {"separate": "separate initialisations", "base": "from one base"}
# The outputs are logits of one task, so there are no heads to keep: refits are solved for the mean of both parents'.
ROWS = {
    **{name: METHODS[name] for name in (
        "average", "weight align", "activation align", "MuDSC align", "weight zip", "activation zip (ZipIt)",
        "MuDSC zip", "zip + decoder", "selection + decoder", "zip + refit, mean",
    )},
    **{name: ROTATED[name] for name in (
        "align + rotations", "align + rotations, zip", "align + rotations, zip + decoder",
    )},
    "RegMean": lambda p: mf.installed(p.models[0], regmean(p.models, p.calibration)),
    "MuDSC align + RegMean": lambda p: after_align(p),
    "selection + refit, mean": lambda p: p.refitted(p.selected, "mean"),
    "control: first body, last layer solved, mean": lambda p: p.one_body(0, "mean"),
    "control: second body, last layer solved, mean": lambda p: p.one_body(1, "mean"),
    "control: random halves + refit, mean": lambda p: p.refitted(p.random_halves, "mean"),
}  # fmt: skip


def after_align(pair: Pair) -> nn.Module:
    """The parents in one unit order, merged by RegMean."""
    plan = pair.searched("align")
    aligned = [mf.installed(m, plan.align(s, k)) for k, (m, s) in enumerate(zip(pair.models, pair.states, strict=True))]
    return mf.installed(pair.models[0], regmean(aligned, pair.calibration))


def text(which: str) -> Tensor:
    """(bytes,) int64."""
    if which == "documentation":
        topics = importlib.import_module("pydoc_data.topics").topics
        raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        files = sorted(Path(os.__file__).parent.glob("[a-f]*.py"))
        raw = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long().clamp(max=BYTES - 1)


def windows(data: Tensor, count: int, seed: int, held_out: bool) -> Tensor:
    """(count, CONTEXT + 1): random windows of the first nine tenths of a text, or of its last tenth."""
    cut = len(data) * 9 // 10
    low, high = (cut, len(data)) if held_out else (0, cut)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(low, high - CONTEXT - 1, (count,), generator=generator)
    return data[first[:, None] + torch.arange(CONTEXT + 1)]


def build(seed: int) -> nn.Module:
    """A Llama of two layers, 96 wide, for bytes."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=BYTES, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bits(logits: Tensor, wanted: Tensor) -> float:
    """Bits a byte."""
    return float(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())) / math.log(2)


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([model(input_ids=x).logits for x in tokens[:, :-1].split(64)])


def train(model: nn.Module, texts: list[Tensor], steps: int, seed: int, what: str) -> nn.Module:
    """In place, on windows of all of `texts` in equal parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in track(range(steps), f"training {what}"):
        x = torch.cat([windows(t, 32 // len(texts), 10_000 * seed + step, False) for t in texts])
        loss = F.cross_entropy(model(input_ids=x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def parents(kind: str, seed: int, steps: int, texts: list[Tensor], cache: Path) -> list[nn.Module]:
    """One model a text, trained or read from the cache."""

    def made(name: str, start: nn.Module, read: list[Tensor], length: int, order: int) -> nn.Module:
        path = cache / f"{name}-{seed}-{steps}.safetensors"
        if path.exists():
            start.load_state_dict(load(path)[0])
        else:
            save(path, train(start, read, length, order, path.stem).state_dict(), {})
        return start.eval()

    result = []
    for k, name in enumerate(TEXTS):
        start, length = build(10 * seed + k), steps
        if kind == "base":
            base = made("base", build(500 + seed), texts, steps // 2, 500 + seed)
            start.load_state_dict(base.state_dict())
            length = steps // 2
        result.append(made(f"{kind}-{name}", start, [texts[k]], length, 10 * seed + k).requires_grad_(False))
    return result


def measure(
    kind: str, seed: int, steps: int, texts: list[Tensor], cache: Path, count: int, known: dict[str, list[float]]
) -> dict[str, list[float]]:
    """{row: bits per byte on each held-out text}; of the parents, each on its own. count: windows a text.

    known: rows that were measured before, which are taken over.
    """
    models = parents(kind, seed, steps, texts, cache)
    calibration = torch.cat([windows(t, count, 900 + seed, False) for t in texts])
    calibration = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))]
    held = [windows(t, 2 * count, 77, True) for t in texts]

    def judge(net: nn.Module) -> float:  # the next byte is in the calibration text itself
        return -bits(logits_of(net, calibration), calibration[:, 1:])

    pair = Pair(models, [], [{"input_ids": x} for x in calibration[:, :-1].split(32)], judge)  # type: ignore[misc]
    pair.spec = mf.PermutationSpec.trace(models[0], (), {"input_ids": calibration[:2, :-1]})
    each = [[logits_of(m, x) for x in held] for m in models]
    rows = {
        "parents": [bits(each[k][k], held[k][:, 1:]) for k in (0, 1)],
        "first parent": [bits(z, x[:, 1:]) for z, x in zip(each[0], held, strict=True)],
        "second parent": [bits(z, x[:, 1:]) for z, x in zip(each[1], held, strict=True)],
        "ensemble of logits": [bits((a + b) / 2, x[:, 1:]) for a, b, x in zip(*each, held, strict=True)],
    }
    for name, make in track(ROWS.items(), f"merging {kind} {seed}"):
        if name in known:
            rows[name] = known[name]
            continue
        net = make(pair).eval()
        rows[name] = [bits(logits_of(net, x), x[:, 1:]) for x in held]
    return rows


def table(found: dict[str, list[dict[str, list[float]]]]) -> str:
    """Markdown: bits a byte of both texts and their mean, by kind of parents."""
    heads = [f"{KINDS[kind]}: {what}" for kind in found for what in (*TEXTS, "mean")]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row in next(iter(found.values()))[0]:
        cells = []
        for runs in found.values():
            cells += [cell([run[row][k] for run in runs], digits=2) for k in (0, 1)]
            cells.append(cell([statistics.mean(run[row]) for run in runs], digits=2))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of each text")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure rows again that the results file has")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    texts, begin = [text(which) for which in TEXTS], time.perf_counter()
    about = {
        "command": "python examples/small_llamas.py",
        "steps": options.steps,
        "windows": options.windows,
        "torch": torch.__version__,
    }
    old = {} if options.again or not options.out.exists() else json.loads(options.out.read_text(encoding="utf-8"))
    same = old.get("about") == about
    known = {kind: dict(enumerate(old["results"].get(kind, []))) if same else {} for kind in KINDS}
    found = {
        kind: [
            measure(kind, seed, options.steps, texts, options.cache, options.windows, known[kind].get(seed, {}))
            for seed in range(options.seeds)
        ]
        for kind in KINDS
    }
    write(json.dumps({"about": about, "results": found}, indent=1) + "\n", options.out)
    if options.document.exists():
        write(filled(options.document.read_text(encoding="utf-8"), {"small-llamas": table(found)}), options.document)
    console = Console()
    console.print(table(found), soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
