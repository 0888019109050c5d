"""The command line: what it writes is what the Python calls give, and every failure has its exit code and one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.checkpoints import open_checkpoint, writing
from mudsc_fast.cli import main

COMMANDS = ("merge", "align", "calibrate", "spec", "check", "info")

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: networks.MLP(inputs=12, widths=(20, 16), num_outputs=5),
    "resnet": lambda: networks.ResNet(blocks=(1, 1), width=8, num_outputs=5),
}
SHAPES = {"mlp": (12,), "resnet": (3, 8, 8)}


class Pair:
    """Three checkpoints of one network in the current folder, a factory for them and inputs."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.models = []
        for seed, name in enumerate("abc"):
            torch.manual_seed(seed)
            model = networks.randomise_norms(BUILDERS[kind](), seed).eval()
            self.models.append(model)
            save_file(model.state_dict(), folder / f"{name}.safetensors")
        self.inputs = torch.randn(40, *SHAPES[kind], generator=torch.Generator().manual_seed(9))
        np.save(folder / "x.npy", self.inputs.double().numpy())
        self.spec = mf.spec_for(self.models[0])

    @property
    def states(self) -> list[dict[str, Tensor]]:
        return [model.state_dict() for model in self.models]

    def stats(self, count: int, scope: str = "full") -> mf.ActivationStats:
        return mf.calibrate(self.models[:count], self.inputs.split(64), self.spec, scope=scope)


@pytest.fixture(params=["mlp", "resnet"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.chdir(tmp_path)
    return Pair(tmp_path, str(request.param))


@pytest.fixture
def mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.chdir(tmp_path)
    return Pair(tmp_path, "mlp")


def assert_same(path: str, expected: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def run(*args: str, code: int = 0) -> None:
    assert main(args) == code


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merge_by_weights(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    run("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--seed", "3")
    plan = mf.match(pair.states[:2], pair.spec, balance=1.0, seed=3)
    assert_same("m.safetensors", plan.merge(pair.states[:2]))
    out, err = capsys.readouterr()
    assert out == ""
    assert "matching by weights alone (--balance 1)" in err
    assert "merged 2 checkpoints" in err
    metadata = open_checkpoint("m.safetensors").metadata
    expected = {"method": "align", "balance": "1", "seed": "3", "sources": "a.safetensors,b.safetensors"}
    assert metadata == {"format": "pt", "mudsc_fast": mf.__version__, **expected}


def test_merge_twice_gives_the_same_bytes(mlp: Pair) -> None:
    for out in ("m.safetensors", "n.safetensors"):
        run("merge", "a.safetensors", "b.safetensors", "-o", out, "-q")
    assert Path("m.safetensors").read_bytes() == Path("n.safetensors").read_bytes()


def test_zip_with_activations_and_another_width(pair: Pair) -> None:
    (pair.folder / "netfactory.py").write_text(
        "import networks\ndef build():\n    return "
        + {
            "mlp": "networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)",
            "resnet": "networks.ResNet(blocks=(1, 1), width=8, num_outputs=5)",
        }[pair.kind]
    )
    sys.modules.pop("netfactory", None)
    three = ("a.safetensors", "b.safetensors", "c.safetensors")
    run("calibrate", *three, "--model", "netfactory:build", "--inputs", "x.npy", "-o", "s.safetensors", "-q")
    stats = pair.stats(3)
    loaded = mf.ActivationStats.load("s.safetensors")
    assert set(loaded) == set(stats)
    for name in stats:
        assert torch.equal(loaded[name].correlation(), stats[name].correlation())
    options = ("--method", "zip", "--stats", "s.safetensors", "--balance", "0.3", "--width", "1.5")
    run("merge", *three, "-o", "m.safetensors", *options, "--weights", "1,2,0.5")
    plan = mf.match(pair.states, pair.spec, stats, method="zip", balance=0.3, width=1.5)
    assert_same("m.safetensors", plan.merge(pair.states, [1.0, 2.0, 0.5]))
    run("merge", *three, "-o", "w.safetensors", "--method", "zip", "--stats", "s.safetensors", "--width", "8")
    plan = mf.match(pair.states, pair.spec, stats, method="zip", width=8)
    assert_same("w.safetensors", plan.merge(pair.states))
    run("merge", *three, "-o", "e.safetensors", "--method", "zip", "--stats", "s.safetensors", "--width-budget", "1.4")
    widths = mf.elastic_widths(pair.states, pair.spec, stats, 1.4, "zip", progress=False)
    assert_same("e.safetensors", mf.match(pair.states, pair.spec, stats, method="zip", width=widths).merge(pair.states))


def test_cross_statistics_align_but_do_not_zip(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    mlp.stats(2, "cross").save("s.safetensors")
    two = ("merge", "a.safetensors", "b.safetensors", "--stats", "s.safetensors", "-o", "m.safetensors")
    run(*two)
    plan = mf.match(mlp.states[:2], mlp.spec, mlp.stats(2, "cross"))
    assert_same("m.safetensors", plan.merge(mlp.states[:2]))
    run(*two, "--method", "zip", "--force", code=2)
    assert "scope" in capsys.readouterr().err
    assert_same("m.safetensors", plan.merge(mlp.states[:2]))


def test_average(mlp: Pair) -> None:
    run("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--method", "average", "--weights", "1,3")
    found = load_file("m.safetensors")
    for name, tensor in mlp.states[0].items():
        assert torch.allclose(found[name], 0.25 * tensor + 0.75 * mlp.states[1][name], atol=1e-7)


def test_a_saved_plan_is_used(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    two = ("merge", "a.safetensors", "b.safetensors")
    run(*two, "-o", "m.safetensors", "--save-plan", "p.safetensors")
    run(*two, "-o", "n.safetensors", "--plan", "p.safetensors")
    assert_same("n.safetensors", load_file("m.safetensors"))
    assert open_checkpoint("n.safetensors").metadata["plan"] == "p.safetensors"
    run(*two, "-o", "k.safetensors", "--save-plan", "p.safetensors", code=2)
    assert "--save-plan: p.safetensors exists already" in capsys.readouterr().err
    run(*two, "-o", "k.safetensors", "--save-plan", "b.safetensors", "--force", code=2)
    assert "b.safetensors is an input" in capsys.readouterr().err
    run(*two, "c.safetensors", "-o", "k.safetensors", "--plan", "p.safetensors", code=2)
    assert "expected 2" in capsys.readouterr().err
    assert not Path("k.safetensors").exists()


def test_align_keeps_the_function(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    run("align", "a.safetensors", "b.safetensors", "-o", "b2.safetensors")
    plan = mf.match(pair.states[:2], pair.spec, balance=1.0)
    assert_same("b2.safetensors", plan.align(pair.states[1]))
    assert "aligned 2 checkpoints" in capsys.readouterr().err
    again = BUILDERS[pair.kind]().eval()
    again.load_state_dict(load_file("b2.safetensors"))
    with torch.no_grad():
        # 1e-5: sums run in another order
        assert torch.allclose(again(pair.inputs), pair.models[1](pair.inputs), rtol=1e-5, atol=1e-5)
    assert not torch.equal(load_file("b2.safetensors")[next(iter(pair.states[1]))], next(iter(pair.states[1].values())))


def test_dtype_and_shards(mlp: Pair) -> None:
    args = ("a.safetensors", "b.safetensors", "-o", "out", "--dtype", "bfloat16", "--max-shard-size", "400B")
    run("merge", *args)
    found = open_checkpoint("out")
    assert len(found.files) > 1
    plan = mf.match(mlp.states[:2], mlp.spec, balance=1.0)
    for name, tensor in plan.merge(mlp.states[:2]).items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_torch_files_need_the_option(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": mlp.states[0]}, "a.pt")
    run("merge", "a.pt", "b.safetensors", "-o", "m.safetensors", code=2)
    assert "--allow-torch-load" in capsys.readouterr().err
    run("merge", "a.pt", "b.safetensors", "-o", "m.safetensors", "--allow-torch-load")
    run("merge", "a.safetensors", "b.safetensors", "-o", "n.safetensors")
    assert_same("m.safetensors", load_file("n.safetensors"))


def test_force_replaces_outputs_but_no_inputs(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("b.safetensors").read_bytes()
    run("merge", "a.safetensors", "b.safetensors", "-o", "b.safetensors", "--force", code=2)
    assert "would replace the input" in capsys.readouterr().err
    assert Path("b.safetensors").read_bytes() == before
    run("merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors", code=2)
    assert "exists already" in capsys.readouterr().err
    run("merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--force")
    assert "mudsc_fast" in open_checkpoint("c.safetensors").metadata


# --- exit codes ------------------------------------------------------------------------------------------------------

TWO = ("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors")

USAGE = {
    "no command": ((), "Usage"),
    "unknown command": (("fuse",), "No such command"),
    "no output": (("merge", "a.safetensors", "b.safetensors"), "Missing option '-o'"),
    "one checkpoint": (("merge", "a.safetensors", "-o", "m"), "expected two or more checkpoints, got 1"),
    "three to align": (("align", "a.safetensors", "b.safetensors", "c.safetensors", "-o", "m"), "got 3"),
    "one to calibrate": (("calibrate", "a.safetensors", "--inputs", "x.npy", "-o", "s"), "got 1"),
    "unknown method": ((*TWO, "--method", "magic"), "'magic' is not one of"),
    "balance": ((*TWO, "--balance", "2"), "2.0 is not in the range"),
    "balance without stats": ((*TWO, "--balance", "0.4"), "mudsc-fast calibrate"),
    "weights": ((*TWO, "--weights", "1,x"), "expected numbers with commas"),
    "number of weights": ((*TWO, "--weights", "1,2,3"), "expected 2, one for each checkpoint, got 3"),
    "negative weights": ((*TWO, "--weights=-1,1"), "weights: expected finite numbers >= 0"),
    "width": ((*TWO, "--width", "big"), "expected units"),
    "width of align": ((*TWO, "--width", "8"), "only --method zip changes widths"),
    "widths without stats": ((*TWO, "--method", "zip", "--width-budget", "1"), "for --method zip with --stats"),
    "two widths": (
        (*TWO, "--method", "zip", "--stats", "s", "--width", "8", "--width-budget", "1"),
        "cannot be used with --width",
    ),
    "no width at all": ((*TWO, "--method", "zip", "--stats", "s", "--width-budget", "0"), "0.0 is not in the range"),
    "impossible width": ((*TWO, "--method", "zip", "--width", "9999"), "width"),
    "plan and stats": ((*TWO, "--plan", "p", "--stats", "s"), "--plan gives one"),
    "average and stats": ((*TWO, "--method", "average", "--stats", "s"), "cannot use --stats"),
    "average and plan": ((*TWO, "--method", "average", "--plan", "s"), "cannot use --plan"),
    "missing checkpoint": (("merge", "a.safetensors", "no.safetensors", "-o", "m"), "no.safetensors: no such file"),
    "missing stats": ((*TWO, "--stats", "no.safetensors"), "no.safetensors"),
    "missing plan": ((*TWO, "--plan", "no.safetensors"), "no.safetensors"),
    "missing folder": ((*TWO[:-1], "no/m.safetensors"), "does not exist"),
    "missing spec": ((*TWO, "--spec", "no.json"), "no.json"),
    "stats that are a checkpoint": ((*TWO, "--stats", "a.safetensors"), "a.safetensors"),
    "plan that is a checkpoint": ((*TWO, "--plan", "a.safetensors"), "a.safetensors"),
    "no checkpoint": (("merge", "a.safetensors", "x.npy", "-o", "m"), "x.npy: expected a .safetensors file"),
    "truncated": (("merge", "a.safetensors", "cut.safetensors", "-o", "m"), "cut.safetensors: not a readable"),
    "other shapes": (("merge", "a.safetensors", "wide.safetensors", "-o", "m"), "'fc1.weight' has shape (20, 12)"),
    "other names": (("merge", "a.safetensors", "named.safetensors", "-o", "m"), "has a tensor"),
    "unknown architecture": (("merge", "odd.safetensors", "odd2.safetensors", "-o", "m"), "no known architecture"),
    "nan": (("merge", "a.safetensors", "nan.safetensors", "-o", "m"), "NaN"),
    "nan average": (("merge", "a.safetensors", "big.safetensors", "-o", "m", "--dtype", "float16"), "fit in torch.fl"),
    "device": ((*TWO, "--device", "abacus"), "--device: expected auto, cpu, cuda"),
    "device meta": ((*TWO, "--device", "meta"), "--device: expected auto, cpu, cuda"),
    "device index": ((*TWO, "--device", "cuda:99"), "CUDA devices"),
    "shard size": ((*TWO[:-1], "m", "--max-shard-size", "huge"), "max_shard_size: expected"),
    "pickle output": ((*TWO[:-1], "m.pt"), "written as safetensors"),
    "spec of nothing": (("spec", "no.safetensors"), "no such file"),
}


def spoil(pair: Pair) -> None:
    """Checkpoints that cannot be merged with a.safetensors, each for its own reason."""
    first = pair.states[0]
    save_file(BUILDERS["mlp"]().state_dict() | {"fc1.weight": torch.ones(20, 13)}, "wide.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in first.items()}, "named.safetensors")
    save_file(first | {"fc1.weight": torch.full((20, 12), float("nan"))}, "nan.safetensors")
    save_file(first | {"fc1.weight": torch.full((20, 12), 1e6)}, "big.safetensors")
    for name in ("odd", "odd2"):
        save_file({"mystery": torch.ones(3, 3, 3)}, f"{name}.safetensors")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:200])


@pytest.mark.parametrize("case", list(USAGE))
def test_bad_usage_and_input_is_exit_2(mlp: Pair, capsys: pytest.CaptureFixture[str], case: str) -> None:
    spoil(mlp)
    before = sorted(os.listdir())
    args, message = USAGE[case]
    run(*args, code=2)
    out, err = capsys.readouterr()
    assert message in out + err
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
    (OSError(errno.EROFS, "Read-only file system"), 2, "m.safetensors: cannot write the checkpoint (Read-only file"),
    (PermissionError(errno.EACCES, "Permission denied"), 2, "Permission denied"),
    (MemoryError(), 1, "not enough memory"),
    (RuntimeError("kernel gave up"), 1, "failed: RuntimeError: kernel gave up (--debug shows where)"),
    (KeyboardInterrupt(), 130, "interrupted; nothing was left behind"),
    (SystemExit(7), 7, ""),
]


@pytest.mark.parametrize(("error", "code", "message"), FAILURES, ids=[str(e) or type(e).__name__ for e, *_ in FAILURES])
def test_failures_have_their_codes_and_leave_nothing(
    mlp: Pair,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    before = sorted(os.listdir())
    real, calls = writing._write_at, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error
        real(*args)

    monkeypatch.setattr(writing, "_write_at", failing)
    run(*TWO, code=code)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(calls) == 3
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(mlp: Pair, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int) -> None:
    before, handler = sorted(os.listdir()), signal.getsignal(signal.SIGTERM)

    def interrupted(*args: object) -> None:
        assert sorted(os.listdir()) != before
        signal.raise_signal(number)

    monkeypatch.setattr(writing, "_write_at", interrupted)
    run(*TWO, code=code)
    assert sorted(os.listdir()) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_debug_shows_the_traceback(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut.safetensors").write_bytes(b"")
    run("merge", "a.safetensors", "cut.safetensors", "-o", "m", "--debug", code=2)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "mudsc-fast: error: cut.safetensors: not a readable" in err


def test_quiet_says_nothing(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    run(*TWO, "--quiet")
    assert capsys.readouterr() == ("", "")


def test_stdout_that_is_closed(mlp: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: object, **options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("click.echo", closed)
    run("spec", "a.safetensors", "--json", code=1)


# --- help and start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "--help")
    text = capsys.readouterr().out
    assert f"Usage: mudsc-fast {command}" in text
    if command != "info":
        assert f"  mudsc-fast {command}" in text, "an example"
    assert "--debug" in text


def test_help_lists_all_commands_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert "Exit codes: 0 done" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out == f"mudsc-fast {mf.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mudsc_fast.cli import main\n"
        f"for args in [[], *([c] for c in {COMMANDS!r})]: main([*args, '--help'])\n"
        "sys.exit(', '.join({'torch', 'numpy', 'rich', 'safetensors', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr


def test_as_a_module(mlp: Pair) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "mudsc_fast", "merge", "a.safetensors", "cut.safetensors", "-o", "m"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("mudsc-fast: error: cut.safetensors: no such file or folder\n")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    text = capsys.readouterr().out
    for value in (mf.__version__, *mf.build_config()["isas_usable"]):
        assert value in text


# --- spec ------------------------------------------------------------------------------------------------------------


def test_spec_table(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    run("spec", "a.safetensors")
    text = capsys.readouterr().out
    for space in pair.spec.spaces:
        assert space.name in text
        assert str(space.width) in text
        for axis in space.axes:
            assert f"{axis.tensor} [{axis.dim}] {axis.role}" in text
        for tap in space.taps:
            assert f"{tap.module} {tap.port}" in text
    assert "of the bytes, are in a space" in text


def test_spec_as_json_can_be_changed_and_used(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    run("spec", "a.safetensors", "--json")
    text = capsys.readouterr().out
    assert mf.PermutationSpec.from_json(text) == mlp.spec
    fewer = json.loads(text)
    del fewer["spaces"][1]
    Path("fewer.json").write_text(json.dumps(fewer))
    run(*TWO, "--spec", "fewer.json")
    spec = mf.PermutationSpec.from_json(json.dumps(fewer))
    plan = mf.match(mlp.states[:2], spec, balance=1.0)
    assert_same("m.safetensors", plan.merge(mlp.states[:2]))


@pytest.mark.parametrize("text", ["{", "[]", '{"spaces": [{"name": "x"}]}', '{"spaces": 3}'])
def test_bad_spec_files(mlp: Pair, capsys: pytest.CaptureFixture[str], text: str) -> None:
    Path("bad.json").write_text(text)
    run(*TWO, "--spec", "bad.json", code=2)
    assert "--spec bad.json: " in capsys.readouterr().err


def test_spec_that_does_not_fit(mlp: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.json").write_text(mf.specs.mlp((20, 16), layers=("x1", "x2", "x3")).to_json())
    run(*TWO, "--spec", "other.json", code=2)
    assert "unknown tensor 'x1.weight'" in capsys.readouterr().err


def test_spec_from_the_network_where_names_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build = "networks.ResNet(blocks=(1,), width=8, norm='group', groups=2)"
    (tmp_path / "groupfactory.py").write_text(f"import networks\ndef build():\n    return {build}\n")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(networks.ResNet(blocks=(1,), width=8, norm="group", groups=2).state_dict(), f"{name}.safetensors")
    run("spec", "a.safetensors", code=2)
    assert "number of groups" in capsys.readouterr().err
    run("spec", "a.safetensors", "--model", "groupfactory:build", "--json")
    Path("spec.json").write_text(capsys.readouterr().out)
    run(*TWO, "--spec", "spec.json")
    blocks = {space.blocks for space in mf.PermutationSpec.from_json(Path("spec.json").read_text()).spaces}
    assert blocks == {2}
