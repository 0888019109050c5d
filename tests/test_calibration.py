"""Calibration: the statistics equal the reference's on the same activations, and the models come back untouched."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict, namedtuple

import pytest
import torch
from networks import MLP, ResNet, randomise_norms
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.hooks import first_tensor

# float32 statistics against float64: the covariance op promises 1e-5, these streams are short and well scaled.
TOLERANCE = 2e-6


def mlp_spec(widths: tuple[int, ...] = (12, 7)) -> mf.PermutationSpec:
    names = [*(f"fc{k + 1}" for k in range(len(widths))), "head"]
    spaces = []
    for k, width in enumerate(widths):
        axes = (
            mf.Axis(f"{names[k]}.weight", 0, "out"),
            mf.Axis(f"{names[k]}.bias", 0, "out"),
            mf.Axis(f"{names[k + 1]}.weight", 1, "in"),
        )
        spaces.append(mf.Space(names[k], width, axes, (mf.Tap(names[k + 1], "input", -1),)))
    return mf.PermutationSpec(tuple(spaces))


def mlps(count: int = 2, widths: tuple[int, ...] = (12, 7)) -> list[MLP]:
    torch.manual_seed(1)
    return [MLP(9, widths, 4) for _ in range(count)]


def batches(count: int = 3, size: int = 21) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size + k, 9, generator=generator) for k in range(count)]


def expected(models: list[MLP], inputs: list[Tensor], layer: str, scope: str = "full") -> Tensor:
    """The correlation of what `layer` takes in, from the reference on activations collected here."""
    seen: list[Tensor] = []
    covariance = None
    for x in inputs:
        seen.clear()
        for model in models:
            handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model(x)
            handle.remove()
        if covariance is None:
            covariance = mf.reference.Covariance(seen[0].shape[-1], models=len(models), scope=scope)
        covariance.update(seen)
    return covariance.correlation()


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("scope", ["full", "cross"])
def test_statistics_equal_the_reference(models: int, scope: str) -> None:
    nets, data = mlps(models), batches()
    stats = mf.calibrate(nets, data, mlp_spec(), scope)
    assert list(stats) == ["fc1", "fc2"]
    for space, layer in (("fc1", "fc2"), ("fc2", "head")):
        assert stats[space].count == sum(len(x) for x in data)
        torch.testing.assert_close(
            stats[space].correlation().double(), expected(nets, data, layer, scope), atol=TOLERANCE, rtol=0
        )


class Keywords(nn.Module):
    """Takes keyword arguments, like a Hugging Face model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = net.fc1, net.fc2, net.head

    def forward(self, *, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.fc2(input=self.fc1(pixels).relu()).relu()
        return self.head(hidden)


Pair = namedtuple("Pair", "x y")


def test_every_batch_format_gives_the_same_statistics() -> None:
    nets, data = mlps(), batches()
    plain = mf.calibrate(nets, data, mlp_spec())["fc2"].correlation()
    targets = [torch.zeros(len(x), dtype=torch.int64) for x in data]
    wrapped = [Keywords(net) for net in nets]
    formats = {
        "tuple": (nets, [(x, y) for x, y in zip(data, targets, strict=True)]),
        "list": (nets, [[x, y] for x, y in zip(data, targets, strict=True)]),
        "named tuple": (nets, [Pair(x, y) for x, y in zip(data, targets, strict=True)]),
        "generator": (nets, (x for x in data)),
        "dict": (wrapped, [{"pixels": x, "labels": y} for x, y in zip(data, targets, strict=True)]),
        "user dict": (wrapped, [UserDict(pixels=x) for x in data]),
        "dict in a tuple": (wrapped, [({"pixels": x}, 0) for x in data]),
    }
    for name, (models, given) in formats.items():
        got = mf.calibrate(models, given, mlp_spec())["fc2"].correlation()
        assert torch.equal(got, plain), name


def test_hugging_face_batches() -> None:
    transformers = pytest.importorskip("transformers")
    data = batches()
    nets = [Keywords(net) for net in mlps()]
    given = [transformers.BatchEncoding({"pixels": x}) for x in data]
    got = mf.calibrate(nets, given, mlp_spec())["fc1"].correlation()
    assert torch.equal(got, mf.calibrate(mlps(), data, mlp_spec())["fc1"].correlation())


class InPlace(nn.Module):
    """An in-place ReLU writes over the tapped output before the forward ends."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.head = nn.Linear(9, 12), nn.ReLU(inplace=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc1(x)))


def test_activations_are_seen_before_in_place_changes() -> None:
    torch.manual_seed(3)
    nets, data = [InPlace(), InPlace()], batches()
    axes = (mf.Axis("fc1.weight", 0, "out"), mf.Axis("fc1.bias", 0, "out"), mf.Axis("head.weight", 1, "in"))
    spec = mf.PermutationSpec((mf.Space("h", 12, axes, (mf.Tap("fc1", "output", 1),)),))
    want = mf.reference.Covariance(12)
    for x in data:
        want.update([net.fc1(x) for net in nets])
    got = mf.calibrate(nets, data, spec)["h"].correlation()
    torch.testing.assert_close(got.double(), want.correlation(), atol=TOLERANCE, rtol=0)


def test_several_taps_add_their_samples_and_views_pick_units() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(9, 3 * 2 * 4), nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.qkv(x)[..., 16:])

    torch.manual_seed(4)
    nets = [Fused(), Fused()]
    data = [x.reshape(7, 3, 9) for x in batches(2, 21) if len(x) == 21]
    view = {"view": (3, 2, 4), "at": (1, 2)}
    axes = [mf.Axis("qkv.weight", 0, "out", pick=(0, k), **view) for k in range(3)]
    taps = [mf.Tap("qkv", "output", -1, pick=(0, k), **view) for k in range(2)]
    qk = mf.Space("qk", 8, axes[:2], taps, blocks=2, tie="heads")
    # Units (head, place) of the values; a second tap sees the same values at the next module.
    last = mf.Axis("out.weight", 1, "in", view=(2, 4), at=(0, 1))
    v = mf.Space("v", 8, (axes[2], last), (mf.Tap("out", "input", 2),), blocks=2, tie="heads")
    stats = mf.calibrate(nets, data, mf.PermutationSpec((qk, v)))
    want_qk, want_v = mf.reference.Covariance(8), mf.reference.Covariance(8)
    for x in data:
        q, k, value = zip(*(net.qkv(x).chunk(3, dim=-1) for net in nets), strict=True)
        want_qk.update(q)
        want_qk.update(k)
        want_v.update(value)
    assert stats["qk"].count == 2 * stats["v"].count
    for name, want in (("qk", want_qk), ("v", want_v)):
        torch.testing.assert_close(stats[name].correlation().double(), want.correlation(), atol=TOLERANCE, rtol=0)


def test_units_on_factors_that_lie_apart() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(9, 2 * 3 * 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    torch.manual_seed(5)
    nets, data = [Spread(), Spread()], batches(1)
    part = {"view": (2, 3, 5), "at": (0, 2)}
    space = mf.Space("s", 10, (mf.Axis("lin.weight", 0, "out", **part),), (mf.Tap("lin", "output", 1, **part),))
    got = mf.calibrate(nets, data, mf.PermutationSpec((space,)))["s"]
    want = mf.reference.Covariance(10)
    # The middle factor counts as samples.
    want.update([net(data[0]).reshape(-1, 2, 3, 5).transpose(1, 2).reshape(-1, 10) for net in nets])
    assert got.count == want.count
    torch.testing.assert_close(got.correlation().double(), want.correlation(), atol=TOLERANCE, rtol=0)


def test_spaces_without_taps_have_no_entry() -> None:
    spec = mlp_spec()
    bare = mf.PermutationSpec((spec.spaces[0], mf.Space("fc2", 7, spec.spaces[1].axes)))
    assert list(mf.calibrate(mlps(), batches(), bare)) == ["fc1"]


def test_the_same_module_may_stand_for_two_models() -> None:
    net, data = mlps()[0], batches()
    got = mf.calibrate([net, net], data, mlp_spec())["fc1"].correlation()
    torch.testing.assert_close(got[:12, 12:], got[:12, :12], atol=TOLERANCE, rtol=0)


def traces(model: nn.Module) -> tuple[list[bool], int, list[Tensor]]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return [m.training for m in model.modules()], hooks, [t.clone() for t in model.state_dict().values()]


def assert_untouched(models: list[nn.Module], before: list[tuple[list[bool], int, list[Tensor]]]) -> None:
    for model, (flags, hooks, tensors) in zip(models, before, strict=True):
        now = traces(model)
        assert now[0] == flags
        assert now[1] == hooks == 0
        assert all(torch.equal(a, b) for a, b in zip(now[2], tensors, strict=True))


def test_models_come_back_untouched() -> None:
    torch.manual_seed(6)
    nets = [ResNet((1, 1), 4, channels=1), ResNet((1, 1), 4, channels=1)]
    nets[0].layer1.eval()
    space = mf.Space("c", 4, (mf.Axis("layer1.0.conv1.weight", 0, "out"),), (mf.Tap("layer1.0.bn1", "output", 1),))
    before = [traces(net) for net in nets]
    stats = mf.calibrate(nets, [torch.randn(3, 1, 8, 8)], mf.PermutationSpec((space,)))
    assert stats["c"].count == 3 * 8 * 8
    assert not stats["c"].mean.requires_grad
    assert_untouched(nets, before)


@pytest.mark.parametrize("where", ["batches", "first model", "last model"])
def test_models_come_back_untouched_after_an_error(where: str) -> None:
    nets = mlps()
    spec = mlp_spec()
    before = [traces(net) for net in nets]

    def data() -> object:
        yield batches()[0]
        if where == "batches":
            raise RuntimeError("stop here")
        yield batches()[1]

    handles = []
    if where != "batches":
        calls = []

        def stop(*_: object) -> None:
            calls.append(0)
            if len(calls) == 2:
                raise RuntimeError("stop here")

        net = nets[0 if where == "first model" else 1]
        handles.append(net.register_forward_pre_hook(stop))
    with pytest.raises(RuntimeError, match="stop here"):
        mf.calibrate(nets, data(), spec)
    for handle in handles:
        handle.remove()
    assert_untouched(nets, before)


def test_only_the_current_batch_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    update = mf.Covariance.update

    def watched(self: mf.Covariance, features: list[Tensor], dim: int = -1) -> None:
        held.extend(weakref.ref(x) for x in features)
        update(self, features, dim)

    monkeypatch.setattr(mf.Covariance, "update", watched)

    def data() -> object:
        for x in batches():
            gc.collect()
            assert not [r for r in held if r() is not None]
            yield x

    mf.calibrate(mlps(3), data(), mlp_spec())
    assert len(held) == 3 * 2 * 3


def test_save_and_load(tmp_path) -> None:
    stats = mf.calibrate(mlps(3), batches(), mlp_spec())
    stats.save(tmp_path / "stats.safetensors")
    again = mf.ActivationStats.load(tmp_path / "stats.safetensors")
    assert list(again) == list(stats)
    for name in stats:
        assert again[name].count == stats[name].count
        assert torch.equal(again[name].correlation(), stats[name].correlation())
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    # Loaded statistics can go on.
    again["fc1"].merge(stats["fc1"])
    assert again["fc1"].count == 2 * stats["fc1"].count


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    mf.calibrate(mlps(), batches(), mlp_spec()).save(path)
    whole = path.read_bytes()
    for name, content in {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "huge header": (1 << 62).to_bytes(8, "little") + whole[8:],
        "no header": b"not a safetensors file at all",
        "hostile metadata": whole.replace(b'\\"spaces\\"', b'\\"spades\\"'),
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"stats\.safetensors"):
            mf.ActivationStats.load(path)
        assert name


def test_another_kind_of_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a file of activation statistics"):
        mf.ActivationStats.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        mf.ActivationStats.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": []}, ValueError, "models: expected two or more, got 0"),
        ({"models": mlps(1)}, ValueError, "models: expected two or more, got 1"),
        ({"models": torch.nn.Sequential(*mlps(2))}, TypeError, "models: expected a sequence of modules, got one Seq"),
        ({"models": [1, 2]}, TypeError, "models: expected torch modules, got int for model 0"),
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"batches": torch.zeros(3, 9)}, TypeError, "got one Tensor; put it in a list"),
        ({"batches": {"x": torch.zeros(3, 9)}}, TypeError, "got one dict; put it in a list"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"batches": ["text"]}, TypeError, "batches: expected tensors"),
        ({"batches": [()]}, ValueError, "without an input"),
        ({"batches": [{}]}, ValueError, "keyword arguments is empty"),
        ({"batches": [torch.zeros(0, 9)]}, ValueError, r"empty batch of shape \(0, 9\)"),
        ({"spec": "mlp"}, TypeError, "spec: expected a PermutationSpec, got str"),
        ({"scope": "half"}, ValueError, "scope"),
        ({"progress": "sometimes"}, ValueError, "progress"),
        ({"models": [*mlps(1), *mlps(1, (12, 8))]}, ValueError, r"tap 'head' .*expected activations of one shape"),
        ({"models": mlps(2, (12, 8))}, ValueError, r"tap 'head' \(input\) of space 'fc2'.* 7 units"),
        ({"models": mlps(2, (12,))}, ValueError, r"tap 'fc2': model 0 \(MLP\) has no such module"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"models": mlps(), "batches": batches(), "spec": mlp_spec(), **change}
    with pytest.raises(error, match=message):
        mf.calibrate(**arguments)


def test_a_tap_that_is_never_called_or_unevenly_called() -> None:
    class Sometimes(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.a, self.b, self.times = nn.Linear(9, 9), nn.Linear(9, 9), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.b(x)
            return self.a(x)

    space = mf.Space("s", 9, (mf.Axis("b.weight", 0, "out"),), (mf.Tap("b", "output", 1),))
    spec = mf.PermutationSpec((space,))
    with pytest.raises(ValueError, match="never called in 2 batches"):
        mf.calibrate([Sometimes(0), Sometimes(0)], batches(2), spec)
    for times in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="a different number of times"):
            mf.calibrate([Sometimes(t) for t in times], batches(2), spec)
    assert mf.calibrate([Sometimes(2), Sometimes(2)], batches(1), spec)["s"].count == 42


def test_a_tap_that_sees_no_floats() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    space = mf.Space("s", 5, (mf.Axis("embed.weight", 1, "out"),), (mf.Tap("embed", "input", 1),))
    with pytest.raises(TypeError, match=r"tap 'embed' \(input\): expected a floating tensor, got torch.int64"):
        mf.calibrate([Tokens(), Tokens()], [torch.zeros(2, 3, dtype=torch.int64)], mf.PermutationSpec((space,)))


def test_first_tensor_searches_in_order() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    assert first_tensor((None, {"x": [1, b], "y": a})) is b
    assert first_tensor({"n": 3}) is None


def batchnorms(model: nn.Module) -> list[tuple[Tensor, Tensor, float | None]]:
    return [
        (m.running_mean.clone(), m.running_var.clone(), m.momentum)
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]


def images(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(6, 1, 8, 8, generator=generator) for _ in range(count)]


def test_reset_batchnorm_gives_the_average_over_the_batches() -> None:
    torch.manual_seed(8)
    model = randomise_norms(ResNet((1,), 4, channels=1)).eval()
    model.layer1.train()
    flags = [m.training for m in model.modules()]
    assert mf.reset_batchnorm(model, images()) == 3
    outputs = [torch.nn.functional.conv2d(x, model.conv1.weight, padding=1) for x in images()]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.bn1.running_var, variance, atol=1e-6, rtol=1e-6)
    assert int(model.bn1.num_batches_tracked) == 3
    assert [m.training for m in model.modules()] == flags
    assert all(momentum == 0.1 for _, _, momentum in batchnorms(model))


def test_reset_batchnorm_keeps_dropout_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    mf.reset_batchnorm(model, [torch.ones(5, 4)])
    assert torch.equal(model[1].running_mean, torch.ones(4))


@pytest.mark.parametrize("data", ["none", "fails"])
def test_a_failed_reset_keeps_the_old_statistics(data: str) -> None:
    model = randomise_norms(ResNet((1,), 4, channels=1))
    before = batchnorms(model)

    def failing() -> object:
        yield images()[0]
        raise RuntimeError("stop here")

    with pytest.raises((ValueError, RuntimeError), match=r"at least one batch|stop here"):
        mf.reset_batchnorm(model, [] if data == "none" else failing())
    for old, new in zip(before, batchnorms(model), strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])
        assert old[2] == new[2]


def test_reset_without_batchnorm_does_nothing() -> None:
    def never() -> object:
        raise RuntimeError("was read")
        yield

    assert mf.reset_batchnorm(mlps()[0], never()) == 0
    with pytest.raises(TypeError, match="model: expected a torch module, got dict"):
        mf.reset_batchnorm({}, [])
    with pytest.raises(TypeError, match="put it in a list"):
        mf.reset_batchnorm(mlps()[0], torch.zeros(2, 9))


def test_progress_draws_only_where_asked(capfd) -> None:
    mf.calibrate(mlps(), batches(), mlp_spec(), progress=True)  # pytest's stderr is no terminal
    assert capfd.readouterr().err == ""
    mf.calibrate(mlps(), batches(), mlp_spec(), progress="always")
    assert "calibrating" in capfd.readouterr().err


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    nets, data = mlps(), batches()
    on_cpu = mf.calibrate(nets, data, mlp_spec())["fc1"]
    on_gpu = mf.calibrate(nets, data, mlp_spec(), device="cuda")["fc1"]
    assert on_gpu.mean.device.type == "cuda"
    assert next(nets[0].parameters()).device.type == "cpu"
    torch.testing.assert_close(on_gpu.correlation().cpu(), on_cpu.correlation(), atol=1e-5, rtol=0)
