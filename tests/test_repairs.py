"""Rescaling, decoder and refit: nothing changes where nothing is wrong, and what changes is what the formulas say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from language_models import network as language_model
from language_models import spec_of
from small_networks import small_batches, small_network
from torch import Tensor, nn
from torch.nn import functional as F

import mudsc_fast as mf
from mudsc_fast.agreeing import outputs
from mudsc_fast.moments import joint_covariance
from mudsc_fast.repairs.lockstep import Layer, walk_layers
from mudsc_fast.repairs.samples import as_weight, patches
from mudsc_fast.repairs.targets import last_target
from mudsc_fast.repairs.walking import Call
from mudsc_fast.selection import select_blocks

NAMES = ("mlp", "vgg", "resnet", "resnet, groups", "vit", "vit, mean", "bottleneck")


def _pair(name: str, count: int = 2) -> tuple[list[nn.Module], mf.PermutationSpec, list[Any]]:
    """Random models of one architecture, their spec, and batches."""
    if name == "llama":
        models = [language_model("Llama", seed) for seed in range(count)]
        tokens = torch.randint(0, 48, (3, 8, 12), generator=torch.Generator().manual_seed(1))
        return models, spec_of(models[0]), [{"input_ids": x} for x in tokens]
    models = [small_network(name, seed) for seed in range(count)]
    return models, mf.spec_for(models[0]), list(small_batches(name, 40))


def _zip(models: list[nn.Module], spec: mf.PermutationSpec, batches: list[Any], method: str = "zip") -> mf.MergePlan:
    stats = mf.calibrate(models, batches, spec)
    return mf.match([m.state_dict() for m in models], spec, stats, method, progress=False)


def _merged(models: list[nn.Module], plan: mf.MergePlan) -> nn.Module:
    return mf.installed(models[0], plan.merge([m.state_dict() for m in models]))


ALL = [*NAMES, "llama"]


@pytest.mark.parametrize("name", ALL)
def test_a_net_merged_with_itself_stays_as_it_is(name: str) -> None:
    models, spec, batches = _pair(name, 1)
    twice = [models[0], models[0]]
    plan = _zip(twice, spec, batches)
    readers = mf.calibrate_readers(twice, batches, spec)
    before = models[0].state_dict()
    net = mf.installed(models[0], mf.decode(plan, [before, before], readers))
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[key], atol=1e-6, rtol=1e-6)
    mf.repair(net, twice, batches, plan)
    for output in ("mean", "unit"):
        mf.refit(net, twice, batches, plan, output=output)
        for key, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, before[key], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outputs(net, batches), outputs(models[0], batches), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["zip", "select"])
@pytest.mark.parametrize("name", ALL)
def test_the_refit_brings_the_outputs_near_the_parents_mean(name: str, method: str) -> None:
    models, spec, batches = _pair(name)
    plan = _zip(models, spec, batches, method)
    wanted = torch.stack([outputs(m, batches) for m in models]).mean(0)
    net = _merged(models, plan)
    mf.reset_batchnorm(net, batches)

    def error() -> float:
        return float((outputs(net, batches) - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())

    before = error()
    known = {id(t) for t in threading.enumerate()}
    layers = mf.refit(net, models, batches, plan)
    assert not [t for t in threading.enumerate() if id(t) not in known], "a forward pass was left standing"
    linear = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers >= len(linear) - 1
    assert error() < 0.6 * before
    after = outputs(net, batches)
    mf.reset_batchnorm(net, batches)
    torch.testing.assert_close(outputs(net, batches), after, atol=0.05 * float(after.std()), rtol=0.05)


def test_one_layer_is_the_closed_form() -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    net = _merged(models, plan)
    mf.refit(net, models, batches, plan, ridge=0.02, part="last")
    x = torch.cat(batches).double()
    h = x
    merged = _merged(models, plan).double()
    for name in ("fc1", "fc2"):
        h = F.relu(merged.get_submodule(name)(h))
    wanted = torch.stack([m.double()(x) for m in models]).mean(0)
    missing = wanted - merged.get_submodule("head")(h)
    centred = h - h.mean(0)
    gram = centred.T @ centred / len(h)
    ridge = 0.02 * gram.diagonal().mean() * torch.eye(len(gram))
    step = torch.linalg.solve(gram + ridge, centred.T @ (missing - missing.mean(0)) / len(h)).T
    head = merged.get_submodule("head")
    torch.testing.assert_close(net.head.weight.double(), head.weight + step, atol=1e-5, rtol=1e-4)
    bias = head.bias + missing.mean(0) - step @ h.mean(0)
    torch.testing.assert_close(net.head.bias.double(), bias, atol=1e-5, rtol=1e-4)


def test_heads_read_what_they_read_in_their_own_parent() -> None:
    models, spec, batches = _pair("mlp")
    heads = [torch.randn(2, 6, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    target = last_target("heads", heads, 2)
    each = [outputs(m, batches) for m in models]
    wanted = target.combine(each)
    for z, head in zip(each, heads, strict=True):
        torch.testing.assert_close(wanted @ head.T, F.normalize(z) @ head.T, atol=1e-5, rtol=1e-5)
    # Orthogonal heads: the sum of the parents' outputs, each projected on the span of its own head.
    square = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    apart = last_target("heads", [square[:3], square[3:5]], 2).combine(each)
    projected = sum(F.normalize(z) @ h.T @ h for z, h in zip(each, (square[:3], square[3:5]), strict=True))
    torch.testing.assert_close(apart, projected, atol=1e-5, rtol=1e-5)
    # A merged net of twice the width, solved for it, comes near.
    stats = mf.calibrate(models, batches, spec)
    plan = mf.match(None, spec, stats, "select", width=2.0, balance=0.0, progress=False)
    net = mf.installed(models[0], plan.merge([m.state_dict() for m in models]))
    mf.refit(net, models, batches, plan, heads, "heads", ridge=1e-6)
    assert float((outputs(net, batches) - wanted).square().mean() / wanted.var()) < 0.1


def test_rescaled_units_have_the_members_mean_and_deviation() -> None:
    models, spec, batches = _pair("vgg")
    plan = _zip(models, spec, batches)
    net = _merged(models, plan)
    assert mf.repair(net, models, batches, plan) == 3 + 1

    def seen(model: nn.Module, name: str) -> Tensor:
        found: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append(y.detach()))
        outputs(model, batches)
        handle.remove()
        return torch.cat(found).movedim(1, 0).flatten(1).double()

    for space, norm in (("features.0", "features.1"), ("features.4", "features.5")):
        labels = plan.labels[space].reshape(-1)
        units = [seen(m, norm) for m in models]
        own = seen(net, norm)
        for what in (lambda z: z.mean(1), lambda z: z.std(1, correction=0)):
            each = torch.cat([what(z) for z in units])
            wanted = torch.zeros(len(own), dtype=torch.float64).index_add(0, labels, each) / labels.bincount()
            torch.testing.assert_close(what(own), wanted, atol=1e-4, rtol=1e-3)


NORMS = {"resnet, groups": ("layer1.0.conv1", "layer1.0.bn1", 1), "vit": ("residual", "blocks.1.norm2", -1)}


@pytest.mark.parametrize("name", NORMS)
def test_norms_without_running_statistics_are_repaired_by_their_own_parameters(name: str) -> None:
    space, norm, dim = NORMS[name]
    models, spec, batches = _pair(name)
    plan = _zip(models, spec, batches)
    labels = plan.labels[space].reshape(-1)

    def seen(model: nn.Module) -> Tensor:
        found: list[Tensor] = []
        handle = model.get_submodule(norm).register_forward_hook(lambda m, a, y: found.append(y.detach()))
        outputs(model, batches)
        handle.remove()
        return torch.cat(found).movedim(dim, 0).flatten(1).double()

    def members(each: Tensor) -> Tensor:
        sums = each.new_zeros(int(labels.max()) + 1, *each.shape[1:]).index_add(0, labels, each)
        return sums / labels.bincount().reshape(-1, *[1] * (each.dim() - 1))

    units = torch.cat([seen(m) for m in models])
    repaired = _merged(models, plan)
    mf.repair(repaired, models, batches, plan)
    own = seen(repaired)
    torch.testing.assert_close(own.mean(1), members(units.mean(1)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(own.std(1), members(units.std(1)), atol=1e-3, rtol=1e-2)
    # After a refit no unit's factor or shift could be better.
    refitted = _merged(models, plan)
    mf.refit(refitted, models, batches, plan, ridge=1e-6)
    own, missing = seen(refitted), members(units) - seen(refitted)
    torch.testing.assert_close(missing.mean(1), torch.zeros(len(own), dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close((missing * own).mean(1), torch.zeros(len(own), dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["zip", "select"])
def test_the_decoder_is_its_formula(method: str) -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches, method)
    readers = mf.calibrate_readers(models, batches, spec)
    assert list(readers) == ["fc2.weight", "head.weight"]
    states = [m.state_dict() for m in models]
    merged = mf.decode(plan, states, readers, ridge=1e-3)
    mean, covariance = joint_covariance(readers["head.weight"])
    labels = plan.labels["fc2"].reshape(-1)
    size = plan.widths["fc2"]
    means = F.one_hot(labels, size).double().T
    means = means / means.sum(1, keepdim=True)
    if method == "select":
        means = F.one_hot(plan.leaders["fc2"], len(labels)).double()
    copies = F.one_hot(labels, size).double()
    inside = means @ covariance @ means.T
    ridge = 1e-3 * inside.diagonal().mean() * torch.eye(size)
    decoder = copies + (covariance @ means.T - copies @ inside) @ torch.linalg.inv(inside + ridge)
    both = torch.cat([s["head.weight"].double() for s in states], 1)
    torch.testing.assert_close(merged["head.weight"].double(), both @ decoder / 2, atol=1e-5, rtol=1e-4)
    bias = torch.stack([s["head.bias"].double() for s in states]).mean(0)
    bias = bias + both @ (mean - decoder @ (means @ mean)) / 2
    torch.testing.assert_close(merged["head.bias"].double(), bias, atol=1e-5, rtol=1e-4)


def test_a_selected_unit_is_the_leaders_own() -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches, "select")
    states = [m.state_dict() for m in models]
    merged = plan.merge(states)
    rows = torch.cat([s["fc1.weight"] for s in states])
    torch.testing.assert_close(merged["fc1.weight"], rows[plan.leaders["fc1"]])
    pieces = list(plan.merge_pieces(states, limit=200))
    again = torch.cat([p.tensor for p in pieces if p.name == "fc1.weight"])
    torch.testing.assert_close(again, merged["fc1.weight"])


def test_a_plan_with_leaders_is_saved_and_loaded(tmp_path: Any) -> None:
    models, spec, batches = _pair("vit")
    plan = _zip(models, spec, batches, "select")
    plan.save(tmp_path / "plan.safetensors")
    again = mf.MergePlan.load(tmp_path / "plan.safetensors")
    assert again.method == "select"
    assert set(again.leaders) == set(plan.leaders) != set()
    for space, leaders in plan.leaders.items():
        assert torch.equal(again.leaders[space], leaders)
    with pytest.raises(ValueError, match="leaders of space"):
        mf.MergePlan(spec, plan.labels, "select", leaders={"residual": plan.leaders["residual"].flip(0)})


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["vit", "resnet, groups", "llama"])
def test_blocks_are_selected_whole(name: str, count: int) -> None:
    models, spec, batches = _pair(name, count)
    stats = mf.calibrate(models, batches, spec)
    states = [m.state_dict() for m in models]
    plan, single = (
        mf.match(states, spec, stats, "select", whole_blocks=whole, progress=False) for whole in (True, False)
    )
    ties: dict[str, Tensor] = {}
    blocked = [space for space in spec.spaces if space.blocks > 1 and space.name in stats]
    assert blocked
    for space in blocked:
        models_of = (plan.leaders[space.name] // space.width).reshape(space.blocks, -1)
        assert torch.equal(models_of, models_of[:, :1].expand_as(models_of)), "a block of several models"
        places = (plan.leaders[space.name] % space.width).reshape(space.blocks, -1)
        size = places.shape[1]
        assert torch.equal(places // size, (places[:, :1] // size).expand_as(places)), "units of several blocks"
        if space.tie is not None:
            assert torch.equal(ties.setdefault(space.tie, models_of[:, 0]), models_of[:, 0])
        assert 0 < plan.values[space.name] <= 1
        assert len(set(models_of[:, 0].tolist())) > 1 or space.blocks < 4
    with pytest.raises(ValueError, match=r"whole_blocks: expected False unless .* with 'zip'"):
        mf.match(states, spec, stats, "zip", whole_blocks=True, progress=False)
    mixed = [(single.leaders[s.name] // s.width).reshape(s.blocks, -1) for s in blocked if s.name in single.leaders]
    assert any(not torch.equal(m, m[:, :1].expand_as(m)) for m in mixed)


def test_the_block_that_explains_more_is_taken() -> None:
    # Two unions of two blocks of two units; model 1's first block is model 0's twice as strong, its second is noise.
    base = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = torch.cat([base, 2 * base[:, :2], 0.1 * base[:, 2:]], 1)
    unions = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])
    chosen, values = select_blocks([torch.cov(units.T)], 2, [unions])
    assert values[0] == pytest.approx(1.0, abs=1e-6)  # copies explain each other wholly
    lonely = torch.cat([base, torch.randn(400, 4, generator=torch.Generator().manual_seed(1)).double() * 3], 1)
    chosen, values = select_blocks([torch.cov(lonely.T)], 2, [unions])
    assert chosen.tolist() == [1, 1]
    assert 0.8 < values[0] < 1


@pytest.mark.parametrize("samples", [3, 5, 8])
def test_blocks_are_taken_from_fewer_samples_than_units(samples: int) -> None:
    """What is left of blocks that are explained is rounding, which is no covariance."""
    units = torch.randn(samples, 32, generator=torch.Generator().manual_seed(samples), dtype=torch.float64)
    unions = torch.arange(32).reshape(2, 4, 4).transpose(0, 1).reshape(4, 8)
    covariance = units.T @ units / samples
    chosen, values = select_blocks([covariance], 2, [unions])
    taken = torch.stack([unions[k].reshape(2, 4)[m] for k, m in enumerate(chosen)]).flatten()
    read = units[:, taken] @ torch.linalg.lstsq(units[:, taken], units, driver="gelsd").solution
    assert values[0] == pytest.approx(1 - float((units - read).square().sum() / units.square().sum()), abs=1e-6)
    assert select_blocks([torch.zeros(32, 32).double()], 2, [unions])[0].tolist() == [0] * 4


@pytest.mark.parametrize("models", [1, 2, 3])
def test_selection_takes_the_units_that_explain_most(models: int) -> None:
    generator = torch.Generator().manual_seed(models)
    factors = torch.randn(12 * models, 4, generator=generator)
    covariance = factors @ factors.T
    found = mf.select_units(covariance, models, width=4)
    assert found.labels.shape == (models, 12)
    assert float(found.value) == pytest.approx(1.0, abs=1e-6)  # four units of rank four explain everything
    assert torch.equal(found.labels.reshape(-1)[found.leaders], torch.arange(4))
    # One step: the unit with the largest variance, as far as it is read.
    reads = torch.ones(12 * models)
    reads[7] = 1e3
    assert mf.select_units(covariance, models, width=1, reads=reads).leaders.tolist() == [7]
    blocks = mf.select_units(covariance, models, width=6, blocks=3).labels
    assert torch.equal(blocks[0] // 2, torch.arange(12) // 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((torch.ones(3, 3, dtype=torch.int64),), TypeError, "covariance"),
        ((torch.ones(3, 4),), ValueError, "square"),
        ((torch.ones(3, 3),), ValueError, "models"),
        ((torch.full((4, 4), torch.nan),), ValueError, "NaN"),
        ((torch.ones(4, 4), 2, 5), ValueError, "width"),
        ((torch.ones(4, 4), 2, 2, torch.ones(3)), ValueError, "reads"),
    ],
)
def test_bad_selections(arguments: tuple[Any, ...], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        mf.select_units(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(500, 61, generator=generator, dtype=torch.float64) * 3 + 200).to(dtype)
    moments = mf.Moments(61)
    for part in x.split(170):
        moments.update(part)
    wanted = torch.cov(x.T.double(), correction=0)
    torch.testing.assert_close(moments.covariance(), wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(moments.mean, x.double().mean(0), atol=1e-4, rtol=1e-7)
    assert torch.equal(moments.covariance(), moments.covariance().T)
    statistics = mf.Covariance(20)
    statistics.update([x[:, :20], x[:, 20:40]])
    mean, joint = joint_covariance(statistics)
    torch.testing.assert_close(joint, wanted[:40, :40], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(mean, x[:, :40].double().mean(0), atol=1e-4, rtol=1e-6)
    with pytest.raises(ValueError, match="full"):
        joint_covariance(mf.Covariance(3, scope="cross"))
    with pytest.raises(ValueError, match="width"):
        mf.Moments(0)
    with pytest.raises(ValueError, match="at least one sample"):
        mf.Moments(3).covariance()
    with pytest.raises(ValueError, match="samples"):
        moments.update(torch.ones(3, 4))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((2, 1), (1, 2), (1, 2)), (1, 2, 2)])
def test_patches_are_what_the_convolution_reads(stride: Any, padding: Any, dilation: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 9, 8, generator=generator)
    weight = torch.randn(4, 5, 3, 2, generator=generator)
    y = F.conv2d(x, weight, None, stride, padding, dilation)

    def pair(value: Any) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else value

    call = Call("w", None, F.linear, x, y, (3, 2), pair(stride), pair(padding), pair(dilation))
    rows = patches(call, None)
    slope = weight.permute(0, 2, 3, 1).reshape(4, -1)
    torch.testing.assert_close(as_weight(slope, weight), weight)
    wanted = y.permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(rows @ slope.T, wanted, atol=1e-4, rtol=1e-4)
    some = torch.tensor([0, 3, y.shape[2] * y.shape[3] - 1])
    torch.testing.assert_close(
        patches(call, some) @ slope.T, y.flatten(2)[:, :, some].transpose(1, 2).reshape(-1, 4), atol=1e-4, rtol=1e-4
    )


class _Odd(nn.Module):
    """A layer used twice, a weight with two names, a stream, a scaled branch, and a last layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.branch, self.scaled, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.tanh(self.again(self.again(x)))
        x = torch.tanh(self.other(self.tied(x)))
        x = F.dropout(self.branch(x), 0.5, self.training) + x
        x = x + 0.5 * self.scaled(x)
        return self.last(x)


def test_layers_are_found_in_any_forward_pass() -> None:
    torch.manual_seed(0)
    models = [_Odd().eval(), _Odd().eval()]
    axes = (mf.Axis("first.weight", 0, "out"), mf.Axis("first.bias", 0, "out"), mf.Axis("again.weight", 1, "in"))
    plan = mf.MergePlan(
        mf.PermutationSpec((mf.Space("first", 6, axes),)), {"first": torch.arange(6).repeat(2, 1)}, "zip"
    )
    seen: list[tuple[str, bool, bool]] = []

    def work(layer: Layer) -> None:
        seen.append((layer.weight, layer.calls[0].skip is not None, layer.last))

    x = [torch.randn(5, 6), torch.randn(4, 6)]
    assert walk_layers(models[0], models, x, plan, work) == 4
    assert seen == [
        ("first.weight", False, False),
        ("branch.weight", True, True),
        ("scaled.weight", False, True),
        ("last.weight", False, True),
    ]


def test_an_error_inside_a_model_comes_out_and_leaves_nothing_behind() -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    known = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mf.refit(_merged(models, plan), models, [torch.ones(2, 7)], plan)
    with pytest.raises(ValueError, match="at least one batch"):
        mf.refit(_merged(models, plan), models, [], plan)
    assert threading.active_count() == known


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"output": "median"}, ValueError, "output"),
        ({"output": "heads"}, ValueError, "heads: expected one"),
        ({"output": "heads", "heads": [torch.ones(2, 5)] * 2}, ValueError, r"\(classes, 6\)"),
        ({"output": "heads", "heads": [torch.ones(2, 6), torch.ones(6)]}, ValueError, "model 1"),
        ({"output": "heads", "heads": [torch.full((2, 6), torch.inf)] * 2}, ValueError, "NaN or inf"),
        ({"part": "first"}, ValueError, "part"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"token_weight": 0}, ValueError, "token_weight"),
        ({"spill": ""}, ValueError, "spill: expected a folder, got ''; give '.'"),
    ],
)
def test_bad_refits(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    with pytest.raises(kind, match=words):
        mf.refit(_merged(models, plan), models, batches, plan, **options)


@pytest.mark.parametrize("work", [mf.refit, mf.repair])
@pytest.mark.parametrize(
    ("fills", "words"),
    [
        ([], "at least one batch"),
        ([(0, 1.0)], "empty batch"),
        ([(8, torch.nan)], "NaN or infinite"),
        ([(8, 1.0), (8, torch.inf)], "NaN or infinite"),
    ],
)
def test_calibration_that_says_nothing_changes_nothing(work: Any, fills: list[tuple[int, float]], words: str) -> None:
    models, spec, good = _pair("mlp")
    batches = [torch.full((samples, good[0].shape[1]), value) for samples, value in fills]
    plan = _zip(models, spec, good)
    merged = _merged(models, plan)
    before = {name: x.clone() for name, x in merged.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        work(merged, models, batches, plan)
    assert all(torch.equal(x, before[name]) for name, x in merged.state_dict().items())


@pytest.mark.parametrize("plan", [None, {"fc1": torch.zeros(2, 4)}, "plan.safetensors"], ids=["none", "dict", "path"])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    models, spec, batches = _pair("mlp")
    merged = _merged(models, _zip(models, spec, batches))
    states, words = [m.state_dict() for m in models], f"plan: expected a MergePlan.*got {type(plan).__name__}"
    for call in (
        lambda: mf.refit(merged, models, batches, plan),
        lambda: mf.refit(merged, models, batches, plan, part="last"),
        lambda: mf.repair(merged, models, batches, plan),
        lambda: mf.decode(plan, states, mf.calibrate_readers(models, batches, spec)),
        lambda: mf.merge_partially(models, plan),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_readers_without_calibration() -> None:
    models, spec, batches = _pair("mlp")
    plan = _zip(models, spec, batches)
    states = [m.state_dict() for m in models]
    with pytest.raises(ValueError, match="empty batch"):
        mf.calibrate_readers(models, [batches[0][:0]], spec)
    with pytest.raises(ValueError, match="readers: expected what calibrate_readers gave"):
        mf.decode(plan, states, {})
