"""Writing checkpoints: all or nothing, never over an input, and with what a Hugging Face folder needs to load."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mudsc_fast.checkpoints import (
    CheckpointWriter,
    TensorInfo,
    check_output,
    layout_of,
    open_checkpoint,
    save_checkpoint,
    writing,
)

STATE = {"a": torch.ones(3), "b": torch.zeros(2, 2)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def a_of(path: Path) -> list[float]:
    return open_checkpoint(path)["a"].tolist()


@pytest.fixture(params=["out.safetensors", "out"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_nothing(target: Path, error: type[BaseException], existing: bool) -> None:
    if existing:
        save_checkpoint(target, {"a": torch.full((1,), 7.0)})
    before = names(target.parent)

    def interrupted() -> None:
        with CheckpointWriter(target, layout_of(STATE), overwrite=True) as writer:
            writer.write("a", STATE["a"])
            assert names(target.parent) != before
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(target.parent) == before
    if existing:
        assert a_of(target) == [7.0]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    save_checkpoint(target, {"a": torch.full((1,), 7.0)})
    before = names(target.parent)
    real, calls = writing._write_at, []

    def failing(file: object, offset: int, data: object) -> None:
        if len(calls) == after:
            raise error
        calls.append(1)
        real(file, offset, data)

    monkeypatch.setattr(writing, "_write_at", failing)
    if after == 3:  # header and two tensors: the writes are over
        save_checkpoint(target, STATE, overwrite=True)
        assert a_of(target) == [1.0] * 3
        return
    with pytest.raises(type(error)) as caught:
        save_checkpoint(target, STATE, overwrite=True)
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(target)
        assert "No space left" in str(caught.value)
        assert ".tmp" not in str(caught.value)
    assert names(target.parent) == before
    assert a_of(target) == [7.0]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("out.safetensors", "os.fsync"),
        ("out", "os.fsync"),
        ("out.safetensors", "os.replace"),
        ("out", "pathlib.Path.rename"),
    ],
)
def test_a_commit_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    target = save_checkpoint(tmp_path / name, {"a": torch.full((1,), 7.0)})

    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(step, failing)
        with pytest.raises(OSError, match="cannot write the checkpoint"):
            save_checkpoint(target, STATE, overwrite=True)
    assert names(target.parent) == [target.name]
    assert a_of(target) == [7.0]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "out", {"a": torch.full((1,), 7.0)})
    real = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="cannot write"):
            save_checkpoint(tmp_path / "out", STATE, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert a_of(tmp_path / "out") == [7.0]


KILLED = """
import sys, torch
from mudsc_fast.checkpoints import CheckpointWriter, TensorInfo
layout = {f"t{i}": TensorInfo((1000,), torch.float32) for i in range(100)}
with CheckpointWriter(sys.argv[1], layout, overwrite=True) as writer:
    for i, name in enumerate(layout):
        if i == 50:
            print("half", flush=True)
            sys.stdin.read()
        writer.write(name, torch.ones(1000))
"""


def test_kill_9_in_the_middle_of_a_write(target: Path) -> None:
    save_checkpoint(target, {"a": torch.full((1,), 7.0)})
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert a_of(target) == [7.0]
    # nothing can clean up after SIGKILL, but what is left cannot be taken for a checkpoint
    assert all(name == target.name or (name[0] == "." and name.endswith(".tmp")) for name in names(target.parent))
    save_checkpoint(target, STATE, overwrite=True)
    assert a_of(target) == [1.0] * 3


def test_an_unfinished_block_is_an_error(target: Path) -> None:
    with (
        pytest.raises(ValueError, match="1 tensors were not written, first 'b'"),
        CheckpointWriter(target, layout_of(STATE)) as writer,
    ):
        writer.write("a", STATE["a"])
    assert names(target.parent) == []


# --- what may be replaced --------------------------------------------------------------------------------------------


def test_existing_output_needs_overwrite(target: Path) -> None:
    save_checkpoint(target, STATE)
    with pytest.raises(FileExistsError, match=r"exists already .*--force"):
        save_checkpoint(target, STATE)
    save_checkpoint(target, {"a": torch.zeros(1)}, overwrite=True)
    assert a_of(target) == [0.0]
    assert names(target.parent) == [target.name]


def test_an_input_is_never_replaced(target: Path) -> None:
    save_checkpoint(target, STATE)
    link = target.parent / f"link{target.suffix}"
    link.symlink_to(target)
    for out in (target, link):
        with pytest.raises(ValueError, match="the output would replace the input"):
            save_checkpoint(out, STATE, overwrite=True, inputs=[target])
        with pytest.raises(ValueError, match="the output would replace the input"):
            save_checkpoint(out, open_checkpoint(target), overwrite=True)
    assert a_of(target) == [1.0] * 3


def test_a_hard_link_of_an_input_is_an_input(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", STATE)
    os.link(path, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="would replace the input"):
        check_output(tmp_path / "b.safetensors", [path], overwrite=True)


def test_a_folder_around_an_input_is_not_replaced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "out", STATE)
    with pytest.raises(ValueError, match="would replace the input"):
        check_output(path, [path / "model.safetensors"], overwrite=True)


def test_folders_with_other_things_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_checkpoint(out, STATE)  # empty: nothing to lose
    (out / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"not replaced: it holds 'thesis\.tex'"):
        save_checkpoint(out, STATE, overwrite=True)
    (out / "thesis.tex").unlink()
    (out / "sub").mkdir()
    with pytest.raises(ValueError, match="not replaced: it holds 'sub'"):
        save_checkpoint(out, STATE, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match="holds files, but no checkpoint"):
        save_checkpoint(notes, STATE, overwrite=True)


def test_outputs_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder or nothing, found a file"):
        check_output(tmp_path / "file", overwrite=True)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(ValueError, match="expected a file or nothing, found a folder"):
        check_output(tmp_path / "dir.safetensors", overwrite=True)
    with pytest.raises(ValueError, match="written as safetensors"):
        check_output(tmp_path / "x.pt")
    for path in (tmp_path / "no" / "x.safetensors", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            check_output(path)


def test_output_may_stand_beside_its_inputs(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", STATE)
    assert check_output(tmp_path / "b.safetensors", [path]) == tmp_path / "b.safetensors"
    assert check_output(tmp_path / "new", [path]) == tmp_path / "new"


# --- full and read-only disks ----------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_the_first_byte(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free=100))
    with pytest.raises(OSError, match="bytes needed, 100 free") as caught:
        save_checkpoint(target, STATE)
    assert caught.value.errno == errno.ENOSPC
    assert names(target.parent) == []


def test_a_read_only_folder(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "temporary")

    # root ignores permission bits, so the refusal is injected where the temporary is made
    monkeypatch.setattr(writing, "FileIO", refuse)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        save_checkpoint(target, STATE)
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(target))
    assert names(target.parent) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_folder_that_takes_no_files() -> None:
    with pytest.raises(OSError, match="cannot write the checkpoint"):
        save_checkpoint("/proc/x.safetensors", STATE)


# --- the writer's own checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("c", torch.ones(3), "c: this tensor is not in the layout"),
        ("a", torch.ones(4), r"a: expected shape \(3,\), got \(4,\)"),
        ("b", torch.ones(2, 2), "b: this tensor was written before"),
        ("a", torch.full((3,), 1e6), r"a: expected values that fit in torch\.float16, got 1e\+06"),
    ],
)
def test_bad_tensors(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    layout = {"a": TensorInfo((3,), torch.float16), "b": TensorInfo((2, 2), torch.float32)}
    with CheckpointWriter(tmp_path / "o", layout) as writer:
        writer.write("b", STATE["b"])
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)
        writer.write("a", STATE["a"])
    assert open_checkpoint(tmp_path / "o").layout == layout


def test_a_bad_tensor_ends_the_write(tmp_path: Path) -> None:
    def write() -> None:
        with CheckpointWriter(tmp_path / "o", layout_of(STATE)) as writer:
            writer.write("a", torch.ones(4))

    with pytest.raises(ValueError, match="a: expected shape"):
        write()
    assert names(tmp_path) == []


def test_infinities_stay(tmp_path: Path) -> None:
    state = {"a": torch.tensor([float("inf"), float("nan"), 1.0])}
    path = save_checkpoint(tmp_path / "a.safetensors", state, dtype=torch.bfloat16)
    assert torch.equal(open_checkpoint(path)["a"], state["a"].bfloat16()) is False  # nan
    assert open_checkpoint(path)["a"][0] == float("inf")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "layout: expected at least one tensor"),
        ({"a": TensorInfo((2,), torch.complex128)}, "a: expected a dtype that safetensors can hold"),
        ({"__metadata__": TensorInfo((2,), torch.float32)}, "belongs to the safetensors header"),
        ({"\ud800": TensorInfo((2,), torch.float32)}, "surrogates not allowed"),
    ],
)
def test_bad_layouts(tmp_path: Path, layout: dict[str, TensorInfo], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointWriter(tmp_path / "o.safetensors", layout)


# --- companions ------------------------------------------------------------------------------------------------------


def test_config_and_tokenizer_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kept = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "chat_template.jinja"]
    for name in [*kept, "generation_config.json", "preprocessor_config.json"]:
        (source / name).write_text(f"[{name}]")
    for name in ("optimizer.pt", "modeling_evil.py", "training_args.bin", "model.safetensors"):
        (source / name).write_text("no")
    (source / "config.json").write_text(json.dumps({"hidden_size": 8, "dtype": "float32", "name": "ü"}))
    out = save_checkpoint(tmp_path / "out", STATE, companions=source, dtype=torch.bfloat16)
    assert names(out) == sorted(
        [*kept, "generation_config.json", "preprocessor_config.json", "config.json", "model.safetensors"]
    )
    assert (out / "tokenizer.json").read_text() == "[tokenizer.json]"
    assert json.loads((out / "config.json").read_text()) == {"hidden_size": 8, "dtype": "bfloat16", "name": "ü"}
    save_checkpoint(tmp_path / "out", STATE, companions=source, overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    save_checkpoint(tmp_path / "file.safetensors", STATE, companions=source)
    assert names(tmp_path) == ["file.safetensors", "out", "source"]


@pytest.mark.parametrize("config", ["{broken", "[1]", "{}"])
def test_an_odd_config_is_copied_as_it_is(tmp_path: Path, config: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(config)
    out = save_checkpoint(tmp_path / "out", STATE, companions=source, dtype=torch.float16)
    assert (out / "config.json").read_text().split() == config.split()


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path / "a")
    a = open_checkpoint(tmp_path / "a")
    out = save_checkpoint(tmp_path / "b", a, companions=a.folder, max_shard_size="4KB")
    assert (out / "model.safetensors.index.json").is_file()
    again = transformers.ViTModel.from_pretrained(out).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, again(x).last_hidden_state)


# --- rows, and writers that go on ------------------------------------------------------------------------------------


def interrupted(writer: CheckpointWriter, tensors: dict[str, Tensor]) -> None:
    """Write these tensors, then be interrupted."""
    with pytest.raises(KeyboardInterrupt), writer:
        write_all(writer, tensors)


def write_all(writer: CheckpointWriter, tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        writer.write(name, x)
    raise KeyboardInterrupt


def test_rows_in_any_order(tmp_path: Path) -> None:
    x, out = torch.randn(9, 2, 3), tmp_path / "m.safetensors"
    with CheckpointWriter(out, layout_of({"x": x, "n": torch.tensor(3)})) as writer:
        writer.write_rows("x", 6, x[6:])
        writer.write("n", torch.tensor(3))
        writer.write_rows("x", 0, x[:6])
    assert torch.equal(open_checkpoint(out)["x"], x)


@pytest.mark.parametrize(
    ("starts", "reason"),
    [((0,), "1 tensors were not written"), ((6,), "expected rows of shape"), ((0, 0), "rows were written twice")],
)
def test_rows_that_are_missing_or_too_many(tmp_path: Path, starts: tuple[int, ...], reason: str) -> None:
    x = torch.randn(9, 2, 3)

    def write() -> None:
        with CheckpointWriter(tmp_path / "n", layout_of({"x": x})) as writer:
            for start in starts:
                writer.write_rows("x", start, x[:6])

    with pytest.raises(ValueError, match=reason):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("stop", range(7))
def test_a_kept_writer_goes_on_after_its_last_whole_tensor(tmp_path: Path, stop: int, suffix: str) -> None:
    tensors = {f"t{k}": torch.randn(10, 4) for k in range(6)}
    keep, texts = tmp_path / "work", {"README.md": "merged"}
    keep.mkdir()

    def writer_at(name: str, keep: Path | None) -> CheckpointWriter:
        path = tmp_path / f"{name}{suffix}"
        return CheckpointWriter(path, layout_of(tensors), max_shard_size=320, texts=texts, keep=keep)

    with writer_at("whole", None) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
    interrupted(writer_at("kept", keep), {f"t{k}": tensors[f"t{k}"] for k in range(stop)})
    assert not (tmp_path / f"kept{suffix}").exists()
    with writer_at("kept", keep) as writer:
        assert writer.own == {f"t{k}" for k in range(stop, 6)}
        for name in sorted(writer.own):
            writer.write(name, tensors[name])
    made, expected = tmp_path / f"kept{suffix}", tmp_path / f"whole{suffix}"
    if suffix:
        assert made.read_bytes() == expected.read_bytes()
        return
    assert {f.name: f.read_bytes() for f in made.iterdir()} == {f.name: f.read_bytes() for f in expected.iterdir()}
    assert (made / "README.md").read_text() == "merged"


def test_a_damaged_finished_shard_is_written_again(tmp_path: Path) -> None:
    tensors, keep = {f"t{k}": torch.randn(10, 4) for k in range(4)}, tmp_path / "work"
    keep.mkdir()

    def again() -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "kept", layout_of(tensors), max_shard_size=320, keep=keep)

    interrupted(again(), {"t0": tensors["t0"], "t1": tensors["t1"]})
    assert again().own == {"t2", "t3"}
    shard = next((keep / "output").glob("*-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert again().own == set(tensors)
    # A run that makes it anew and is killed: what was noted before is gone.
    interrupted(again(), {})
    assert shard.stat().st_size == again().shards[0].nbytes
    assert again().own == set(tensors)
    interrupted(again(), {"t1": tensors["t1"]})
    assert again().own == {"t0", "t2", "t3"}


def test_tensors_whose_sync_failed_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sync of a file may succeed although the first one lost what it should have written."""
    tensors, keep, failures, sync = {"a": torch.randn(10, 4)}, tmp_path / "work", [1], os.fsync
    keep.mkdir()

    def again() -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "kept", layout_of(tensors), keep=keep)

    def failing_once(descriptor: int) -> None:
        if failures:
            failures.pop()
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", failing_once)
    with pytest.raises(OSError, match="cannot write the checkpoint"), again() as writer:
        writer.write("a", tensors["a"])
    assert not failures
    assert again().own == {"a"}
