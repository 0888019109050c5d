"""mudsc-fast check: passes on this machine, and finds every op that is made wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mudsc_fast as mf
from mudsc_fast import _core, backends, checking
from mudsc_fast.cli import main

USABLE = _core.build_info()["isas_usable"]


def test_check_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    before = _core.isa()
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    for isa in USABLE:
        assert isa in out
    for op in ("covariance", "similarity", "assign", "zip", "regroup", "pipeline"):
        assert f"{op}: " in out
    assert "OVER" not in out
    assert "all within their tolerance" in err
    assert _core.isa() == before


def test_every_op_and_instruction_set_is_compared() -> None:
    found = {(outcome.op, outcome.isa) for outcome in checking.run_checks() if outcome.backend == "cpu"}
    ops = {op for backend in backends.BACKENDS for op in backend.ops} | {"pipeline"}
    assert found == {(op, isa) for op in ops for isa in USABLE}


def test_each_runs_on_the_instruction_set_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    case = replace(checking._CASES[0], error=lambda device, backend: seen.append(_core.isa()) or 0.0)
    monkeypatch.setattr(checking, "_CASES", (case,))
    outcomes = list(checking.run_checks())
    assert seen == USABLE == [outcome.isa for outcome in outcomes]


def off_by(amount: float) -> Callable[[Any], Any]:
    def wrong(result: Any) -> Any:
        return result + amount

    return wrong


def moved(result: Any) -> Any:
    return replace(result, labels=result.labels.flip(1))


def worse(result: Any) -> Any:
    return replace(result, indices=result.indices.roll(1))


def doubled(result: Any) -> Any:
    return replace(result, indices=result.indices.clamp(max=5))


def overvalued(result: Any) -> Any:
    return replace(result, value=result.value + 1e-3)


WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "regroup": ("regroup", off_by(1.0), "regroup"),
    "regroup, a little": ("regroup", lambda x: x * (1 + 1e-4), "regroup: float32, sums"),
    "regroup, nan": ("regroup", lambda x: x * float("nan"), "regroup"),
    "regroup, shape": ("regroup", lambda x: x[:1], "regroup"),
    "weights": ("weight_similarity", off_by(1e-4), "similarity: weights"),
    "weights, one entry": ("weight_similarity", lambda x: x.index_fill(-1, torch.tensor([66]), 0.0), "similarity"),
    "dual": ("dual_similarity", off_by(1e-4), "similarity: weights and activations"),
    "zip, labels": ("zip_units", moved, "zip"),
    "zip, value": ("zip_units", overvalued, "zip"),
    "assign, worse": ("assign", worse, "assign: one to one"),
    "assign, no permutation": ("assign", doubled, "assign: one to one"),
    "assign, value": ("assign", overvalued, "assign: one to one"),
    "plan": (
        "match",
        lambda plan: mf.MergePlan(plan.spec, {n: x.flip(1) for n, x in plan.labels.items()}, "zip"),
        "pip",
    ),
    "blocks": ("assign_blocks", overvalued, "assign_small: blocks"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_op_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, spoil, row = WRONG[case]
    right = getattr(mf, name)
    monkeypatch.setattr(mf, name, lambda *args, **options: spoil(right(*args, **options)))
    # one instruction set is enough to see that the comparison bites
    monkeypatch.setattr(checking, "_CASES", tuple(c for c in checking._CASES if f"{c.op}: {c.name}".startswith(row)))
    monkeypatch.setattr(checking._core, "build_info", lambda: {"isas_usable": USABLE[:1]})
    assert main(["check", "--device", "cpu", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "OVER" in out
    assert "comparisons are over their tolerance" in out


def test_a_wrong_covariance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(mf.Covariance):
        def correlation(self) -> torch.Tensor:
            return super().correlation() + 1e-4

    monkeypatch.setattr(mf, "Covariance", Wrong)
    bad = [outcome for outcome in checking.run_checks() if not outcome.ok]
    assert {"covariance"} <= {outcome.op for outcome in bad} <= {"covariance", "similarity", "pipeline"}
    assert len({outcome.case for outcome in bad if outcome.op == "covariance"}) == 4


def test_an_op_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no [bold]kernel[/]")

    monkeypatch.setattr(mf, "assign", broken)
    assert main(["check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "over: assign (one to one) on baseline RuntimeError: no [bold]kernel[/]" in out
    assert "inf OVER" in out


def test_nan_is_not_tolerated() -> None:
    outcome = checking.Outcome("zip", "x", "cpu", "cpu", "avx2", float("nan"), 1.0)
    assert not outcome.ok
    assert replace(outcome, error=1.0).ok


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["check", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.cuda
def test_check_passes_on_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda"]) == 0
    assert "OVER" not in capsys.readouterr().out
