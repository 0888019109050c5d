"""What the documents show works: their Python runs, their commands run, their make targets and links exist."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import language_models
import pytest
import torch
import yaml
from networks import MLP
from safetensors.torch import save_file

from mudsc_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
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
    _write_what_it_shows(document, tmp_path)
    models = _models()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 12, generator=generator) for _ in range(3)]
    states = [model.state_dict() for model in models]
    namespace = {"torch": torch, "models": models, "batches": batches, "states": states}
    for text in _blocks(document, "python"):
        exec(compile(text, str(document), "exec"), namespace)
    if document.name == "README.md":
        assert set(namespace["merged"]) == set(states[0])


def _write_what_it_shows(document: Path, folder: Path) -> None:
    """Its configuration files, as run.yml and config.yml, and tiny models for the folders named in the latter."""
    for text in _blocks(document, "yaml"):
        if "merge_method" not in text:
            (folder / "run.yml").write_text(text)
            continue
        (folder / "config.yml").write_text(text)
        model = language_models.network("Llama", 0)
        for seed, name in enumerate(sorted(set(re.findall(r": \./(\w+)$", text, re.MULTILINE)))):
            language_models.save(model, language_models.tuned(model, seed), folder / name)


@pytest.mark.parametrize("document", _documents_with("mudsc-fast"), ids=_id)
def test_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the README as processes of their own, the others in this one, which has torch already."""
    monkeypatch.chdir(tmp_path)
    for name, model in zip("ab", _models(), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    _write_what_it_shows(document, tmp_path)
    for words in _commands(document):
        if words[:2] == ["mudsc-fast", "mergekit"] and importlib.util.find_spec("mergekit") is None:
            continue
        if words[0] == "mudsc-fast" and document.name != "README.md":
            assert main(words[1:]) == 0, shlex.join(words)
        elif words[0] == "mudsc-fast":
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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_id)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit notebooks without outputs"
            exec(compile("".join(cell["source"]), str(notebook), "exec"), namespace)
    if notebook.stem == "first_merge":
        scores = namespace["scores"]
        assert scores["zip"] > max(scores["model a"], scores["model b"], scores["average"])
        assert (tmp_path / "first_merge.png").stat().st_size > 10_000


def test_the_site_names_what_exists() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages(site["nav"])) <= there
    for document in DOCUMENTS:
        for name in re.findall(r"^::: (\S+)$", document.read_text(encoding="utf-8"), re.MULTILINE):
            found = pkgutil.resolve_name(name)
            assert found.__doc__, f"{document.name}: {name} has no docstring"


def test_pictures_of_the_rules_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    drawn = importlib.import_module("draw_rules").draw(tmp_path)
    shown = sorted((ROOT / "docs" / "images" / "rules").glob("*.png"))
    assert [path.name for path in drawn] == [path.name for path in shown]
    assert all(path.stat().st_size > 2000 for path in drawn)
