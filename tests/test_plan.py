"""Plans: merged tensors against the reference and the formula, exactness on equal models, files and bad input."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import conv_spec, grouped_spec, odd_spec, odd_tensors
from networks import MLP
from pipeline_cases import ARCHITECTURES
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import records, specs

# float32 sums of a few weights against float64; float64 inputs are merged in float64.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def zip_labels(space: mf.Space, models: int, generator: torch.Generator, width: int | None = None) -> Tensor:
    """Random many-to-one labels that keep blocks, every merged unit with a member; tied spaces keep their blocks."""
    inner, merged = space.width // space.blocks, (width or space.width) // space.blocks
    if space.within == "fixed":
        return torch.arange(space.width).repeat(models, 1)
    rows = []
    for block in range(space.blocks):
        members = torch.cat(
            [torch.arange(merged), torch.randint(merged, (models * inner - merged,), generator=generator)]
        )
        rows.append(
            members[torch.randperm(models * inner, generator=generator)].reshape(models, inner) + block * merged
        )
    return torch.cat(rows, dim=1)


def random_zip(
    spec: mf.PermutationSpec, models: int, seed: int = 0, widths: dict[str, int] | None = None
) -> mf.MergePlan:
    generator = torch.Generator().manual_seed(seed)
    labels = {s.name: zip_labels(s, models, generator, (widths or {}).get(s.name)) for s in spec.spaces}
    return mf.MergePlan(spec, labels, "zip")


def random_alignment(spec: mf.PermutationSpec, models: int, seed: int = 0) -> mf.MergePlan:
    moved = [spec.random_permutation(seed + m) for m in range(1, models)]
    labels = {
        s.name: torch.stack([torch.arange(s.width), *(torch.argsort(p[s.name]) for p in moved)]) for s in spec.spaces
    }
    return mf.MergePlan(spec, labels, "align")


def tensors_of(name: str, seed: int) -> dict[str, Tensor]:
    """A state dict for SPECS[name]."""
    return odd_tensors(seed) if name == "odd" else ARCHITECTURES[name].models(1, seed)[0].state_dict()


SPECS = {**{name: case.spec for name, case in ARCHITECTURES.items()}, "odd": odd_spec()}


@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 0.5), (0.0, 1.0, 2.0)])
@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("name", SPECS)
def test_merged_tensors_equal_the_reference(name: str, method: str, weights: Sequence[float] | None) -> None:
    spec = SPECS[name]
    state_dicts = [tensors_of(name, seed) for seed in range(3)]
    plan = random_alignment(spec, 3) if method == "align" else random_zip(spec, 3)
    merged = plan.merge(state_dicts, weights)
    expected = mf.reference.MergePlan(spec, plan.labels, method).merge(state_dicts, weights)
    assert list(merged) == list(state_dicts[0])
    for key, tensor in merged.items():
        assert tensor.dtype == state_dicts[0][key].dtype
        if tensor.is_floating_point():
            tolerance = TOLERANCE[tensor.dtype] * max(1.0, float(expected[key].abs().max()))
            torch.testing.assert_close(tensor, expected[key], atol=tolerance, rtol=0)
        else:
            assert torch.equal(tensor, state_dicts[0][key])


@pytest.mark.parametrize("widths", [{"fc1": 4, "fc2": 13}, {"fc1": 20, "fc2": 1}])
def test_other_widths(widths: dict[str, int]) -> None:
    spec = SPECS["mlp"]
    state_dicts = [tensors_of("mlp", seed) for seed in range(2)]
    plan = random_zip(spec, 2, widths=widths)
    assert plan.widths == widths
    merged = plan.merge(state_dicts)
    expected = mf.reference.MergePlan(spec, plan.labels, "zip").merge(state_dicts)
    assert merged["fc2.weight"].shape == (widths["fc2"], widths["fc1"])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], atol=3e-6, rtol=0)


def test_the_formula_with_dense_matrices() -> None:
    # W* = sum_m M_m' W_m U_m with U the indicator and M = U / members, as the paper writes it.
    spec = SPECS["mlp"]
    state_dicts = [{k: v.double() for k, v in tensors_of("mlp", seed).items()} for seed in range(3)]
    plan = random_zip(spec, 3, widths={"fc1": 8, "fc2": 11})

    def dense(space: str) -> tuple[Tensor, Tensor]:
        unmerge = torch.nn.functional.one_hot(plan.labels[space]).double()  # (models, width, merged)
        return unmerge, unmerge / unmerge.sum((0, 1))

    (u1, m1), (u2, m2) = dense("fc1"), dense("fc2")
    first, second, head = (torch.stack([sd[f"{n}.weight"] for sd in state_dicts]) for n in ("fc1", "fc2", "head"))
    merged = plan.merge(state_dicts)
    for key, want in {
        "fc1.weight": (m1.mT @ first).sum(0),
        "fc2.weight": (m2.mT @ second @ u1).sum(0),
        "head.weight": (head @ u2).mean(0),
        "fc2.bias": (m2.mT @ torch.stack([sd["fc2.bias"] for sd in state_dicts])[..., None]).sum(0)[:, 0],
    }.items():
        torch.testing.assert_close(merged[key], want, atol=1e-13, rtol=0)


def test_weights_average_over_members_and_over_models() -> None:
    spec, (a, b) = SPECS["mlp"], (tensors_of("mlp", seed) for seed in range(2))
    same = {s.name: torch.arange(s.width).repeat(2, 1) for s in spec.spaces}
    merged = mf.MergePlan(spec, same, "align").merge([a, b], weights=[3, 1])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * a[key] + 0.25 * b[key], atol=1e-6, rtol=1e-6)
    assert all(torch.equal(t, b[key]) for key, t in mf.MergePlan(spec, same, "align").merge([a, b], [0, 2]).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("models", [2, 3, 5])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_merging_a_model_with_itself_changes_no_bit(name: str, models: int, dtype: torch.dtype) -> None:
    case = ARCHITECTURES[name]
    state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.models(1)[0].state_dict().items()}
    for plan in (
        mf.MergePlan(case.spec, {s.name: torch.arange(s.width).repeat(models, 1) for s in case.spec.spaces}, "align"),
        mf.MergePlan(case.spec, {s.name: torch.arange(s.width).repeat(models, 1) for s in case.spec.spaces}, "zip"),
    ):
        for weights in (None, [0.1 * (m + 1) for m in range(models)]):
            merged = plan.merge([state_dict] * models, weights)
            assert all(torch.equal(merged[key], tensor) for key, tensor in state_dict.items())
            assert all(merged[key] is not tensor for key, tensor in state_dict.items())
            storage = {t.data_ptr() for t in state_dict.values() if t.numel()}
            assert not any(t.data_ptr() in storage for t in merged.values() if t.numel())


def test_units_that_merge_inside_both_copies_change_only_what_they_must() -> None:
    # Two equal models whose units 0 and 1 are one merged unit: their mean on out axes, their sum on in axes.
    spec, state_dict = SPECS["mlp"], tensors_of("mlp", 0)
    labels = {s.name: torch.arange(s.width).repeat(2, 1) for s in spec.spaces}
    labels["fc1"] = (labels["fc1"] - 1).clamp(min=0)
    merged = mf.MergePlan(spec, labels, "zip").merge([state_dict, state_dict])
    torch.testing.assert_close(merged["fc1.weight"][0], state_dict["fc1.weight"][:2].mean(0), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(merged["fc2.weight"][:, 0], state_dict["fc2.weight"][:, :2].sum(1), atol=1e-7, rtol=1e-6)
    assert torch.equal(merged["fc2.weight"][:, 1:], state_dict["fc2.weight"][:, 2:])


@pytest.mark.parametrize("name", SPECS)
def test_align_moves_without_changing_a_bit(name: str) -> None:
    spec = SPECS[name]
    state_dict = tensors_of(name, 7)
    permutation = spec.random_permutation(3)
    labels = {s.name: torch.stack([torch.arange(s.width), torch.argsort(permutation[s.name])]) for s in spec.spaces}
    aligned = mf.MergePlan(spec, labels, "align").align(state_dict)
    expected = spec.permute(state_dict, permutation)
    for key, tensor in aligned.items():
        assert torch.equal(tensor, expected[key])
        assert tensor.data_ptr() != state_dict[key].data_ptr()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.bfloat16]
)
def test_align_moves_every_dtype(dtype: torch.dtype) -> None:
    spec = SPECS["mlp"]
    state_dict = {k: (10 * v).to(dtype) for k, v in tensors_of("mlp", 7).items()}
    plan = random_alignment(spec, 3)
    aligned = plan.align(state_dict, model=2)
    back = torch.argsort(plan.labels["fc1"][2])
    bits = torch.int8 if dtype == torch.float8_e4m3fn else dtype
    assert torch.equal(aligned["fc1.weight"].view(bits), state_dict["fc1.weight"].view(bits)[back])
    assert aligned["fc1.weight"].dtype == dtype


def test_eight_bit_floats_are_merged_in_float32() -> None:
    spec = SPECS["mlp"]
    state_dicts = [{k: v.to(torch.float8_e4m3fn) for k, v in tensors_of("mlp", s).items()} for s in range(2)]
    plan = random_zip(spec, 2)
    merged = plan.merge(state_dicts)
    wide = plan.merge([{k: v.float() for k, v in sd.items()} for sd in state_dicts])
    for key, tensor in merged.items():
        assert tensor.dtype == torch.float8_e4m3fn
        assert torch.equal(tensor.float(), wide[key].to(torch.float8_e4m3fn).float())


def test_tensors_outside_the_spec() -> None:
    spec = specs.mlp((4,))
    torch.manual_seed(0)
    nets = [MLP(3, (4,), 2) for _ in range(2)]
    mask = torch.full((2, 2), -torch.inf).triu(1)
    extra = {"step": torch.tensor(7), "flag": torch.tensor([True]), "phase": torch.zeros(2, dtype=torch.complex64)}
    state_dicts = [
        {**net.state_dict(), "mask": mask, "scale": torch.tensor([1.0 + m]), "none": torch.zeros(0), **extra}
        for m, net in enumerate(nets)
    ]
    state_dicts[1]["step"] = torch.tensor(9)
    labels = {"fc1": torch.arange(4).repeat(2, 1)}
    merged = mf.MergePlan(spec, labels, "zip").merge(state_dicts, weights=[1, 3])
    assert int(merged["step"]) == 7
    assert torch.equal(merged["flag"], extra["flag"])
    assert torch.equal(merged["phase"], extra["phase"])
    assert torch.equal(merged["mask"], mask)
    assert float(merged["scale"]) == 1.75
    assert merged["none"].shape == (0,)


def test_mixed_dtypes_take_model_0s() -> None:
    spec = SPECS["mlp"]
    a, b = (tensors_of("mlp", seed) for seed in range(2))
    plan = random_zip(spec, 2)
    merged = plan.merge([{k: v.bfloat16() for k, v in a.items()}, {k: v.double() for k, v in b.items()}])
    exact = plan.merge([{k: v.bfloat16().double() for k, v in a.items()}, {k: v.double() for k, v in b.items()}])
    for key, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[key], atol=1e-6, rtol=2**-8)


def test_merged_tensors_come_one_at_a_time() -> None:
    case = ARCHITECTURES["resnet"]
    state_dicts = [model.state_dict() for model in case.models(2)]
    plan = random_zip(case.spec, 2)
    stream = plan.merge_tensors(state_dicts)
    assert next(stream)[0] == next(iter(state_dicts[0]))
    whole = plan.merge(state_dicts)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in plan.merge_tensors(state_dicts))
    aligned = random_alignment(case.spec, 2)
    one = dict(aligned.align_tensors(state_dicts[1]))
    assert all(torch.equal(one[key], tensor) for key, tensor in aligned.align(state_dicts[1]).items())


# Files ------------------------------------------------------------------------------------------------


def full_plan() -> mf.MergePlan:
    case = ARCHITECTURES["vit"]
    plan = random_zip(case.spec, 3, widths={"blocks.0.mlp.fc1": 5})
    values = {name: 0.1 + k / 3 for k, name in enumerate(plan.labels)}
    return mf.MergePlan(case.spec, plan.labels, "zip", values, [0.1, 1 / 3, 2 / 3])


def test_save_and_load(tmp_path: Path) -> None:
    plan = full_plan()
    plan.save(tmp_path / "plan.safetensors")
    again = mf.MergePlan.load(tmp_path / "plan.safetensors")
    assert again.spec == plan.spec
    assert (again.method, again.values, again.history) == (plan.method, plan.values, plan.history)
    assert list(again.labels) == list(plan.labels)
    assert all(torch.equal(again.labels[name], labels) for name, labels in plan.labels.items())
    assert os.listdir(tmp_path) == ["plan.safetensors"]
    plan.save(str(tmp_path / "plan.safetensors"))  # over the old one


def with_header(path: Path, change: Any) -> bytes:
    """The file with its metadata changed; tensors stay."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["mudsc_fast"])
    change(meta, header)
    header["__metadata__"] = {"mudsc_fast": json.dumps(meta)} if meta is not None else {}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def in_spec(meta: dict[str, Any], change: Any) -> None:
    spec = json.loads(meta["spec"])
    change(spec)
    meta["spec"] = json.dumps(spec)


DAMAGE: dict[str, Any] = {
    "empty": lambda raw: b"",
    "cut in the header": lambda raw: raw[:50],
    "cut in the tensors": lambda raw: raw[:-9],
    "a header of 2^62 bytes": lambda raw: struct.pack("<Q", 1 << 62) + raw[8:],
    "no safetensors": lambda raw: b"PK\x03\x04 a pickle in a zip" * 9,
}
CHANGES: dict[str, Any] = {
    "other method": lambda meta, _: meta.update(method="best"),
    "no method": lambda meta, _: meta.pop("method"),
    "no spaces": lambda meta, _: meta.pop("spaces"),
    "too few spaces": lambda meta, _: meta["spaces"].pop(),
    "unknown space": lambda meta, _: meta["spaces"].__setitem__(0, "x"),
    "spec of other type": lambda meta, _: meta.update(spec=3),
    "spec without spaces": lambda meta, _: meta.update(spec="{}"),
    "spec with another width": lambda meta, _: in_spec(meta, lambda s: s["spaces"][0].update(width=7)),
    "spec with unknown fields": lambda meta, _: in_spec(meta, lambda s: s["spaces"][0].update(run="rm")),
    "values of other type": lambda meta, _: meta.update(values=[1, 2]),
    "history of other type": lambda meta, _: meta.update(history="abc"),
    "other kind": lambda meta, _: meta.update(kind="activation statistics"),
    "other version": lambda meta, _: meta.update(version=2),
    "labels of another dtype": lambda _, header: header["0"].update(dtype="F64"),
    "labels of another shape": lambda _, header: header["0"].update(shape=header["0"]["shape"][::-1]),
}


def test_labels_that_begin_at_any_byte_are_copied() -> None:
    spec = mf.spec_for(MLP(5, (4,), 3))
    raw = bytearray(3 + 8 * 8)
    labels = torch.frombuffer(raw, dtype=torch.int64, offset=3, count=8).view(2, 4)
    labels.copy_(torch.arange(4).expand(2, 4))
    assert labels.data_ptr() % 8
    plan = mf.MergePlan(spec, {spec.spaces[0].name: labels}, "zip", {}, [])
    kept = plan.labels[spec.spaces[0].name]
    assert kept.data_ptr() % 8 == 0
    assert torch.equal(kept, labels)


@pytest.mark.parametrize("plain", [True, False])
def test_what_callers_write_to_their_labels_later_changes_no_plan(plain: bool) -> None:
    spec = mf.spec_for(MLP(5, (4,), 3))
    name = spec.spaces[0].name
    labels, leaders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), torch.tensor([0, 6, 2, 4])
    given = labels if plain else labels.t().contiguous().t()  # plain labels are looked at by compiled code alone
    plan = mf.MergePlan(spec, {name: given}, "zip", leaders={name: leaders})
    again = mf.MergePlan(spec, plan.labels, "zip", leaders=plan.leaders)
    kept, led = plan.labels[name].clone(), plan.leaders[name].clone()
    given.zero_()
    leaders.zero_()
    assert torch.equal(plan.labels[name], kept)
    assert torch.equal(plan.leaders[name], led)
    plan.labels[name].zero_()
    plan.leaders[name].zero_()
    assert torch.equal(again.labels[name], kept)
    assert torch.equal(again.leaders[name], led)


@pytest.mark.parametrize("name", [*DAMAGE, *CHANGES])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    full_plan().save(path)
    raw = path.read_bytes()
    assert with_header(path, lambda meta, header: None) != b""
    path.write_bytes(DAMAGE[name](raw) if name in DAMAGE else with_header(path, CHANGES[name]))
    with pytest.raises(ValueError, match=r"plan\.safetensors"):
        mf.MergePlan.load(path)


def test_a_rewritten_file_is_still_read(tmp_path: Path) -> None:
    # The helper itself does no damage.
    path = tmp_path / "plan.safetensors"
    full_plan().save(path)
    path.write_bytes(with_header(path, lambda meta, header: None))
    assert mf.MergePlan.load(path).history == full_plan().history


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a file of merge plan"):
        mf.MergePlan.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="missing"):
        mf.MergePlan.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError):
        full_plan().save(tmp_path / "no folder" / "plan.safetensors")


@pytest.mark.parametrize("stage", ["writing", "renaming"])
def test_a_save_that_dies_leaves_the_old_file_and_nothing_else(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.safetensors"
    full_plan().save(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if stage == "writing":
        import safetensors.torch

        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        random_alignment(SPECS["mlp"], 2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.safetensors"]


def test_saved_files_have_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        full_plan().save(tmp_path / "plan.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "plan.safetensors").stat().st_mode & 0o777 == 0o640


# Bad input --------------------------------------------------------------------------------------------


def labels_with(space: str, rows: Any) -> dict[str, Any]:
    labels: dict[str, Any] = {"fc1": torch.arange(10).repeat(2, 1), "fc2": torch.arange(9).repeat(2, 1)}
    return {**labels, space: rows}


def swapped(first: int, second: int) -> Tensor:
    rows = torch.arange(10).repeat(2, 1)
    rows[1, first], rows[1, second] = rows[1, second].clone(), rows[1, first].clone()
    return rows


@pytest.mark.parametrize(
    ("labels", "method", "error", "message"),
    [
        (labels_with("fc1", torch.arange(10).repeat(2, 1)), "best", ValueError, "method: expected one of align, zip"),
        (labels_with("x", torch.arange(10)), "zip", ValueError, "labels: the spec has no space 'x'"),
        ({"fc1": torch.arange(10).repeat(2, 1)}, "zip", ValueError, "labels of space 'fc2': missing"),
        (labels_with("fc1", [[1]]), "zip", TypeError, "labels of space 'fc1': expected a tensor, got list"),
        (
            labels_with("fc1", torch.zeros(2, 10)),
            "zip",
            ValueError,
            r"int64 of shape \(models >= 2, 10\), got torch.float",
        ),
        (
            labels_with("fc1", torch.zeros(2, 10, dtype=torch.uint8).view(torch.bits8)),
            "zip",
            ValueError,
            "got torch.bits8",
        ),
        (labels_with("fc1", torch.arange(10)[None]), "zip", ValueError, r"got torch.int64 \(1, 10\)"),
        (labels_with("fc1", torch.arange(9).repeat(2, 1)), "zip", ValueError, r"got torch.int64 \(2, 9\)"),
        (labels_with("fc1", torch.arange(10).repeat(3, 1)), "zip", ValueError, "one number of models in all spaces"),
        (labels_with("fc1", torch.arange(10).repeat(2, 1) - 1), "zip", ValueError, "counted from 0"),
        (
            labels_with("fc1", torch.arange(10).repeat(2, 1) * 2),
            "zip",
            ValueError,
            "a merged unit in 0..18 has no member",
        ),
        (labels_with("fc1", torch.full((2, 10), 1 << 60)), "zip", ValueError, "has no member"),
        (labels_with("fc1", swapped(0, 1).flip(0)), "align", ValueError, "model 0 keeps its order"),
        (
            labels_with("fc1", torch.stack([torch.arange(10), torch.arange(10) // 2])),
            "align",
            ValueError,
            "a permutation",
        ),
    ],
)
def test_labels_that_are_none(labels: Any, method: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mf.MergePlan(SPECS["mlp"], labels, method)


def test_a_plan_is_made_of_a_spec_and_a_mapping() -> None:
    with pytest.raises(TypeError, match="spec: expected a PermutationSpec, got int"):
        mf.MergePlan(3, {}, "zip")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels: expected a mapping from spaces to labels, got int"):
        mf.MergePlan(SPECS["mlp"], 3, "zip")  # type: ignore[arg-type]


def test_labels_that_break_blocks_and_ties() -> None:
    spec = grouped_spec()
    labels = {s.name: torch.arange(s.width).repeat(2, 1) for s in spec.spaces}
    broken = torch.arange(6).repeat(2, 1)
    broken[1, [2, 3]] = broken[1, [3, 2]]
    with pytest.raises(ValueError, match=r"space 'qk': units of one block go to different merged blocks"):
        mf.MergePlan(spec, {**labels, "qk": broken}, "align")
    with pytest.raises(ValueError, match=r"space 'qk': 5 merged units do not divide into 2 blocks"):
        mf.MergePlan(spec, {**labels, "qk": torch.arange(6).repeat(2, 1).clamp(max=4)}, "zip")
    turned = labels["v"].clone()
    turned[1] = turned[1].roll(3)
    with pytest.raises(ValueError, match=r"tie 'attention': spaces 'qk' and 'v' move their blocks differently"):
        mf.MergePlan(spec, {**labels, "v": turned}, "align")


def states(*changes: tuple[int, str, Any]) -> list[dict[str, Any]]:
    made = [tensors_of("mlp", seed) for seed in range(2)]
    for model, key, value in changes:
        made[model] = {**made[model], key: value}
    return made


NAN = torch.full((10,), float("nan"))


@pytest.mark.parametrize(
    ("given", "weights", "error", "message"),
    [
        (states()[:1], None, ValueError, "state_dicts: expected 2, one a model of the plan, got 1"),
        (states() + states(), None, ValueError, "state_dicts: expected 2, one a model of the plan, got 4"),
        ([1, 2], None, TypeError, "expected mappings of tensors, got int for model 0"),
        (states(), 3, TypeError, "weights: expected one number a model, got 3"),
        (states(), "ab", TypeError, "weights: expected one number a model"),
        (states(), [1.0], ValueError, "weights: expected 2, one a model, got 1"),
        (states(), [0, 0], ValueError, "weights: expected finite numbers >= 0"),
        (states(), [-1, 2], ValueError, "weights: expected finite numbers >= 0"),
        (states(), [float("nan"), 1], ValueError, "weights: expected finite numbers >= 0"),
        ([states()[0], {"fc1.weight": NAN}], None, ValueError, "model 1 has no tensor 'fc1.bias'"),
        (states((1, "x", NAN)), None, ValueError, "model 1 has a tensor 'x' that model 0 lacks"),
        (states((0, "x", NAN)), None, ValueError, "model 0 has a tensor 'x' that model 1 lacks"),
        (states((1, "fc1.bias", torch.zeros(11))), None, ValueError, r"'fc1.bias' has shape \(11,\) in model 1"),
        (states((1, "head.bias", torch.zeros(5))), None, ValueError, r"'head.bias' has shape \(5,\) in model 1"),
        (states((0, "fc1.bias", NAN[:9]), (1, "fc1.bias", NAN[:9])), None, ValueError, "fc1.bias"),
        (states((1, "fc1.bias", NAN)), None, ValueError, "'fc1.bias' of model 1 holds NaN or inf"),
        (states((0, "fc1.bias", NAN.long())), None, TypeError, "'fc1.bias' of model 0 must be floating"),
        (states((1, "fc1.bias", NAN.to(torch.complex64))), None, TypeError, "'fc1.bias' of model 1 must be floating"),
        (states((1, "head.bias", torch.zeros(4).long())), None, TypeError, "'head.bias' of model 1 must be floating"),
        (states((1, "fc1.bias", [0.0])), None, TypeError, "'fc1.bias' of model 1 is no tensor but list"),
    ],
)
def test_bad_state_dicts(given: Any, weights: Any, error: type[Exception], message: str) -> None:
    plan = random_zip(SPECS["mlp"], 2)
    with pytest.raises(error, match=message):
        plan.merge(given, weights)


def test_bad_alignments() -> None:
    plan = random_alignment(SPECS["mlp"], 2)
    for model in (-1, 2, True, "1"):
        with pytest.raises(ValueError, match=r"model: expected 0\.\.1"):
            plan.align(states()[0], model)
    with pytest.raises(ValueError, match="needs a plan of method 'align'"):
        random_zip(SPECS["mlp"], 2).align(states()[0])
    with pytest.raises(ValueError, match=r"model 0 has no tensor 'fc1\.bias'"):
        plan.align({"fc1.weight": NAN})
    with pytest.raises(TypeError, match="expected mappings of tensors"):
        plan.align([1])


def test_a_plan_of_one_block_a_convolution() -> None:
    spec = conv_spec()
    plan = random_zip(spec, 2, widths={"stream": 4, "inner": 9})
    assert plan.widths == {"stream": 4, "inner": 9}
    assert repr(plan) == "MergePlan('zip', 2 spaces, 2 models)"


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    case = ARCHITECTURES["resnet"]
    state_dicts = [model.state_dict() for model in case.models(2)]
    on_gpu = [{k: v.cuda() for k, v in sd.items()} for sd in state_dicts]
    for plan in (random_zip(case.spec, 2), random_alignment(case.spec, 2)):
        expected = plan.merge(state_dicts)
        for key, tensor in plan.merge(on_gpu).items():
            assert tensor.device.type == "cuda"
            torch.testing.assert_close(tensor.cpu(), expected[key], atol=1e-6, rtol=1e-6)
