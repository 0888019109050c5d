"""The documents' code blocks, and the files that they take as given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import language_models
import torch
import yaml
from networks import MLP
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def all_blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def blocks(document: Path, language: str) -> list[str]:
    return [text for found, text in all_blocks(document) if found == language]


def commands(document: Path) -> list[list[str]]:
    """The command lines of the shell blocks, split into words, without comments."""
    text = "".join(blocks(document, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def target_of(text: str) -> str:
    """The name under which a YAML block is saved by a reader of the document."""
    if "merge_method" in text:
        return "config.yml"
    return "pools/modelpool/two.yaml" if "_target_" in text else "run.yml"


def yaml_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def models() -> list[MLP]:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(MLP(inputs=12, widths=(16, 16), num_outputs=4).eval())
    return made


def write_given(document: Path, folder: Path) -> None:
    """Its configuration files, two networks as files, and tiny language models in the folders that it names."""
    for name, model in zip("ab", models(), strict=True):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    named = set()
    for text in blocks(document, "yaml"):
        path = folder / target_of(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        named |= set(re.findall(r": \./(\w+)$", text, re.MULTILINE))
    words = {word for line in commands(document) for word in line}
    named |= {"a", "b", "folder", "base", "tuned"} & words
    if named:
        model = language_models.network("Llama", 0)
        for seed, name in enumerate(sorted(named)):
            language_models.save(model, language_models.tuned(model, seed), folder / name)
    (folder / "lines.txt").write_text("w3 w4 w5 w6\nw7 w8 w9 w10\n" * 8)
