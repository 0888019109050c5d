"""The refit's own arithmetic and memory: the plain formula, factors that are shared, activations that lie in a file."""

from __future__ import annotations

import copy
import errno
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_repairs import ALL, _merged, _pair, _zip
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.repairs import refitting, regression
from mudsc_fast.repairs.affine import can_shift, change
from mudsc_fast.repairs.lockstep import Layer
from mudsc_fast.repairs.rescaling import spread
from mudsc_fast.repairs.resting import Rest
from mudsc_fast.repairs.samples import as_weight, samples


def _plainly(self: Any, layer: Layer) -> bool:
    """A layer solved from the joint covariance of all that it reads and all that it misses, one matrix of both."""
    if layer.last:
        layer = self._target.applied(layer)
    call = layer.calls[0]
    weight = layer.merged.get_parameter(call.weight)
    outputs, width = weight.shape[0], weight[0].numel()
    rows = [torch.cat(pair, 1) for pair in samples(layer, width + outputs, self._token_weight, seed=outputs)]
    joint = torch.cat(rows).double()
    mean = joint.mean(0)
    centred = joint - mean if can_shift(call) else joint
    matrix = centred.T @ centred / len(joint)
    gram = matrix[:width, :width] + self._ridge * matrix.diagonal()[:width].mean() * torch.eye(width)
    slope = torch.linalg.solve(gram, matrix[:width, width:]).T
    shift = mean[width:] - slope @ mean[:width] if can_shift(call) else torch.zeros(outputs, dtype=torch.float64)
    step = as_weight(slope, weight)
    for each in layer.calls:
        each.y += each.apply(each.x, step.to(weight.dtype), shift.to(weight.dtype))
    change(layer.merged, call, torch.ones_like(shift), shift, step, spread(layer.outputs(), call.dim))
    return True


def _difference(net: nn.Module, other: nn.Module) -> float:
    """The largest relative difference of a tensor."""
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    both = [(a.double(), b.double()) for a, b in pairs if a.is_floating_point()]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in both)


@pytest.mark.parametrize("name", ALL)
def test_the_refit_is_the_plain_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, spec, batches = _pair(name)
    plan = _zip(models, spec, batches)
    single = _merged(models, plan)
    net, plain = (copy.deepcopy(single).double() for _ in range(2))
    wide = [copy.deepcopy(m).double() for m in models]
    given = [b.double() if isinstance(b, Tensor) else b for b in batches]
    mf.refit(single, models, batches, plan)
    mf.refit(net, wide, given, plan)
    # In blocks of outputs, as of wide layers: nothing changes.
    blocks = copy.deepcopy(_merged(models, plan)).double()
    with monkeypatch.context() as patch:
        patch.setattr(refitting, "PRODUCTS", 200)
        mf.refit(blocks, wide, given, plan)
    monkeypatch.setattr(refitting._Solver, "solve", _plainly)
    mf.refit(plain, wide, given, plan)
    assert _difference(net, plain) < 1e-6
    assert _difference(blocks, plain) < 1e-6
    # In float32 the passes themselves round, and every layer is solved on what the last one gives.
    assert _difference(single, plain) < 2e-4


def _inputs_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the inputs whose matrices are made."""
    made: list[int] = []
    begin = regression.Inputs.__init__

    def noted(self: Any, width: int, *rest: Any) -> None:
        made.append(width)
        begin(self, width, *rest)

    monkeypatch.setattr(regression.Inputs, "__init__", noted)
    return made


def test_layers_that_read_one_tensor_share_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    models, spec, batches = _pair("llama")
    plan = _zip(models, spec, batches)
    made = _inputs_made(monkeypatch)
    net = _merged(models, plan)
    assert mf.refit(net, models, batches, plan) == 15
    # A decoder layer reads four things: before q, k and v, before o, before gate and up, and before down.
    assert made == [24, 24, 24, 40, 24, 24, 24, 40, 24]
    monkeypatch.setattr(regression.Inputs, "fit", lambda self, layer, about: False)
    alone = _merged(models, plan)
    mf.refit(alone, models, batches, plan)
    assert len(made) == 9 + 15
    assert _difference(net, alone) == 0


def test_an_input_that_was_written_to_is_another_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            y = torch.relu(self.a(x))
            x.mul_(torch.linspace(0.1, 3, 5)).tanh_()
            return y + torch.relu(self.b(x))

    torch.manual_seed(0)
    models = [Twice(), Twice()]
    plan = mf.MergePlan(mf.PermutationSpec(()), {}, "zip")
    net, apart = copy.deepcopy(models[0]), copy.deepcopy(models[0])
    x = torch.randn(200, 5)
    mf.refit(net, models, [x], plan, ridge=1e-6)
    apart.a = copy.deepcopy(net.a)
    mf.refit(apart, models, [x], plan, ridge=1e-6)
    torch.testing.assert_close(net.b.weight, apart.b.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.b.weight, (models[0].b.weight + models[1].b.weight) / 2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_samples_give_the_same_as_the_inputs_matrix(constant: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(30, 64, generator=generator) + 3).to(dtype)
    r = torch.randn(30, 7, generator=generator) + 1
    found = []
    for known in (30, None):
        inputs = regression.Inputs(64, constant, x.device, known)
        assert inputs.few == (known is not None)
        products = regression.Products(7, inputs, x.device)
        for a, b in zip(x.split(12), r.split(12), strict=True):
            inputs.add(a)
            products.add(a, b)
        inputs.factorise(0.05)
        found.append(inputs.solve(products))
    a, b = x.double(), r.double()
    means = [z.mean(0) * constant for z in (a, b)]
    gram = (a - means[0]).T @ (a - means[0]) / 30
    gram += 0.05 * gram.diagonal().mean() * torch.eye(64)
    slope = torch.linalg.solve(gram, (a - means[0]).T @ (b - means[1]) / 30).T
    for weights, constants in found:
        torch.testing.assert_close(weights, slope, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(constants, means[1] - slope @ means[0], atol=5e-5, rtol=1e-4)


def test_half_precision_parents_stay_as_they_are_and_are_refitted() -> None:
    models, spec, batches = _pair("llama")
    plan = _zip(models, spec, batches)
    half = [copy.deepcopy(m).to(torch.bfloat16) for m in models]
    same = copy.deepcopy(half[0])
    one = mf.MergePlan(spec, {s.name: torch.arange(s.width).repeat(2, 1) for s in spec.spaces}, "align")
    mf.refit(same, [half[0], half[0]], batches, one)
    assert _difference(same, half[0]) == 0

    def error(net: nn.Module) -> float:
        def logits(model: nn.Module) -> Tensor:
            with torch.no_grad():
                return torch.cat([model(**batch).logits.float() for batch in batches])

        wanted = (logits(half[0]) + logits(half[1])) / 2
        return float((logits(net) - wanted).square().mean() / wanted.var())

    net = mf.installed(half[0], plan.merge([m.state_dict() for m in half]))
    before = error(net)
    mf.refit(net, half, batches, plan)
    assert error(net) < 0.6 * before


# ---- activations in a file ----


class _Watched(Rest):
    """Notes the bytes of activations that are in memory whenever one pass stands at a layer."""

    held: list[int]

    def put_away(self, owner: int) -> None:
        super().put_away(owner)
        tensors = {r() for mine in self._owned.values() for refs in mine.values() for r in refs} - {None}
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x is not None}
        self.held.append(sum(storages.values()))


@pytest.mark.parametrize("name", ["resnet", "vit", "llama"])
def test_activations_in_a_file_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, spec, batches = _pair(name)
    plan = _zip(models, spec, batches)
    wanted, net = _merged(models, plan), _merged(models, plan)
    mf.refit(wanted, models, batches, plan)
    made: list[_Watched] = []

    def small(folder: Any) -> Rest:
        made.append(_Watched(folder, least=1))
        made[-1].held = []
        return made[-1]

    monkeypatch.setattr("mudsc_fast.repairs.lockstep.Rest", small)
    assert mf.refit(net, models, batches, plan, spill=tmp_path) > 0
    assert _difference(net, wanted) == 0
    assert made[0].most_bytes > 0
    # Of all the passes that stand, none holds anything in memory.
    assert max(made[0].held) == 0
    assert len(made[0].held) > 9 * len(batches)
    assert os.listdir(tmp_path) == []


def test_memory_is_that_of_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches: as much is brought back at one time."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)) for _ in range(2)]
    axes = (mf.Axis("0.weight", 0, "out"), mf.Axis("0.bias", 0, "out"), mf.Axis("2.weight", 1, "in"))
    plan = mf.MergePlan(mf.PermutationSpec((mf.Space("0", 96, axes),)), {"0": torch.arange(96).repeat(2, 1)}, "align")
    most, now = 0, 0
    read = Rest._read

    class Counted(Rest):
        def _read(self, place: Any) -> None:
            nonlocal most, now
            read(self, place)
            now = sum(p.storage.nbytes() for p in self._resting.values())
            most = max(most, now)

    monkeypatch.setattr("mudsc_fast.repairs.lockstep.Rest", lambda folder: Counted(folder, least=1024))
    found = []
    for count in (2, 8):
        most = 0
        mf.refit(copy.deepcopy(models[0]), models, [torch.randn(50, 64) for _ in range(count)], plan, spill=tmp_path)
        found.append(most)
    assert found[0] == found[1] > 0


def test_what_others_hold_is_left_alone_and_comes_back(tmp_path: Path) -> None:
    class Cached(nn.Module):
        """Keeps a table that its first pass makes, and a view of one that was there before."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 6)
            self.known = torch.randn(5000)
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0, 1, 8000).repeat(1)
            seen = self.known[:40]
            y = torch.relu(self.a(x) + self.table[:40])
            return self.b(y + seen)

    torch.manual_seed(0)
    models = [Cached(), Cached()]
    axes = (mf.Axis("a.weight", 0, "out"), mf.Axis("a.bias", 0, "out"), mf.Axis("b.weight", 1, "in"))
    plan = mf.MergePlan(mf.PermutationSpec((mf.Space("a", 40, axes),)), {"a": torch.arange(40).repeat(2, 1)}, "align")
    batches = [torch.randn(300, 40) for _ in range(3)]
    nets = [copy.deepcopy(models[0]) for _ in range(2)]
    mf.refit(nets[0], [copy.deepcopy(m) for m in models], batches, plan)
    known = models[0].known.clone()
    mf.refit(nets[1], models, batches, plan, spill=tmp_path)
    assert _difference(nets[1], nets[0]) == 0
    assert torch.equal(models[0].known, known)
    for model in (nets[1], *models):
        assert isinstance(model.table, Tensor)
        torch.testing.assert_close(model.table, torch.linspace(0, 1, 8000))


def test_a_file_is_gone_after_an_error_and_a_bad_folder_is_refused(tmp_path: Path) -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mf.refit(_merged(models, plan), models, [*batches, torch.ones(2, 7)], plan, spill=tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="spill: expected an existing folder"):
        mf.refit(_merged(models, plan), models, batches, plan, spill=tmp_path / "no")


@pytest.mark.parametrize(
    ("error", "wanted", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "spill: .*No space left.*more room"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_full_disk_and_an_interrupt_leave_nothing(
    error: BaseException, wanted: type[BaseException], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    states = [copy.deepcopy(m.state_dict()) for m in models]
    write, left, threads = os.pwritev, [20], threading.active_count()

    def failing(*given: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return write(*given)

    monkeypatch.setattr("mudsc_fast.repairs.resting.os.pwritev", failing)
    monkeypatch.setattr("mudsc_fast.repairs.lockstep.Rest", lambda folder: Rest(folder, least=1))
    with pytest.raises(wanted, match=words or None):
        mf.refit(_merged(models, plan), models, batches, plan, spill=tmp_path)
    assert os.listdir(tmp_path) == []
    assert threading.active_count() == threads
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())


class _Labelled(NamedTuple):
    x: Tensor
    label: int


def test_what_a_caller_may_get_wrong() -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    before = copy.deepcopy(models[0].state_dict())
    net = _merged(models, plan)
    for do in (mf.refit, mf.repair):
        with pytest.raises(TypeError, match="put it in a list"):
            do(net, models, batches[0], plan)
        for given in (models[:1], [*models, models[0]], []):
            with pytest.raises(ValueError, match=f"expected the 2 models of the plan, got {len(given)}"):
                do(net, given, batches, plan)
        with pytest.raises(ValueError, match=r"merged: its fc1.weight is model 0's own tensor"):
            do(models[0], models, batches, plan)
        with pytest.raises(TypeError, match="expected torch modules, got int"):
            do(net, [models[0], 3], batches, plan)  # type: ignore[list-item]
    assert all(torch.equal(x, before[n]) for n, x in models[0].state_dict().items())
    with pytest.raises(ValueError, match=r"ridge: 0 is too small .*more batches"):
        mf.refit(net, models, [batches[0][:20]], plan, ridge=0)
    # Batches and models that are read once, and batches with names.
    one, other = _merged(models, plan), _merged(models, plan)
    mf.refit(one, models, batches, plan)
    mf.refit(other, iter(models), (_Labelled(x, 0) for x in batches), plan)  # type: ignore[arg-type]
    assert _difference(one, other) == 0
