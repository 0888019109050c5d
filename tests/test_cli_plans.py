"""Plans that the command line saves know their checkpoints, and what merge and align say of them."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

import mudsc_fast as mf
from mudsc_fast.checkpoints import open_checkpoint
from mudsc_fast.cli import main

AB = ("a.safetensors", "b.safetensors")
BA = AB[::-1]
TOLD = "another order; give them as a.safetensors b.safetensors"
NOTE = "note: --plan p.safetensors was made from other checkpoints than these"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints, and p.safetensors, a plan of the first two."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        save_file(networks.MLP(inputs=12, widths=(20, 16)).state_dict(), f"{name}.safetensors")
    assert main(["merge", *AB, "-o", "first.safetensors", "--save-plan", "p.safetensors", "-q"]) == 0
    return tmp_path


@pytest.mark.parametrize("verb", ["merge", "align"])
@pytest.mark.parametrize("more", [(), ("--resume",), ("--dry-run",), ("--max-memory", "16GB")], ids=" ".join)
def test_another_order_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, more: tuple[str, ...]
) -> None:
    assert main([verb, *BA, "-o", "m.safetensors", "--plan", "p.safetensors", *more]) == 2
    assert f"--plan p.safetensors: made from these checkpoints in {TOLD}" in capsys.readouterr().err
    assert not Path("m.safetensors").exists()
    assert main([verb, *AB, "-o", "m.safetensors", "--plan", "p.safetensors", *more]) == 0
    assert "note" not in capsys.readouterr().err


def test_align_and_records_save_plans_that_know_their_checkpoints(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", *AB, "-o", "b2.safetensors", "--save-plan", "q.safetensors"]) == 0
    assert main(["merge", *AB, "-o", "m.safetensors", "--record", "run"]) == 0
    for plan in ("q.safetensors", "run/plan.safetensors"):
        assert main(["merge", *BA, "-o", "n.safetensors", "--plan", plan]) == 2
        assert TOLD in capsys.readouterr().err
    assert not Path("n.safetensors").exists()


def test_a_configuration_says_where_the_plan_is_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yml").write_text(
        "command: merge\ncheckpoints: [b.safetensors, a.safetensors]\noutput: m.safetensors\nplan: p.safetensors\n"
    )
    assert main(["run", "run.yml"]) == 2
    err = capsys.readouterr().err
    assert TOLD in err
    assert "--plan is set at run.yml:4" in err


def test_other_checkpoints_are_noted_and_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "a.safetensors", "c.safetensors", "-o", "m.safetensors", "--plan", "p.safetensors"]) == 0
    assert NOTE in capsys.readouterr().err
    states = [load_file(f"{name}.safetensors") for name in "ac"]
    merged = mf.MergePlan.load("p.safetensors").merge(states)
    found = load_file("m.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())
    # Another number of checkpoints has its own message.
    assert main(["merge", *AB, "c.safetensors", "-o", "n.safetensors", "--plan", "p.safetensors"]) == 2
    err = capsys.readouterr().err
    assert "expected 2" in err
    assert "note" not in err


def test_plans_that_python_saved_are_taken_as_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mf.MergePlan.load("p.safetensors").save("plain.safetensors")
    assert main(["merge", *BA, "-o", "m.safetensors", "--plan", "plain.safetensors"]) == 0
    assert "note" not in capsys.readouterr().err
    # The digests are one more entry of the header: all that older versions read is as it was.
    known, plain = (
        json.loads(open_checkpoint(name).metadata["mudsc_fast"]) for name in ("p.safetensors", "plain.safetensors")
    )
    assert len(known.pop("checkpoints")) == 2
    assert known == plain


@pytest.mark.parametrize("header", ["[" * 100_000, '{"checkpoints": [1, "a"]}', "{", "[]"], ids=lambda text: text[:30])
@pytest.mark.parametrize("flag", ["--plan", "--stats"])
def test_damaged_headers_are_bad_input(here: Path, capsys: pytest.CaptureFixture[str], flag: str, header: str) -> None:
    save_file({"0": torch.zeros(1)}, "x.safetensors", metadata={"mudsc_fast": header})
    assert main(["merge", *AB, "-o", "m.safetensors", flag, "x.safetensors"]) == 2
    assert "x.safetensors" in capsys.readouterr().err
