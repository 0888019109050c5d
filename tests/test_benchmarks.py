"""The suite: its rows are right and run, a wrong contender is caught, and the command prints, saves and draws."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import adapters, bench_assign, bench_covariance, bench_zip, harness, refusal, report, suite
from benchmarks.harness import LONG, OURS, Contender, Result, Row, WrongResult, further, growth, run_row, threads_set
from mudsc_fast.cli.app import cli

RESULTS = json.loads((Path(adapters.__file__).parent / "results" / "adapters-cpu.json").read_text(encoding="utf-8"))


def row(contenders: list[Contender], **options: object) -> Row:
    return Row("op", "case", 8, lambda: contenders, lambda name, value: abs(value - 1.0), 0.1, **options)


def test_ratio_is_of_times_taken_in_turns() -> None:
    order: list[str] = []

    def taking(name: str, seconds: float) -> Contender:
        def run() -> float:
            order.append(name)
            time.sleep(seconds)
            return 1.0

        return Contender(name, run)

    result = run_row(row([taking(OURS, 0.01), taking("slow", 0.03)], target=2.0, rounds=8))
    assert order[:2] == [OURS, "slow"]  # checked
    rounds = {tuple(order[k : k + 2]) for k in range(len(order) - 16, len(order), 2)}
    assert rounds == {(OURS, "slow"), ("slow", OURS)}  # each once a round, and neither is always the first
    assert 2.0 < result.ratios["slow"] < 3.5
    assert result.met
    assert result.measured == result.ratios["slow"]


def test_cold_calls_follow_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(harness, "_fill_caches", lambda: seen.append("other"))

    def short() -> float:
        seen.append("call")
        return 1.0

    contenders = [Contender(OURS, short), Contender("b", short)]
    run_row(row(contenders, target=1.0, rounds=3, cold=True))
    timed = seen[seen.index("other") :]
    assert len(timed) >= 12
    assert timed == ["other", "call"] * (len(timed) // 2)  # and never repeated within a turn
    assert harness._other_memory().numel() >= harness.LEAST_OTHER


def test_an_op_runs_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    case = "gather dim 1 512x512x3x3 bfloat16"
    found = list(suite._rows_apart("regroup", True, (case,), {}))
    assert [r.case for made in found for r in made] == [case, f"{case}, in the caches"]
    assert all(made[0].seconds[OURS] > 0 for made in found)
    assert list(suite._rows_apart("no such op", True, (), {})) == ["no such op: its process ended with exit status 1"]
    assert "ModuleNotFoundError" in capfd.readouterr().err


def test_wrong_result_is_never_timed() -> None:
    with pytest.raises(WrongResult, match="cheat is off by 1"):
        run_row(row([Contender(OURS, lambda: 1.0), Contender("cheat", lambda: 2.0)]))
    with pytest.raises(WrongResult, match="off by nan"):
        run_row(row([Contender(OURS, lambda: float("nan"))]))


def test_missing_peers_are_named_and_best_is_the_fastest_of_the_rest() -> None:
    contenders = [
        Contender(OURS, lambda: 1.0),
        Contender("gone", None, "no module"),
        Contender("a", lambda: time.sleep(0.002) or 1.0),
        Contender("b", lambda: time.sleep(0.004) or 1.0),
    ]
    result = run_row(row(contenders, target=1e9, rounds=3))
    assert result.missing == {"gone": "no module"}
    assert "gone: missing (no module)" in suite.line(result)
    assert result.measured == min(result.ratios.values())
    assert result.met is False
    assert suite.line(result).startswith("LOW")


def test_what_decides_goes_on_taking_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "STEADY", (60.0, 1.0))
    monkeypatch.setattr(harness, "MOST_ROUNDS", 20)
    calls = {OURS: 0, "near": 0, "far": 0}

    def counted(name: str, seconds: float) -> Contender:
        def run() -> float:
            calls[name] += 1
            time.sleep(seconds)
            return 1.0

        return Contender(name, run)

    contenders = [counted(OURS, 0.003), counted("near", 0.004), counted("far", 0.1)]
    result = run_row(row(contenders, against="near", target=1.0, rounds=3), budget=60.0)
    assert calls["far"] == 4  # its check and three rounds
    assert calls["near"] == 22  # its check, how long it takes once more, and as many rounds as are allowed
    assert result.ratios["near"] > 1
    assert result.ratios["far"] > 10


def test_growth_exponent() -> None:
    results = [Result("op", "case", n, 1, seconds={OURS: 3e-9 * n**2.5}) for n in (64, 128, 512, 1024)]
    assert growth(results)["op", "case", 1] == (pytest.approx(2.5), 64, 1024)
    assert not growth(results[:2])
    slow = [*results, Result("op", "case", 2048, 1, seconds={OURS: 10.0})]
    assert growth(slow)["op", "case", 1][0] > 2.6
    assert growth(slow, {("op", "case"): 1024}) == {("op", "case", 1): (pytest.approx(2.5), 64, 1024)}


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("op", suite.OPS)
def test_every_op_has_rows_that_are_right(op: str) -> None:
    rows = list(importlib.import_module(f"benchmarks.bench_{op}").rows(quick=True))
    assert all(r.op == op for r in rows)
    assert any(r.target is not None for r in rows)
    smallest: dict[str, Row] = {}
    for r in rows:
        if r.case not in smallest or r.size < smallest[r.case].size:
            smallest[r.case] = r
    chosen = min(smallest.values(), key=lambda r: r.size)
    result = run_row(chosen, {"flop": 1e11, "byte": 1e10}, budget=0.1)
    assert result.seconds[OURS] > 0
    assert max(result.errors.values()) <= chosen.tolerance


def test_long_contenders_run_once_unless_the_verdict_hangs_on_them() -> None:
    runs: dict[str, int] = {}

    def taking(name: str, seconds: float) -> Contender:
        def run() -> float:
            runs[name] = runs.get(name, 0) + 1
            time.sleep(seconds)
            return 1.0

        return Contender(name, run)

    contenders = [taking(OURS, 0.2), taking("near", 1.7 * LONG), taking("far", 4 * LONG), taking("unasked", 1.2 * LONG)]
    made = row(contenders, against="near", target=2.0, also=(("case, far", "far", 2.0),), rounds=9)
    result = run_row(made, budget=0.1)
    assert runs == {OURS: 4, "near": 4, "far": 1, "unasked": 1}  # one to check, and three turns where it is close
    assert result.spread["far"] == 0.0
    assert 2.0 < result.measured < 3.0
    assert sum(result.wall.values()) == pytest.approx(4 * (0.2 + 1.7 * LONG) + 5.2 * LONG, rel=0.3)
    (other,) = further(made, result)
    assert (other.case, other.against, other.measured, other.met) == ("case, far", "far", result.ratios["far"], True)
    assert not other.wall


def test_a_run_that_waited_for_fresh_memory_is_not_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.LONGEST", 0.05)
    waits = [0.3]

    def ours() -> float:
        time.sleep(waits.pop() if waits else 0.1)
        return float(torch.ones(16 << 20).sum())  # 64 MiB: no heap keeps that much

    def made() -> Row:
        return Row("op", "case", 1, lambda: [Contender(OURS, ours)], lambda _, value: abs(value - (16 << 20)), 0.0)

    assert run_row(made()).seconds[OURS] >= 0.3  # longer than LONGEST, so the first run stays the only one
    waits.append(0.3)
    monkeypatch.setattr("benchmarks.harness.FRESH_MEMORY", 8.0)
    result = run_row(made(), budget=0.5)
    assert result.extra_mib is not None
    assert result.extra_mib > 8.0
    assert 0.1 <= result.seconds[OURS] < 0.3


def test_peers_that_would_take_minutes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scipy = bench_assign.ASSIGNMENT_PEERS["scipy"]
    monkeypatch.setattr(bench_assign, "ASSIGNMENT_PEERS", dict.fromkeys(("scipy", "second", "third"), scipy))
    family = bench_assign._Family("related")
    first = run_row(family.row(16), {}, budget=0.05)
    assert set(first.ratios) == {peer for peer, seen in family.seen.items() if 16 in seen} == set(family.seen)
    family.seen = {"scipy": {16: 0.7}, "second": {16: 0.002}, "third": {16: 0.002}}
    assert family.predicted("scipy", 32) == pytest.approx(8 * 0.7)
    at_32 = family.row(32)
    assert at_32.at_most is None
    assert at_32.target == 1.0
    result = run_row(at_32, {}, budget=0.05)
    assert set(result.ratios) == {"second", "third"}
    assert result.missing["scipy"] == "left out: predicted 5.6 s, 0.7 s at 16"
    family.seen["second"][32], family.seen["third"][32] = 4.0, 2.0
    assert family.predicted("third", 64) == pytest.approx(2 * 2**4)  # its own growth, as steep as is believed
    at_64 = family.row(64)
    assert at_64.target is None
    assert at_64.at_most == pytest.approx(2.0 * 2**2)
    assert at_64.note == "target: what third took at 32, grown as the square"
    result = run_row(at_64, {}, budget=0.05)
    assert not result.ratios
    assert result.missing["second"].startswith("left out: predicted 64 s, 4 s at 32")
    assert result.missing["scipy"] == "left out: already at 32"
    assert "left out: already at 32" in suite.line(result)


@pytest.mark.parametrize("op", ["assign", "zip"])
def test_rows_of_refusal_check_that_what_is_not_finite_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = bench_zip.related_similarity(160)
    made = refusal.row(op, "related", 320, lambda: similarity)
    result = run_row(made, {}, budget=0.05)
    assert result.target == 0.97
    assert set(result.ratios) == {refusal.UNCHECKED}
    monkeypatch.setattr(refusal, "_refused", lambda run, matrix, entry: entry > 0)
    with pytest.raises(WrongResult, match="refused"):
        run_row(made, {}, budget=0.05)


def test_covariance_rows_tell_shares_of_the_ceiling() -> None:
    made = bench_covariance._row(64, 128, torch.float32, bench_covariance.ADDMM)
    result = run_row(made, {"flop": 1e11}, budget=0.05)
    full = 2 * 64 * 64 * 128
    assert result.shares[bench_covariance.ADDMM] == pytest.approx(full / result.seconds["torch addmm"] / 1e11)
    assert "% of ceiling)  OpenBLAS ssyrk" in suite.line(result)
    assert [r.case for r in further(made, result)] == ["float32 rows, against OpenBLAS ssyrk"]


def test_covariance_summary_is_the_part_that_grows_with_the_width() -> None:
    seconds = {1024: 0.003 + 0.04, 2048: 2 * 0.003 + 4 * 0.04}
    results = [Result("covariance", "float32 rows", n, 1, seconds={OURS: t}) for n, t in seconds.items()]
    (found,) = bench_covariance.summaries(results)
    assert found.seconds[OURS] == pytest.approx(0.003)
    assert found.measured == pytest.approx(0.043 / 0.003)
    assert "14.33x" in suite.line(found)
    assert not list(bench_covariance.summaries(results[:1]))


def test_whole_suite_is_planned_within_twenty_minutes() -> None:
    assert set(suite.PREDICTED) == set(suite.OPS)
    assert sum(suite.PREDICTED.values()) < 20 * 60


def test_summary_of_large_assignments() -> None:
    results = [
        Result("assign", "uniform", n, 1, seconds={OURS: 1.0}, measured=measured)
        for n, measured in ((2048, 100.0), (4096, 4.0), (8192, 9.0))
    ]
    (mean,) = bench_assign.summaries(results)
    assert mean.measured == pytest.approx(6.0)
    assert mean.met is True
    assert "6.00x" in suite.line(mean)
    assert not list(bench_assign.summaries(results[:1]))


def test_command_prints_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        Row(
            "zip",
            "case",
            n,
            lambda: [Contender(OURS, lambda: 1.0), Contender("peer", lambda: 1.0)],
            lambda *_: 0.0,
            0.0,
        )
        for n in (8, 16, 32)
    ]
    monkeypatch.setattr("benchmarks.bench_zip.rows", lambda quick: made)
    monkeypatch.setattr("benchmarks.ceilings.measure", lambda: {"flop": 1e11, "byte": 1e10})
    monkeypatch.setattr("mudsc_fast.cli.benchmarking._suite", lambda: suite)
    figures = tmp_path / "figures.json"
    arguments = ["bench", "--quick", "--op", "zip", "--json", str(figures), "--plot", str(tmp_path / "plots")]
    ran = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert ran.return_value == 0, ran.output
    assert "3 rows, 0 of 0 targets met, 0 wrong" in ran.output
    saved = json.loads(figures.read_text())
    assert [r["size"] for r in saved["rows"]] == [8, 16, 32]
    assert saved["ceilings"] == {"flop": 1e11, "byte": 1e10}
    assert saved["config"]["isas_usable"]
    assert saved["seconds_planned"] is None
    assert list(saved["seconds_by_op"]) == ["zip"]
    assert all(set(r["wall"]) == {"prepare", "check", "time"} for r in saved["rows"])
    assert (tmp_path / "plots" / "zip.png").stat().st_size > 1000
    whole = ["bench", "--op", "zip", "--json", str(figures)]
    ran = CliRunner().invoke(cli, whole, standalone_mode=False)
    assert f"planned: {suite._minutes({'zip': suite.PREDICTED['zip']})}" in ran.output
    assert "took: 0 min 0 s (zip 0 s)" in ran.output
    assert json.loads(figures.read_text())["seconds_planned"] == {"zip": suite.PREDICTED["zip"]}
    ran = CliRunner().invoke(cli, ["bench", "--op", "zip", "--case", "ca"], standalone_mode=False)
    assert "3 rows" in ran.output
    ran = CliRunner().invoke(cli, ["bench", "--op", "zip", "--case", "se"])
    assert ran.exit_code == 2
    assert "no row begins with 'se'" in ran.output


def test_command_fails_when_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Row("zip", "case", 8, lambda: [Contender(OURS, lambda: 1.0)], lambda *_: 1.0, 0.0)
    monkeypatch.setattr("benchmarks.bench_zip.rows", lambda quick: [wrong])
    monkeypatch.setattr("benchmarks.ceilings.measure", dict)
    monkeypatch.setattr("mudsc_fast.cli.benchmarking._suite", lambda: suite)
    ran = CliRunner().invoke(cli, ["bench", "--op", "zip"], standalone_mode=False)
    assert ran.return_value == 1
    assert "1 wrong" in ran.output


def test_command_refuses_an_unknown_op() -> None:
    ran = CliRunner().invoke(cli, ["bench", "--op", "sort"])
    assert ran.exit_code == 2
    assert "expected one of covariance" in ran.output


def test_adapters_beside_their_tools() -> None:
    def round_of(ours: float, theirs: float) -> dict[str, dict[str, object]]:
        more = {"extra_mib": 2.0, "peak_mib": 10.0, "digest": ""}
        return {"ours": {"seconds": ours, **more}, "theirs": {"seconds": theirs, **more, "peak_mib": 15.0}}

    found = adapters.summary([round_of(1.0, 4.0), round_of(2.0, 4.0), round_of(1.0, 5.0)])
    assert (found["speedup"], found["memory"], found["ours_seconds"]) == (4.0, 1.5, 1.0)
    assert set(adapters.ROWS) == set(RESULTS["rows"])
    document = (Path(__file__).resolve().parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert adapters.table(RESULTS) in document


def test_a_later_run_takes_the_place_of_its_ops() -> None:
    def run(**ratios: float) -> dict[str, Any]:
        rows = [{"op": op, "measured": ratio} for op, ratio in ratios.items()]
        return {"rows": rows, "exponents": [{"op": op, "exponent": ratio} for op, ratio in ratios.items()]}

    found = report.together([run(assign=1.0, regroup=2.0), run(regroup=3.0)])
    assert [(row["op"], row["measured"]) for row in found["rows"]] == [("assign", 1.0), ("regroup", 3.0)]
    assert [fit["exponent"] for fit in found["exponents"]] == [1.0, 3.0]
    assert found["failures"] == []
