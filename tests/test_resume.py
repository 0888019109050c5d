"""Runs that are killed and resumed end in the bytes of an unbroken run; anything that changed meanwhile is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

from mudsc_fast.checkpoints import CheckpointWriter
from mudsc_fast.cli import main
from mudsc_fast.rematch import Matcher

ROOT = Path(__file__).resolve().parent.parent
MERGE = ("merge", "a.safetensors", "b.safetensors", "-o", "out", "--max-shard-size", "3KB", "-q")

# Kills its own process at the k-th call of a method, as a machine that loses power would.
KILLED = """
import os, signal, sys
from mudsc_fast.checkpoints import CheckpointWriter, writing
from mudsc_fast.cli import main
from mudsc_fast.rematch import Matcher
writing._SAFE_EVERY = 2000
where, count = sys.argv[1], int(sys.argv[2])
owner = Matcher if where == "rematch" else CheckpointWriter
true = getattr(owner, where)
def counted(self, *args, **kwargs):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(self, *args, **kwargs)
setattr(owner, where, counted)
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = networks.ResNet(blocks=(1, 1), width=8, num_outputs=5)
        save_file(networks.randomise_norms(model, seed).state_dict(), f"{name}.safetensors")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed(where: str, count: int, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(count), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def test_killed_anywhere_and_resumed_gives_the_same_files(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*MERGE[:4], "whole", *MERGE[5:]]) == 0
    work = pair / ".out.resume"
    for where, count in (("rematch", 0), ("rematch", 5), ("write", 0), ("write", 25)):
        killed(where, count, *MERGE, "--resume")
        assert not (pair / "out").exists()
        assert work.is_dir()
    visits = len(list((work / "visits").glob("0*")))
    done = written(work)
    assert visits > 5
    assert len(done) > 1
    calls: list[str] = []
    rematch, write = Matcher.rematch, CheckpointWriter.write
    monkeypatch.setattr(Matcher, "rematch", lambda *a, **k: calls.append("rematch") or rematch(*a, **k))
    monkeypatch.setattr(CheckpointWriter, "write", lambda self, n, x: calls.append(n) or write(self, n, x))
    assert main([*MERGE, "--resume"]) == 0
    assert "rematch" not in calls
    assert set(calls) == load_file("a.safetensors").keys() - done
    assert not work.exists()
    whole = files(pair / "whole")
    assert len(whole) > 4
    whole["README.md"] = whole["README.md"].replace(b"# whole", b"# out")
    assert files(pair / "out") == whole


def written(work: Path) -> set[str]:
    """The tensors that an unfinished run has made safe."""
    lines = (work / "tensors-done.jsonl").read_text().splitlines()
    return {json.loads(line) for line in lines if line}


@pytest.mark.parametrize("stopped", ["killed", "interrupted"])
def test_a_single_file_goes_on_tensor_by_tensor(pair: Path, stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = ["merge", "a.safetensors", "b.safetensors", "-q", "-o"]
    assert main([*merge, "whole.safetensors"]) == 0
    work = pair / ".out.safetensors.resume"
    if stopped == "killed":
        killed("write", 25, *merge, "out.safetensors", "--resume")
        safe = 0
    else:
        interrupt(monkeypatch, "write", 25)
        assert main([*merge, "out.safetensors", "--resume"]) == 130
        monkeypatch.undo()
        monkeypatch.chdir(pair)
        safe = 25  # what was written is made safe before the process ends
    done = written(work)
    assert safe <= len(done) <= 25
    assert len(done) > 1
    # A note that was cut off, as by a machine that lost power, is not believed.
    with open(work / "tensors-done.jsonl", "a") as notes:
        notes.write('"torn')
    calls: list[str] = []
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda self, n, x: calls.append(n) or write(self, n, x))
    assert main([*merge, "out.safetensors", "--resume"]) == 0
    assert set(calls) == load_file("a.safetensors").keys() - done
    assert not work.exists()
    assert (pair / "out.safetensors").read_bytes() == (pair / "whole.safetensors").read_bytes()


def test_two_runs_do_not_work_in_one_folder(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "write", 3)
    assert main([*MERGE, "--resume"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(pair)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(pair / ".out.resume" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main([*MERGE, "--resume"]) != 0
        assert "another process works in" in capsys.readouterr().err
        other.communicate(b"\n")
    assert main([*MERGE, "--resume"]) == 0
    assert not (pair / ".out.resume").exists()


@pytest.mark.parametrize("changed", ["input", "option", "spec of a stopped run"])
def test_what_changed_between_a_run_and_its_resume_is_named(
    pair: Path, changed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "write", 3)
    assert main([*MERGE, "--resume"]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(pair)
    if changed == "input":
        state = load_file("b.safetensors")
        save_file({name: x + 1 if x.is_floating_point() else x for name, x in state.items()}, "b.safetensors")
        assert main([*MERGE, "--resume"]) == 2
        assert "--resume: inputs is" in capsys.readouterr().err
    elif changed == "option":
        assert main([*MERGE, "--resume", "--seed", "4"]) == 2
        assert "--resume: seed is 4 now and was 0 in the run that was interrupted" in capsys.readouterr().err
    else:
        (pair / ".out.resume" / "run.json").write_text("[]")
        assert main([*MERGE, "--resume"]) == 2
        assert "is damaged" in capsys.readouterr().err
    assert not (pair / "out").exists()
    # A run without --resume has nothing to do with it, but says that it is there.
    assert main([arg for arg in MERGE if arg != "-q"]) == 0
    assert "holds an unfinished run; --resume goes on from it" in capsys.readouterr().err


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, count: int) -> None:
    true, calls = getattr(CheckpointWriter, method), [0]

    def counted(self: CheckpointWriter, *args: object) -> None:
        calls[0] += 1
        if calls[0] > count:
            raise KeyboardInterrupt
        true(self, *args)

    monkeypatch.setattr(CheckpointWriter, method, counted)


def test_a_full_disk_leaves_the_finished_work(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The limit on a file's size stands in for the disk: writes past it fail as they do there.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (pair / "a.safetensors").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        assert main(["merge", "a.safetensors", "b.safetensors", "-o", "plain", "-q"]) == 1
        assert main([*MERGE[:6], "1MB", "--resume"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    err = capsys.readouterr().err
    assert "plain: cannot write the checkpoint" in err
    assert os.strerror(errno.EFBIG) in err
    assert "what is finished stays in" in err
    assert sorted(path.name for path in pair.iterdir()) == [".out.resume", "a.safetensors", "b.safetensors"]
    assert main([*MERGE[:6], "1MB", "--resume", "-q"]) == 0
    assert main([*MERGE[:4], "whole", "-q"]) == 0
    assert files(pair / "out")["model.safetensors"] == files(pair / "whole")["model.safetensors"]


def test_memory_limits_change_nothing_but_the_way(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MERGE[:4], "whole", *MERGE[5:]]) == 0
    assert main([*MERGE, "--max-memory", "100GB"]) == 0
    assert files(pair / "out")["model.safetensors.index.json"] == files(pair / "whole")["model.safetensors.index.json"]
    for name, data in files(pair / "whole").items():
        assert name == "README.md" or files(pair / "out")[name] == data
    assert main([*MERGE, "--force", "--max-memory", "20MB"]) == 2
    assert "max_memory: expected at least" in capsys.readouterr().err
    assert main([*MERGE, "--force", "--max-memory", "lots"]) == 2
    assert "--max-memory: expected a number of bytes or a size" in capsys.readouterr().err


def test_a_dry_run_shows_the_work_and_writes_nothing(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ((), ("--method", "zip"), ("--method", "average"), ("--max-memory", "3GB", "--resume")):
        assert main([*MERGE, "--dry-run", *extra]) == 0
        out = capsys.readouterr().out
        assert "peak memory: about" in out
        assert "disk:" in out
        assert "time: about" in out
        assert ("together" in out) == ("average" not in extra)
    assert "(limit 3.00 GB)" in out
    assert sorted(path.name for path in pair.iterdir()) == ["a.safetensors", "b.safetensors"]
