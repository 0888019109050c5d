"""What the documents show works: their Python runs, their links and names exist, and no block is left unrun."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import documents
import pytest
import torch
import yaml
from documents import DOCUMENTS, FENCE, ROOT

NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
pytest.importorskip("transformers")


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if documents.blocks(d, "python")], ids=documents.name_of)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace that already has two models, some inputs, and the models' state dicts."""
    monkeypatch.chdir(tmp_path)
    documents.write_given(document, tmp_path)
    models = documents.models()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 12, generator=generator) for _ in range(3)]
    states = [model.state_dict() for model in models]
    namespace = {"torch": torch, "models": models, "batches": batches, "states": states}
    for text in documents.blocks(document, "python"):
        exec(compile(text, str(document), "exec"), namespace)
    if document.name == "README.md":
        assert set(namespace["merged"]) == set(states[0])


# Who runs the blocks of a language. There is no list of blocks that nobody runs.
RUN_BY = {
    "python": "test_python_blocks_run",
    "sh": "tests/test_docs_commands.py",
    "diff": "tests/test_docs_diffs.py",
    "yaml": "the commands beside it, which test_yaml_blocks_are_read finds",
}
# Nothing to run: the arrows of the data flow.
PICTURES = {"docs/design.md": "checkpoints --calibrate-->"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name_of)
def test_no_block_is_left_out(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    found = documents.all_blocks(document)
    # Fences of other kinds (indented, with attributes, of tildes) would be overlooked: there are none.
    assert 2 * len(found) == len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE))
    pictures = [block for language, block in found if language == "text"]
    assert len(pictures) == (documents.name_of(document) in PICTURES)
    assert all(block.startswith(PICTURES[documents.name_of(document)]) for block in pictures)
    assert {language for language, _ in found} <= {*RUN_BY, "text"}, "a block of a language that no test runs"
    if documents.blocks(document, "diff"):
        assert documents.name_of(document) == "docs/adapters.md", "tests/test_docs_diffs.py reads that file alone"
    assert "<pre" not in text
    assert "..." not in "".join(block for language, block in found if language in ("sh", "diff", "yaml"))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if documents.blocks(d, "yaml")], ids=documents.name_of)
def test_yaml_blocks_are_read(document: Path) -> None:
    targets = [documents.target_of(text) for text in documents.blocks(document, "yaml")]
    assert len(targets) == len(set(targets)), "two blocks for one file: the first would not be read"
    lines = [" ".join(words) for words in documents.commands(document)] + documents.blocks(document, "diff")
    for target in targets:
        asked = "--config-dir pools" if target.startswith("pools/") else target
        assert any(asked in line for line in lines), f"{document.name}: no command reads {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name_of)
def test_make_targets_and_links_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    made = [words[words.index("make") + 1] for words in documents.commands(document) if "make" in words]
    asked = {*re.findall(r"`make ([a-z-]+)", text), *made}
    assert asked <= targets
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", text)):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=documents.name_of)
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
    assert set(pages(site["nav"])) == there
    assert "pymdownx.highlight" in site["markdown_extensions"], "code has no colours without it"
    for document in DOCUMENTS:
        for name in re.findall(r"^::: (\S+)$", document.read_text(encoding="utf-8"), re.MULTILINE):
            found = pkgutil.resolve_name(name)
            assert found.__doc__, f"{document.name}: {name} has no docstring"


def test_lines_about_arguments_become_a_list_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made = importlib.import_module("docstring_sections").with_sections
    text = "Do it.\n\nwidth: units. seed, tries: of the\n    order. Note: zip: no.\n\nnote: no argument.\nmode: which."
    assert made(text, ["width", "seed", "tries", "mode"]) == (
        "Do it.\n\nArgs:\n    width: units.\n    seed: of the order. Note: zip: no.\n    tries: see `seed`.\n"
        "    mode: which.\n\nnote: no argument."
    )
    assert made("Width: none.\n\nRaises ValueError.", ["width"]) == "Width: none.\n\nRaises ValueError."


def _referenced() -> list[tuple[str, Any]]:
    """Every function, class and method on the reference pages."""
    found: dict[int, tuple[str, Any]] = {}
    for document in DOCUMENTS:
        for name in re.findall(r"^::: (\S+)$", document.read_text(encoding="utf-8"), re.MULTILINE):
            whole = pkgutil.resolve_name(name)
            parts = vars(whole).values() if inspect.ismodule(whole) else [whole]
            for part in [p for p in parts if getattr(p, "__module__", "").startswith("mudsc_fast")]:
                inner = [m for m in vars(part).values() if inspect.isfunction(m)] if inspect.isclass(part) else []
                for each in (part, *inner):
                    if callable(each) and each.__doc__:
                        found[id(each)] = (f"{each.__module__}.{each.__qualname__}", each)
    return list(found.values())


def test_arguments_in_docstrings_are_those_of_the_signature() -> None:
    """`mkdocs build --strict` stops at others; it is not among what the tests install."""
    looked = 0
    for name, each in _referenced():
        section = re.search(r"^Args:\n((?: {4}.*\n?)+)", inspect.cleandoc(each.__doc__) + "\n", re.MULTILINE)
        if section is None:
            continue
        parameters = inspect.signature(each).parameters
        for entry in re.findall(r"^ {4}(\S.*?):", section.group(1), re.MULTILINE):
            assert entry.lstrip("*") in parameters, f"{name}: {entry!r} is no argument"
            looked += 1
    assert looked > 20


def test_pictures_of_the_rules_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    drawn = importlib.import_module("draw_rules").draw(tmp_path)
    shown = sorted((ROOT / "docs" / "images" / "rules").glob("*.png"))
    assert [path.name for path in drawn] == [path.name for path in shown]
    assert all(path.stat().st_size > 2000 for path in drawn)
