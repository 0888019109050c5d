"""A visit as one call gives what the ops give one after another, and gives way where it cannot be made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pipeline_cases import ARCHITECTURES, assert_same, op_by_op
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core, averaging, network, rematch


class Calls:
    """Counts visits that were one call, and those that had to take the plain way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.single = self.plain = 0
        visit = network.Network.visit

        def counted(one: network.Network, *arguments: Any) -> Any:
            made = visit(one, *arguments)
            self.single += len(made) - (made[-1] is None)
            self.plain += made[-1] is None
            return made

        monkeypatch.setattr(network.Network, "visit", counted)


@pytest.mark.parametrize(("models", "activations", "balance"), [(2, True, 0.5), (3, True, 0.0), (3, False, 1.0)])
@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_call_is_the_ops_one_after_another(
    name: str, models: int, method: str, activations: bool, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = ARCHITECTURES[name]
    nets = case.models(models, seed=7)
    state_dicts = [dict(net.state_dict()) for net in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec) if activations else None
    plain = op_by_op(state_dicts, case.spec, stats, method, balance, seed=3)
    calls = Calls(monkeypatch)
    assert_same(mf.match(state_dicts, case.spec, stats, method, balance, seed=3), plain)
    grouped = name in ("attention", "rope")  # query heads share an axis with the values: only activations are compared
    assert calls.single > 0 or (grouped and not activations)
    assert calls.plain == 0 or (grouped and balance > 0)


@pytest.mark.parametrize("method", ["align", "zip"])
def test_what_a_call_leaves_to_the_plain_way_is_not_tried_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Query heads are left to it, the layers of the MLP are not; calls meet them in every order.
    both = [ARCHITECTURES["attention"], ARCHITECTURES["mlp"]]
    spec = mf.PermutationSpec(tuple(space for case in both for space in case.spec.spaces))
    pairs = zip(*(case.models(2, seed=7) for case in both), strict=True)
    state_dicts = [{name: x for net in nets for name, x in net.state_dict().items()} for nets in pairs]
    plain = op_by_op(state_dicts, spec, None, method, seed=3)
    calls = Calls(monkeypatch)
    quick = mf.match(state_dicts, spec, None, method, seed=3)
    assert_same(quick, plain)
    assert calls.single > 0
    assert calls.plain > 0
    assert calls.single + calls.plain == len(spec.spaces) * len(quick.history)


@pytest.mark.parametrize("options", [{"width": 0.5}, {"budget": 0.25}, {"attenuation": 0.0}, {"width": 1.5}])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_zip_options(name: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    case = ARCHITECTURES[name]
    state_dicts = [dict(net.state_dict()) for net in case.models(2, seed=4)]

    def outcome(run: Any) -> Any:
        try:
            return run(state_dicts, case.spec, None, "zip", 1.0, **options)
        except ValueError as error:
            return str(error)

    plain = outcome(op_by_op)
    calls = Calls(monkeypatch)
    quick = outcome(mf.match)
    assert calls.single + calls.plain > 0
    if isinstance(plain, str):
        assert quick == plain
    else:
        assert_same(quick, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ARCHITECTURES["resnet"]
    state_dicts = []
    for net in case.models(2, seed=5):
        state: dict[str, Tensor] = {}
        for name, x in net.state_dict().items():
            x = x.to(dtype) if x.is_floating_point() else x
            # The same values behind an offset, with dims in another order in memory.
            state[name] = torch.stack([x, x]).transpose(0, -1).contiguous().transpose(0, -1)[1]
        state_dicts.append(state)
    plain = op_by_op(state_dicts, case.spec, None, "align", 1.0)
    calls = Calls(monkeypatch)
    assert_same(mf.match(state_dicts, case.spec, None, "align", 1.0), plain)
    assert calls.single > 0
    assert calls.plain == 0


def test_a_start_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ARCHITECTURES["vit"]
    nets = case.models(2, seed=6)
    state_dicts = [dict(net.state_dict()) for net in nets]
    start = op_by_op(state_dicts, case.spec, None, "zip", 1.0, seed=1)
    plain = op_by_op(state_dicts, case.spec, None, "zip", 1.0, seed=2, start=start)
    calls = Calls(monkeypatch)
    assert_same(mf.match(state_dicts, case.spec, None, "zip", 1.0, seed=2, start=start), plain)
    assert calls.single > 0


def test_other_mappings_are_read_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(Mapping[str, Tensor]):
        def __init__(self, inner: dict[str, Tensor]) -> None:
            self.inner = inner

        def __getitem__(self, name: str) -> Tensor:
            return self.inner[name].clone()

        def __iter__(self) -> Any:
            return iter(self.inner)

        def __len__(self) -> int:
            return len(self.inner)

    case = ARCHITECTURES["mlp"]
    state_dicts = [dict(net.state_dict()) for net in case.models(2)]
    calls = Calls(monkeypatch)
    lazy = mf.match([Lazy(state) for state in state_dicts], case.spec, None)
    assert calls.single == calls.plain == 0
    assert_same(mf.match(state_dicts, case.spec, None), lazy)
    assert calls.single > 0


@pytest.mark.parametrize("method", ["align", "zip"])
def test_what_is_wrong_is_said_as_by_the_ops(method: str) -> None:
    case = ARCHITECTURES["mlp"]
    state_dicts = [dict(net.state_dict()) for net in case.models(2)]
    state_dicts[1][case.spec.compared[0]].reshape(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="of model 1 holds NaN or inf"):
        mf.match(state_dicts, case.spec, None, method)


def test_tensors_are_described_where_they_are_plain() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    described = _core.describe([x, y], 2)
    assert described is not None
    assert described[1] == [x.data_ptr(), y.data_ptr()]
    assert _core.describe([torch.nn.Parameter(x), x[1:]], 0)[1] == [x.data_ptr(), x[1:].data_ptr()]
    kinds = [[x], [x.T], [x[:, :5]], [x[:3]], [x.double()], [x.half()], [x.bfloat16()], [x, x], [x.flatten()]]
    assert len({_core.describe(kind, 0)[0] for kind in kinds}) == len(kinds)
    complex_ = torch.complex(x, y)
    for refused in (x.long(), x.to_sparse(), complex_, complex_.conj().imag, x.to("meta"), [1.0], None):
        assert _core.describe([x, refused], 0) is None
    for unlike in (y[:3], y.T, y[:, :5], y.double(), y.t().contiguous().t()):
        assert _core.describe([x, unlike], 2) is None
    assert _core.describe([x[:0], y[:0]], 2) is None


def test_what_is_kept_with_a_spec() -> None:
    case = ARCHITECTURES["resnet"]
    spec = mf.PermutationSpec(case.spec.spaces)
    state_dicts = [dict(net.state_dict()) for net in case.models(2)]
    mf.match(state_dicts, spec, None)
    mf.match(state_dicts, spec, None)
    assert len(spec.resolved) == 1
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        mf.match([{k: x.to(dtype) for k, x in state.items()} for state in state_dicts], spec, None, max_sweeps=1)
    for count in (2, 3, 4):
        mf.match(state_dicts * count, spec, None, max_sweeps=1)
    assert len(spec.resolved) == network._KEPT
    for other in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert len(other.resolved) == 0


def test_what_is_kept_is_of_as_many_models() -> None:
    case = ARCHITECTURES["mlp"]
    spec = mf.PermutationSpec(case.spec.spaces)  # without weights nothing else tells two models from three
    for count in (2, 3, 2):
        nets = case.models(count)
        stats = mf.calibrate(nets, case.batches(), spec)
        plain = op_by_op(None, spec, stats, "align", 0.0)
        assert_same(mf.match(None, spec, stats, "align", 0.0), plain)


def test_what_is_kept_is_of_names_in_their_order() -> None:
    # All alike in shape, in another order: what is kept says where the units are by place.
    generator = torch.Generator().manual_seed(0)
    states = [{name: torch.randn(6, 6, generator=generator) for name in ("a", "b", "c")} for _ in range(2)]
    spec = mf.PermutationSpec((mf.Space("h", 6, (mf.Axis("a", 0, "out"), mf.Axis("b", 1, "in"))),))
    plan = mf.MergePlan(spec, {"h": torch.stack([torch.arange(6), torch.arange(6).flip(0)])}, "align")
    first = plan.merge(states)
    for order in ("bca", "cab", "acb"):
        again = plan.merge([{name: state[name] for name in order} for state in states])
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_labels_that_do_not_fit_are_refused() -> None:
    case = ARCHITECTURES["mlp"]
    state_dicts = [dict(net.state_dict()) for net in case.models(2)]
    widths = {space.name: space.width for space in case.spec.spaces}
    made = network.network_of(case.spec, state_dicts, {}, 2, False, widths, 0.5, 1.0)
    assert made is not None
    first, second = (space.name for space in case.spec.spaces)
    broken = rematch.Match(torch.full((2, widths[first]), -1), 0.0)
    assert made.visit([[second]], {first: broken}, 1.0) == [None]
    assert len(made._core.visit([[0], [1], [0]], 1.0, 1, 60000)) == 3
    assert len(made._core.visit([[0], [1], [0]], 1.0, 1, 0)) == 1  # a call ends after the visit at which time is over
    with pytest.raises(ValueError, match="labels"):
        made._core.set_labels(0, torch.zeros(3, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="space"):
        made._core.visit([[7]], 1.0, 1, 50)


@pytest.mark.parametrize("method", ["align", "zip"])
def test_sound_labels_are_those_that_the_checks_accept(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    space = mf.Space("h", 4, (mf.Axis("w", 0, "out"),), blocks=2)
    spec = mf.PermutationSpec((space,))
    cases = [torch.randint(-1 if k % 9 == 0 else 0, 6, (2, 4), generator=generator) for k in range(600)]
    pairs = [torch.tensor(row) for row in ([0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0], [0, 1, 3, 2], [0, 0, 2, 3])]
    cases += [torch.stack([a, b]) for a in pairs for b in pairs]
    found = _core.sound_labels(list(cases), [(4, 2)] * len(cases), method == "align")
    monkeypatch.setattr(_core, "sound_labels", lambda labels, *_: [0] * len(labels))
    for labels, size in zip(cases, found, strict=True):
        try:
            mf.MergePlan(spec, {"h": labels}, method)
            expected = int(labels.max()) + 1
        except ValueError:
            expected = 0
        assert size == expected, labels
    assert len({size > 0 for size in found}) == 2


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random_labels(spec: mf.PermutationSpec, models: int, method: str) -> dict[str, Tensor]:
    """A plan's labels without a match: other orders, or units that also merge inside a model."""
    generator = torch.Generator().manual_seed(models)
    orders = [spec.random_permutation(m) for m in range(models)]
    labels = {}
    for space in spec.spaces:
        rows = torch.stack([torch.argsort(order[space.name]) for order in orders])
        rows[0] = torch.arange(space.width)
        if method == "zip" and space.within == "free" and space.blocks == 1:
            spread = torch.cat(
                [
                    torch.arange(space.width),
                    torch.randint(space.width, ((models - 1) * space.width,), generator=generator),
                ]
            )
            rows = spread[torch.randperm(len(spread), generator=generator)].reshape(models, -1)
        labels[space.name] = rows
    return labels


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("models", "weights"), [(2, None), (3, (0.2, 0.0, 0.5))])
@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_at_once_is_merged_one_by_one(
    name: str,
    method: str,
    models: int,
    weights: tuple[float, ...] | None,
    dtype: torch.dtype,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ARCHITECTURES[name].spec
    states = [
        {key: x.to(dtype) if x.is_floating_point() else x for key, x in net.state_dict().items()}
        for net in ARCHITECTURES[name].models(models)
    ]
    plan = mf.MergePlan(spec, random_labels(spec, models, method), method)
    monkeypatch.setattr(network, "_AT_ONCE", 300)
    taken: list[str] = []
    take = network.Merging.take
    monkeypatch.setattr(network.Merging, "take", lambda self, key: taken.append(key) or take(self, key))
    quick = dict(plan.merge_tensors(states, weights))
    assert len(taken) >= len(spec.entries) // 2
    all_taken: list[str] = []
    take_all = network.Merging.take_all

    def counted(self: network.Merging) -> Any:
        made = take_all(self)
        all_taken.extend(made or ())
        return made

    monkeypatch.setattr(network.Merging, "take_all", counted)
    whole = plan.merge(states, weights)
    assert len(all_taken) >= len(spec.entries) // 2
    assert list(whole) == list(quick)
    assert all(torch.equal(x, quick[key]) for key, x in whole.items())
    monkeypatch.setattr(averaging, "merging_of", lambda *_: None)
    plain = plan.merge(states, weights)
    assert list(quick) == list(plain)
    for key, x in plain.items():
        assert quick[key].dtype == x.dtype
        assert quick[key].stride() == x.stride()
        torch.testing.assert_close(quick[key], x, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_one_call_at_a_time_is_made_where_masks_hold_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mask is averaged the plain way; what comes after it is still merged when it is asked for, not all of it at once.
    case = ARCHITECTURES["mlp"]
    states = []
    for net in case.models(2):
        mask = {"mask": torch.full((3, 3), -torch.inf)}
        states.append({**mask, **net.state_dict(), "free": torch.randn(5, 4)})
    plan = mf.match(states, case.spec, None)
    monkeypatch.setattr(network, "_AT_ONCE", 1)
    calls: list[list[str]] = []
    following = network.Merging._next

    def counted(self: network.Merging) -> Any:
        made = list(following(self))
        calls.append([name for name, _, _ in made])
        return iter(made)

    monkeypatch.setattr(network.Merging, "_next", counted)
    for k, (name, tensor) in enumerate(plan.merge_tensors(states)):
        assert len(calls) == k + 1
        assert calls[-1] == ([] if name == "mask" else [name])
        if name in ("mask", "free"):
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    assert torch.equal(plan.merge(states)["mask"], states[0]["mask"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_merged_with_itself_keeps_its_bits(name: str) -> None:
    case = ARCHITECTURES[name]
    state = dict(case.models(1)[0].state_dict())
    other = case.spec.permute(state, case.spec.random_permutation(3))
    order = {space: torch.stack([torch.arange(len(p)), p]) for space, p in case.spec.random_permutation(3).items()}
    merged = mf.MergePlan(case.spec, order, "align").merge([state, other], (0.3, 0.6))
    assert all(torch.equal(merged[key], x) for key, x in state.items())


def test_what_cannot_be_merged_is_said() -> None:
    case = ARCHITECTURES["mlp"]
    states = [dict(net.state_dict()) for net in case.models(2)]
    plan = mf.match(states, case.spec, None)
    name = case.spec.compared[-1]
    states[1][name] = states[1][name].clone()
    states[1][name].view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match="of model 1 holds NaN or inf"):
        plan.merge(states)
    # What is too large only when it is added up is no fault of the tensors.
    states[1][name].view(-1)[-1] = -torch.finfo(torch.float32).max
    states[0][name] = torch.full_like(states[0][name], torch.finfo(torch.float32).max)
    assert not bool(torch.isfinite(plan.merge(states)[name]).all())
    del states[0][name]
    with pytest.raises(ValueError, match="has no tensor"):
        plan.merge(states)
