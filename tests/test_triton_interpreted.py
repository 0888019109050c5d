"""Proof A of the Triton kernels: their source in Triton's interpreter, in processes of its own (a kernel is one or the
other for good)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parent.parent


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton has no wheel for this system"
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 9) and versions[1] >= (2, 4):
        return "the interpreter of Triton before 3.9 needs numpy before 2.4"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs")


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(FOLDER), str(FOLDER.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_kernels_against_the_reference(half: int) -> None:
    # In two halves, so that two workers share them.
    done = interpreted(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "cases_kernels.py"), f"--half={half}"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 50


@pytest.mark.slow
def test_broken_kernels_are_noticed() -> None:
    done = interpreted(str(FOLDER / "mutants.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


def test_kernels_refuse_to_be_interpreted_by_accident() -> None:
    code = "import interpreted_kernels"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "set TRITON_INTERPRET=1" in done.stderr
