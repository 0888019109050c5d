"""The shell blocks of the documents run, line by line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import torch
import yaml
from documents import DOCUMENTS, ROOT

from mudsc_fast.cli import main

pytest.importorskip("transformers")
STUDY = ROOT / "examples" / "fashion_mnist" / "README.md"  # its lines run in tests/test_fashion_mnist.py, on few images
# Processes that a line for many machines is run with here, and what each stands for.
RANKS = {"--nproc-per-node": {"4": "2", "1": "1"}, "--nnodes": {"16": "2"}}
# Lines that take minutes run on a part: {module: (words of the line in place of names, words behind it)}.
PARTS = {
    "benchmarks.proof.triton_cases": (["7"], ["0.02"]),
    "benchmarks.proof.triton_code": ([], ["--quick", "--only", "mirror_kernel"]),
}


def _kind(words: list[str]) -> str:
    """The program of a command line."""
    return next(word for word in words if "=" not in word)


def _with(kind: str) -> pytest.MarkDecorator:
    found = [d for d in DOCUMENTS if d != STUDY and any(_kind(words) == kind for words in documents.commands(d))]
    return pytest.mark.parametrize("document", found, ids=documents.name_of)


def _lines(document: Path, kind: str) -> list[list[str]]:
    return [words for words in documents.commands(document) if _kind(words) == kind]


def _process(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_program_has_a_test() -> None:
    known = {"mudsc-fast", "make", "pip", "torchrun", "python", "export"}
    assert {_kind(words) for document in DOCUMENTS for words in documents.commands(document)} <= known


@_with("mudsc-fast")
def test_mudsc_fast(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the README as processes of their own, the others in this one, which has torch already."""
    monkeypatch.chdir(tmp_path)
    documents.write_given(document, tmp_path)
    for words in _lines(document, "mudsc-fast"):
        if words[:2] == ["mudsc-fast", "mergekit"] and importlib.util.find_spec("mergekit") is None:
            continue
        words, output = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        if document.name == "README.md":
            _process([sys.executable, "-m", "mudsc_fast", *words[1:]], tmp_path)
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(words[1:]) == 0, shlex.join(words)
        if output is not None:
            Path(output).write_text(said.getvalue())
            assert yaml.safe_load(said.getvalue()), f"{shlex.join(words)} wrote nothing that can be read"


@_with("make")
def test_make(document: Path) -> None:
    """The targets with their settings, up to what they would run; of tests, the ones that are named are found."""
    for words in _lines(document, "make"):
        given = words[words.index("make") + 1 :]
        target, settings = given[0], dict(word.split("=", 1) for word in given[1:])
        planned = _process(["make", "-n", *given, f"PYTHON={sys.executable}"], ROOT)
        arguments = settings.get("ARGS", "")
        if target == "test" and arguments:
            assert f"-m pytest {arguments}" in planned
            files = [word for word in shlex.split(arguments) if word.startswith("tests/")]
            assert all((ROOT / file).is_file() for file in files)
            if not files:
                assert shlex.split(arguments) == ["-m", "not slow"]
                continue
            _process([sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(arguments)], ROOT)
        for script in re.findall(r"\bpython3? ((?:examples|scripts)/\S+\.py)", planned):
            assert (ROOT / script).is_file()


@_with("pip")
def test_pip(document: Path) -> None:
    """`pip install .` with extras that there are; tests/test_packaging.py installs the package."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
    for words in _lines(document, "pip"):
        assert words[:2] == ["pip", "install"]
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert found is not None
        assert len(words) == 3
        assert set((found.group(1) or "test").split(",")) <= extras


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@_with("torchrun")
def test_torchrun(document: Path, tmp_path: Path) -> None:
    """With fewer processes, all on this machine."""
    documents.write_given(document, tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for words in _lines(document, "torchrun"):
        words = [word.replace("first-machine:29500", f"localhost:{port}") for word in words]
        for option, less in RANKS.items():
            if option in words:
                words[words.index(option) + 1] = less[words[words.index(option) + 1]]
        machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(machines)
        ]
        said = [process.communicate(timeout=240)[0].decode() for process in running]
        assert [process.returncode for process in running] == [0] * machines, shlex.join(words) + "\n".join(said)
        assert (tmp_path / words[words.index("-o") + 1]).exists()


@pytest.mark.slow
@_with("python")
def test_python_modules(document: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no wheel for this system")
    for words in _lines(document, "python"):
        assert words[1] == "-m"
        names, behind = PARTS[words[2]]
        assert len(words) == 3 + len(names)
        said = _process([sys.executable, "-m", words[2], *names, *behind], ROOT)
        assert yaml.safe_load(said), "records as JSON"
