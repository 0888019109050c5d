"""What the documents show works: their Python runs, their commands run, their make targets and links exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import language_models
import pytest
import torch
from networks import MLP
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(document.read_text(encoding="utf-8")) if language in languages]


def _commands(document: Path) -> list[list[str]]:
    """The command lines of the shell blocks, split into words, without comments."""
    text = "".join(_blocks(document, "sh", "bash", "console")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def _documents_with(kind: str) -> list[Path]:
    if kind == "python":
        return [document for document in DOCUMENTS if _blocks(document, "python")]
    return [document for document in DOCUMENTS if any(words[0] == kind for words in _commands(document))]


def _id(document: Path) -> str:
    return str(document.relative_to(ROOT))


def _models() -> list[MLP]:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(MLP(inputs=12, widths=(16, 16), num_outputs=4).eval())
    return models


@pytest.mark.parametrize("document", _documents_with("python"), ids=_id)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace that already has two models, some inputs, and the models' state dicts."""
    monkeypatch.chdir(tmp_path)
    models = _models()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 12, generator=generator) for _ in range(3)]
    states = [model.state_dict() for model in models]
    namespace = {"torch": torch, "models": models, "batches": batches, "states": states}
    for text in _blocks(document, "python"):
        exec(compile(text, str(document), "exec"), namespace)
    if document.name == "README.md":
        assert set(namespace["merged"]) == set(states[0])


def _for_mergekit(document: Path, folder: Path) -> None:
    """The configuration that the document shows, as config.yml, and tiny models of the names in it."""
    configs = [text for text in _blocks(document, "yaml") if "merge_method" in text]
    if not configs:
        return
    (folder / "config.yml").write_text(configs[0])
    model = language_models.network("Llama", 0)
    for seed, name in enumerate(sorted(set(re.findall(r": \./(\w+)$", configs[0], re.MULTILINE)))):
        language_models.save(model, language_models.tuned(model, seed), folder / name)


@pytest.mark.parametrize("document", _documents_with("mudsc-fast"), ids=_id)
def test_commands_run(document: Path, tmp_path: Path) -> None:
    for name, model in zip("ab", _models(), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    _for_mergekit(document, tmp_path)
    for words in _commands(document):
        if words[:2] == ["mudsc-fast", "mergekit"] and importlib.util.find_spec("mergekit") is None:
            continue
        if words[0] == "mudsc-fast":
            done = subprocess.run(
                [sys.executable, "-m", "mudsc_fast", *words[1:]],
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_make_targets_and_links_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    asked = set(re.findall(r"`make ([a-z]+)", text)) | {
        word for words in _commands(document) if "make" in words for word in words[words.index("make") + 1 :][:1]
    }
    assert asked <= targets
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", text)):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
