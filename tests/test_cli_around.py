"""What stands around the commands: progress that machines read, threads, completion, doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import save_file

from mudsc_fast import progress
from mudsc_fast.cli import app, main, self_help

ROOT = Path(__file__).resolve().parent.parent
MERGE = ["merge", "a.safetensors", "b.safetensors", "-o", "x.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(networks.MLP(inputs=12, widths=(20, 16)).state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MERGE, "--log-format", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["event"] for line in lines} == {"message", "progress"}
    done = [line for line in lines if line["event"] == "progress" and line["what"] == "writing"]
    assert (done[-1]["done"], done[-1]["total"], done[-1]["seconds_left"]) == (6, 6, 0)
    assert "merged 2 checkpoints" in lines[-1]["text"]
    assert main([*MERGE, "--log-format", "json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "error"
    assert main([*MERGE, "--no-such", "--log-format", "json"]) == 2
    # back to plain text
    assert main(["merge", "a.safetensors"]) == 2
    assert "Usage" in capsys.readouterr().err


def test_plain_lines_tell_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 12.0, 15.0, 24.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.styled("lines"), progress.bar("writing", 4, True) as steps:
        steps.advance()
        steps.advance()
        steps.describe("closing")
        steps.advance()
        steps.advance()
    assert capsys.readouterr().err.splitlines() == [
        "writing: 2 of 4, 12 s, about 12 s left",
        "closing: 4 of 4, 24 s, about 0 s left",
        "closing: 4 of 4, 25 s, about 0 s left",
    ]
    monkeypatch.undo()
    with progress.bar("writing", 4, True) as steps:
        steps.advance()
    with progress.styled("lines"), progress.bar("writing", 4, False) as steps:
        steps.advance()
    with progress.styled("lines"), progress.bar("a short one", 4, True) as steps:
        steps.advance()
    assert capsys.readouterr().err == ""


def test_durations() -> None:
    assert [progress.duration(s) for s in (0.2, 89, 200, 7500)] == ["0 s", "89 s", "3 min", "2 h 05 min"]


def test_threads_hold_for_the_run_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = torch.get_num_threads()
    monkeypatch.setattr(
        "mudsc_fast.plan.MergePlan.merge_tensors", lambda *_, **__: seen.append(torch.get_num_threads())
    )
    main([*MERGE, "--threads", "3"])
    assert torch.get_num_threads() == before
    assert main([*MERGE, "--threads", "0"]) == 2


def test_verbose_says_more(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MERGE, "-v"]) == 0
    said = capsys.readouterr().err
    assert "fc1: 20 units, match" in said
    assert "L of each sweep: " in said
    assert main([*MERGE, "--force"]) == 0
    assert "fc1: 20 units" not in capsys.readouterr().err


def test_quiet_says_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MERGE, "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shell == "bash" and not _has_bash():
        pytest.skip("no bash 4.4 here, whose completion click writes")
    assert main(["completion", shell]) == 0
    assert f"_MUDSC_FAST_COMPLETE={shell}_complete" in capsys.readouterr().out
    assert main(["completion", "cmd"]) == 2


def _has_bash() -> bool:
    try:
        return subprocess.run(["bash", "-c", "true"], check=False).returncode == 0
    except OSError:
        return False


def test_completion_completes() -> None:
    def completed(words: str) -> list[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_MUDSC_FAST_COMPLETE": "zsh_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "mudsc_fast"], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines()

    assert "merge" in completed("mudsc-fast mer")
    assert "--method" in completed("mudsc-fast merge --me")


def test_doctor_looks_and_tests(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--no-test"]) == 0
    shown = capsys.readouterr().out
    for word in ("mudsc-fast", "kernels", "disk", "CUDA", "mergekit"):
        assert word in shown
    assert self_help._round_trip() < 1e-6
    monkeypatch.setattr("mudsc_fast.checking.run_checks", lambda devices: iter(()))
    assert main(["doctor", "-q"]) == 0
    assert "all right" in capsys.readouterr().out
    monkeypatch.setattr(self_help, "_round_trip", lambda: 0.5)
    assert main(["doctor", "-q"]) == 1
    assert "differs from itself by 5.0e-01" in capsys.readouterr().out
    monkeypatch.setattr(self_help.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor", "--no-test"]) == 0
    assert "missing (mergekit): pip install 'mudsc-fast[mergekit]'" in capsys.readouterr().out


def test_exit_codes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted" in capsys.readouterr().out
    assert (app.DONE, app.FAILED, app.USAGE, app.INTERRUPTED) == (0, 1, 2, 130)
