"""`make gpu` without a GPU: parts that hang, crash or print rows first, time that runs out, and the list of parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import tasks, timing
from benchmarks.gpu.parts import PARTS, Part

ROOT = Path(gpu.__file__).resolve().parents[2]
ABOUT = {"device": "a fake", "command": "none"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


FINE = Part(
    "fine", python('print(\'ROW {"case": "a", "met": true, "target": 1, "measured": 2}\'); print(\'talk\')'), 20.0
)
CRASH = Part("crash", python('print(\'ROW {"case": "before"}\', flush=True); import os; os.abort()'), 20.0)
RAISES = Part("raises", python("raise SystemError('no such kernel')"), 20.0)
MISSES = Part("misses", python('print(\'ROW {"case": "b", "met": false, "target": 2, "measured": 1}\')'), 20.0)
WRONG = Part("wrong", python('print(\'ROW {"case": "c", "wrong": "error 1"}\')'), 20.0)
ABSENT = Part("absent", ["there-is-no-such-tool"], 20.0)
# A child that holds on to the output: killing the part alone would leave it.
HANG = Part(
    "hang",
    python(
        'import subprocess, sys, time; print(\'ROW {"case": "early"}\', flush=True); '
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    ),
    1.5,
)
AFTER = Part("after", FINE.command, 20.0, needs=("crash",))


def test_one_hang_or_crash_costs_its_own_rows_alone(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    start = time.monotonic()
    outcomes = gpu.run_all([CRASH, HANG, AFTER, RAISES, ABSENT, MISSES, WRONG, FINE], 120.0, out, ABOUT)
    assert time.monotonic() - start < 60
    status = {o.name: o.status for o in outcomes}
    assert status == {
        "crash": "failed",
        "hang": "out of time",
        "after": "not run",
        "raises": "failed",
        "absent": "failed",
        "misses": "ok",
        "wrong": "ok",
        "fine": "ok",
    }
    written = json.loads(out.read_text(encoding="utf-8"))
    rows = {part["part"]: part["rows"] for part in written["parts"]}
    assert rows["crash"] == [{"case": "before"}]
    assert rows["hang"] == [{"case": "early"}]
    assert rows["fine"] == [{"case": "a", "met": True, "target": 1, "measured": 2}]
    assert written["device"] == "a fake"
    failures = "\n".join(written["failures"])
    for expected in (
        "crash: failed",
        "hang: out of time",
        "after: not run",
        "no such kernel",
        "misses: b: 1",
        "wrong: c",
    ):
        assert expected in failures or "raises" in failures
    assert "fine" not in failures
    assert len(written["failures"]) == 7
    assert list(tmp_path.iterdir()) == [out]


def test_what_does_not_fit_into_the_whole_time_is_said() -> None:
    slow = Part("slow", python("import time; time.sleep(600)"), 100.0)
    outcomes = gpu.run_all([slow, FINE], 2.5, None, ABOUT)
    assert [o.status for o in outcomes] == ["out of time", "not run"]
    assert "2.5 s of the whole run were over" in outcomes[1].output


def test_winners_are_collected() -> None:
    rows = [{"tuned": {"add": {"90": "a"}}}, {"case": "x"}, {"tuned": {"blend": {"90": "b"}}}]
    outcome = gpu.Outcome("tune", "ok", 1.0, rows)
    assert gpu.report(ABOUT, [outcome])["tuned"] == {"add": {"90": "a"}, "blend": {"90": "b"}}


def test_parts_behind_the_tuning_run_with_its_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TUNED", tmp_path / "tuned.json")
    monkeypatch.delenv("MUDSC_FAST_TUNED", raising=False)
    shows = python("import json, os; print('ROW ' + json.dumps({'seen': os.environ.get('MUDSC_FAST_TUNED')}))")
    tune = Part("tune", python('print(\'ROW {"tuned": {"add": {"90": "a"}}}\')'), 20.0)
    outcomes = gpu.run_all([Part("before", shows, 20.0), tune, Part("behind", shows, 20.0)], 60.0, None, ABOUT)
    assert [o.rows[0].get("seen") for o in outcomes] == [None, None, str(tmp_path / "tuned.json")]
    assert json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8")) == {"add": {"90": "a"}}


def test_the_tests_part_names_every_file_with_a_mark() -> None:
    from benchmarks.gpu.parts import marked_files

    assert {"tests/test_cuda_kernels.py", "tests/test_triton_cuda.py"} <= set(marked_files())
    assert all((ROOT / name).is_file() for name in marked_files())
    assert [part.command[-1] for part in PARTS if part.name == "tests"] == [marked_files()[-1]]


def test_a_dry_run_lists_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out
    for part in PARTS:
        assert part.name in listed
        assert part.limit <= 150
    assert {p for part in PARTS for p in part.needs} <= {part.name for part in PARTS}
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])


def test_every_part_has_something_to_run() -> None:
    for part in PARTS:
        if "benchmarks.gpu.tasks" in part.command:
            assert callable(getattr(tasks, part.command[-1])), part.name
    kernels = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    for tool in ("memcheck", "racecheck"):
        assert {part.name for part in PARTS if part.name.startswith(tool)} == {f"{tool}_{kernel}" for kernel in kernels}


def test_targets_are_judged_in_their_direction() -> None:
    assert timing.judged(1.8, 1.7)["met"]
    assert not timing.judged(1.6, 1.7)["met"]
    assert timing.judged(0.002, 0.003, at_most=True)["met"]
    assert not timing.judged(0.004, 0.003, at_most=True)["met"]


@pytest.mark.skipif(
    os.environ.get("CUDA_VISIBLE_DEVICES") is None and Path("/dev/nvidia0").exists(), reason="has a GPU"
)
def test_without_a_gpu_make_gpu_says_so_in_one_line() -> None:
    done = subprocess.run(
        ["make", "-s", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert [line for line in done.stdout.splitlines() if line.startswith("No GPU: ")]
    assert len(done.stdout.splitlines()) == 1
