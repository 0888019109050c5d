"""Checkpoints: what is read is what was written, bad files are refused by name, and nothing is ever half-written."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mudsc_fast.checkpoints import (
    CheckpointWriter,
    TensorInfo,
    cast_layout,
    layout_of,
    open_checkpoint,
    parse_size,
    reading,
    save_checkpoint,
)
from mudsc_fast.checkpoints.layout import DTYPE_CODES, plan_shards

# One MB in the unit of ru_maxrss: kilobytes on Linux, bytes on macOS.
UNIT = 10**6 if sys.platform == "darwin" else 10**3


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "layers.0.weight": torch.randn(5, 7),
        "layers.0.bias": torch.randn(5).bfloat16(),
        "layers.1.weight": torch.randn(7, 5).t(),
        "layers.1.half": torch.randn(3, 1, 3).half(),
        "count": torch.tensor(41),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(3, dtype=torch.float64),
        "schön": torch.ones(1),
    }


def assert_same(found: object, expected: dict[str, Tensor]) -> None:
    found = dict(found)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- round trips -----------------------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", state, metadata={"method": "align"})
    assert leftovers(tmp_path) == ["a.safetensors"]
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, state)
    assert_same(load_file(path), state)
    assert checkpoint.metadata == {"format": "pt", "method": "align"}
    assert checkpoint.layout == layout_of(state)
    assert checkpoint.nbytes == sum(t.nbytes for t in state.values())
    assert checkpoint.folder is None
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(1, 1 + 6 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 64)
    tensor = raw.view(dtype).reshape(2, 3)
    path = save_checkpoint(tmp_path / "a.safetensors", {"x": tensor, "scalar": tensor[0, 0]})
    for found in (open_checkpoint(path), load_file(path)):
        assert found["x"].dtype == dtype
        assert found["x"].shape == (2, 3)
        assert torch.equal(found["x"].view(torch.uint8), tensor.view(torch.uint8))
        assert found["scalar"].shape == ()


def test_same_input_gives_the_same_bytes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    one = save_checkpoint(tmp_path / "a.safetensors", state, metadata={"b": "1", "a": "2"})
    two = save_checkpoint(tmp_path / "b.safetensors", state, metadata={"a": "2", "b": "1"})
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), (200, 2), (1, 9)])
def test_sharded_folder_round_trip(tmp_path: Path, state: dict[str, Tensor], size: int | str, files: int) -> None:
    path = save_checkpoint(tmp_path / "out", state, max_shard_size=size, metadata={"k": "v"})
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(shards) == files
    assert leftovers(tmp_path) == ["out"]
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, state)
    assert checkpoint.folder == path
    assert checkpoint.metadata == {"format": "pt", "k": "v"}
    assert sorted(p.name for p in checkpoint.files) == shards
    if files > 1:
        assert_same(open_checkpoint(path / "model.safetensors.index.json"), state)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.nbytes
    else:
        assert shards == ["model.safetensors"]


def test_shards_are_those_of_huggingface_hub(state: dict[str, Tensor]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    sizes = [6, 6, 2, 6, 2, 2, 11, 1, 0, 9]
    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    for limit in (1, 5, 8, 10, 20, 1000):
        split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
        shards = plan_shards(layout_of(tensors), {}, limit)
        assert {s.filename: set(s.offsets) for s in shards} == {
            f: set(names) for f, names in split.filename_to_tensors.items()
        }


def test_tensors_may_come_in_any_order_and_are_cast(tmp_path: Path) -> None:
    state = {"a": torch.randn(4), "b": torch.randn(2, 2), "n": torch.tensor(3)}
    with CheckpointWriter(tmp_path / "o.safetensors", cast_layout(layout_of(state), torch.bfloat16)) as writer:
        for name in ("n", "b", "a"):
            writer.write(name, state[name].requires_grad_(state[name].is_floating_point()))
    found = open_checkpoint(tmp_path / "o.safetensors")
    assert torch.equal(found["a"], state["a"].detach().bfloat16())
    assert found["n"].dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), (" 10 kb", 10_000), ("7B", 7), ("7", 7), (9, 9)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "five", "-1GB", "0", "nan", "inf GB", "5GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size: expected"):
        parse_size(text)


# --- reading lazily --------------------------------------------------------------------------------------------------


def test_names_are_known_without_reading(tmp_path: Path) -> None:
    # A sparse file of 64 GB: reading it would take minutes, more memory than allowed below, or both.
    count = 16 * 10**9
    with CheckpointWriter(tmp_path / "x.safetensors", {"small": TensorInfo((2,), torch.float32)}) as writer:
        writer.write("small", torch.ones(2))
    shard = plan_shards(
        {"big": TensorInfo((count,), torch.float32), "small": TensorInfo((2,), torch.float32)}, {}, None
    )[0]
    with open(tmp_path / "big.safetensors", "wb") as file:
        file.write(shard.header)
        file.truncate(shard.nbytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    checkpoint = open_checkpoint(tmp_path / "big.safetensors")
    assert list(checkpoint) == ["big", "small"]
    assert checkpoint.layout["big"] == TensorInfo((count,), torch.float32)
    assert checkpoint.meta()["big"].shape == (count,)
    assert torch.equal(checkpoint["small"], torch.zeros(2))
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * UNIT


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(5)})
    before = path.read_bytes()
    open_checkpoint(path)["x"].add_(1)
    assert torch.equal(open_checkpoint(path)["x"], torch.zeros(5))
    assert path.read_bytes() == before


def test_mapping_protocol(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(5)}))
    assert "x" in checkpoint
    assert "y" not in checkpoint
    assert len(checkpoint) == 1
    assert "1 tensors" in repr(checkpoint)
    with pytest.raises(KeyError, match=r"a\.safetensors has no tensor 'y'"):
        checkpoint["y"]


def test_device_is_applied_when_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(5)})
    assert open_checkpoint(path, device="meta")["x"].device.type == "meta"


def test_unaligned_tensors_are_copied_to_aligned_memory(tmp_path: Path) -> None:
    header = {
        "c": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = raw_file(tmp_path / "a.safetensors", header, b"\x07" * 3 + b"\x00\x00\x80\x3f" * 2)
    tensor = open_checkpoint(path)["x"]
    assert tensor.data_ptr() % 4 == 0
    assert torch.equal(tensor, torch.ones(2))


# --- torch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_only_when_allowed(tmp_path: Path, nest: str | None, zipped: bool) -> None:
    state = {"w": torch.randn(3, 3), "b": torch.randn(3)}
    path = tmp_path / "a.pt"
    content = state if nest is None else {nest: state, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pt: a \.pt file is a pickle; .*--allow-torch-load"):
        open_checkpoint(path)
    assert_same(open_checkpoint(path, allow_torch_load=True), state)


def test_torch_folder(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"v": torch.ones(3)}, tmp_path / "two.bin")
    index = {"weight_map": {"w": "one.bin", "v": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a pickle"):
        open_checkpoint(tmp_path)
    assert_same(open_checkpoint(tmp_path, allow_torch_load=True), {"w": torch.ones(2), "v": torch.ones(3)})


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), "cannot read it"),
        (_Payload(), "cannot read it"),
        ([torch.ones(2)], "expected a dict of tensors, got list"),
        ({"a": torch.ones(2), "lr": 0.1}, r"expected a dict of dense tensors; these entries are none: 'lr' \(float\)"),
        ({"a": torch.eye(2).to_sparse()}, "dense tensors"),
        ({}, "holds no tensors"),
    ],
    ids=["module", "payload", "list", "number", "sparse", "empty"],
)
def test_torch_files_that_are_no_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*" + message):
        open_checkpoint("a.pth", allow_torch_load=True)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04broken", b"\x80\x02garbage", b"hello"])
def test_damaged_torch_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt: torch\.load"):
        open_checkpoint(tmp_path / "a.pt", allow_torch_load=True)


# --- hostile files ---------------------------------------------------------------------------------------------------


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "truncated header": (b"{}", b"", 100),
    "huge header": (b"{}", b"", 2**62),
    "all ones": (b"{}", b"", 2**64 - 1),
    "not utf-8": (b"\xff\xfe\xfd", b"", None),
    "garbage": (b"{nonsense}", b"", None),
    "list": ([], b"", None),
    "deep": (b"[" * 100_000, b"", None),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12, None),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"0" * 20, None),
    "shape against offsets": ({"a": entry([3], 0, 8)}, b"0" * 8, None),
    "data cut off": ({"a": entry([2], 0, 8)}, b"0" * 4, None),
    "data too long": ({"a": entry([2], 0, 8)}, b"0" * 9, None),
    "negative": ({"a": entry([-2], 0, 8)}, b"0" * 8, None),
    "backwards": ({"a": entry([2], 8, 0)}, b"0" * 8, None),
    "overflow": ({"a": entry([2**62, 16], 0, 8)}, b"0" * 8, None),
    "unknown dtype": ({"a": entry([2], 0, 8, "Q3")}, b"0" * 8, None),
    "packed dtype": ({"a": entry([4], 0, 2, "F4")}, b"0" * 2, None),
    "no tensors": ({}, b"", None),
    "metadata only": ({"__metadata__": {"a": "b"}}, b"", None),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, length = HOSTILE[case]
    path = raw_file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=r"bad\.safetensors: "):
        open_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"1234", b"\x00" * 8])
def test_short_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path / "bad.safetensors")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"expected a checkpoint folder with model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.txt: expected a \.safetensors file"):
        open_checkpoint(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors: .* special file"):
        open_checkpoint(tmp_path / "pipe.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "pipe.safetensors").unlink()
    assert list(open_checkpoint(tmp_path)) == ["a"]
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"got 2 \.safetensors files and no index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}, r"1 of 2 shards are missing: s2\.safetensors"),
        ({"weight_map": {"a": "s1.safetensors", "z": "s1.safetensors"}}, r"1 tensors are not in .*: z \(s1"),
        ({"weight_map": {"a": "../s1.safetensors"}}, "expected file names without folders"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected file names without folders"),
        ({"weight_map": {"a": ".."}}, "shards are missing"),
        ({"weight_map": {"a": 3}}, "expected weight_map to give a file name"),
        ({"weight_map": ["a"]}, "expected weight_map to give a file name"),
        ({"weights": {}}, "expected JSON with a weight_map"),
        ([], "expected JSON with a weight_map"),
        (b"{broken", "expected JSON with a weight_map"),
        (b"[" * 100_000, "expected JSON with a weight_map"),
        (b"\xff\xfe", "expected JSON with a weight_map"),
        ({"weight_map": {}}, "holds no tensors"),
        ({"weight_map": {"a": "s1.bin"}}, "is a pickle|shards are missing"),
    ],
)
def test_bad_indexes(tmp_path: Path, index: object, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "s1.safetensors")
    data = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_oversized_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_INDEX_BYTES", 10)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="is not read"):
        open_checkpoint(tmp_path)


def test_a_doubled_name_is_refused(tmp_path: Path) -> None:
    entries = [json.dumps({"a": entry([2], start, start + 8)})[1:-1] for start in (0, 4096)]
    for pair in (entries, entries[::-1], [entries[0]] * 2):
        path = raw_file(tmp_path / "bad.safetensors", ("{" + ", ".join(pair) + "}").encode(), b"\0" * 8)
        with pytest.raises(ValueError, match=r"bad\.safetensors: not a readable"):
            open_checkpoint(path)


def test_a_file_cut_off_while_in_use(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(500)})
    checkpoint = open_checkpoint(path)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="the file ends inside tensor 'x'"):
        checkpoint["x"]
