"""The law for every family and variant: a model permuted at random in any of its spaces computes the same function.

Tolerances: 1e-5 in float32 (sums in another order), 1e-10 in float64. Norm weights, biases and running statistics are
random: at their initial values a forgotten one would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from networks import MLP, VGG, ResNet, ResNet20, ViT, randomise_norms
from torch import nn

from mudsc_fast import specs
from mudsc_fast.axes import rows
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs import spec_for

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
Made = tuple[nn.Module, PermutationSpec, torch.Size]
IMAGE = torch.Size((2, 3, 16, 16))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small run ten times slower on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resnet_case(blocks: tuple[int, ...], width: int, kind: str, norm: str = "batch", stem: str = "cifar") -> Made:
    model = ResNet(blocks, width, kind, norm, 4, stem, num_outputs=7)
    return model, specs.resnet(blocks, width, kind, norm, 4, stem), IMAGE


def vit_case(fused: bool, qk_norm: bool, pool: str, class_token: bool = True) -> Made:
    options = {"fused": fused, "qk_norm": qk_norm, "pool": pool, "class_token": class_token}
    model = ViT(16, 4, width=24, depth=2, num_heads=3, hidden=20, num_outputs=7, **options)
    return model, specs.vit(2, 24, 3, 20, **options), IMAGE


def vgg_case(batch_norm: bool, hidden: tuple[int, ...]) -> Made:
    config = (8, 8, "M", 12, "M")
    model = VGG(config, batch_norm, hidden, image=16, num_outputs=7)
    return model, specs.vgg(config, batch_norm, hidden=hidden, spatial=16), IMAGE


def huggingface_resnet(kind: str, first: bool) -> Made:
    transformers = pytest.importorskip("transformers")
    sizes = [8, 16, 32] if kind == "basic" else [32, 64, 128]
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=sizes, depths=[1, 2, 1], layer_type=kind, downsample_in_first_stage=first
    )
    model = transformers.ResNetForImageClassification(config)
    return model, specs.resnet((1, 2, 1), 8, kind, names="huggingface"), IMAGE


def huggingface_vit() -> Made:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    new = "vit.layers.0.attention.q_proj.weight" in model.state_dict()
    return model, specs.vit(2, 24, 3, 20, names="huggingface" if new else "huggingface4"), IMAGE


def sequential_mlp() -> Made:
    model = nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)
    )
    spec = specs.mlp((9, 5), ("0", "3", "5"), ("1", None), bias=True)
    axes = tuple(a for a in spec["3"].axes if a.tensor != "3.bias")
    return model, PermutationSpec((spec["0"], replace(spec["3"], axes=axes))), torch.Size((3, 6))


CASES: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (MLP(20, (9, 12, 5)), specs.mlp((9, 12, 5)), torch.Size((3, 20))),
    "mlp of one hidden layer": lambda: (MLP(20, (9,)), specs.mlp((9,)), torch.Size((3, 20))),
    "mlp sequential": sequential_mlp,
    "resnet20": lambda: (ResNet20(width=8), specs.resnet((3, 3, 3), 8, stem="cifar"), IMAGE),
    "resnet basic": lambda: resnet_case((1, 2), 8, "basic", stem="imagenet"),
    "resnet basic group": lambda: resnet_case((1, 2), 8, "basic", "group"),
    "resnet bottleneck": lambda: resnet_case((2, 1), 4, "bottleneck"),
    "resnet bottleneck group": lambda: resnet_case((1, 2), 8, "bottleneck", "group", "imagenet"),
    "resnet huggingface basic": lambda: huggingface_resnet("basic", False),
    "resnet huggingface bottleneck": lambda: huggingface_resnet("bottleneck", False),
    "resnet huggingface downsampled": lambda: huggingface_resnet("bottleneck", True),
    "vgg": lambda: vgg_case(False, (10, 6)),
    "vgg bn": lambda: vgg_case(True, ()),
    "vit fused": lambda: vit_case(True, False, "token"),
    "vit separate": lambda: vit_case(False, False, "token"),
    "vit fused qk-norm": lambda: vit_case(True, True, "token"),
    "vit separate qk-norm": lambda: vit_case(False, True, "token"),
    "vit pooled": lambda: vit_case(True, False, "mean", class_token=False),
    "vit pooled with class token": lambda: vit_case(False, True, "mean"),
    "vit huggingface": huggingface_vit,
}


def make(name: str) -> Made:
    torch.manual_seed(0)
    model, spec, shape = CASES[name]()
    return randomise_norms(model).eval(), spec, shape


@pytest.mark.parametrize("name", CASES)
def test_law(name: str) -> None:
    model, spec, shape = make(name)
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        changes = spec.verify_each(model.to(dtype), x, seed=2)
        assert len(changes) == len(spec) + len(spec.ties) + 1
        assert max(changes.values()) < TOLERANCE[dtype], max(changes, key=changes.__getitem__)


@pytest.mark.parametrize("name", CASES)
def test_every_space_really_moves(name: str) -> None:
    """A permutation that changed no tensor would obey the law too."""
    model, spec, _ = make(name)
    state = model.state_dict()
    for space in spec:
        moved = spec.permute(state, {n: p for n, p in spec.random_permutation(7).items() if _together(spec, space, n)})
        changed = {n for n in state if not torch.equal(moved[n], state[n])}
        assert changed & {a.tensor for a in space.axes}, space.name


def _together(spec: PermutationSpec, space, name: str) -> bool:  # type: ignore[no-untyped-def]
    return name == space.name or (space.tie is not None and name in spec.ties[space.tie])


@pytest.mark.parametrize("name", CASES)
def test_spec_for_finds_the_same_spec(name: str) -> None:
    model, spec, _ = make(name)
    assert spec_for(model) == spec
    hints = {"heads": 3} if "vit" in name else {"groups": 4} if "group" in name else {}
    assert spec_for(model.state_dict(), **hints) == spec
    assert spec_for({n: tuple(t.shape) for n, t in model.state_dict().items()}, **hints) == spec


@pytest.mark.parametrize("name", CASES)
def test_taps_see_the_units_where_they_are_told(name: str) -> None:
    """A hook on every tap sees the units of its space: after a permutation, the same values in the new order."""
    model, spec, shape = make(name)
    model = model.double()
    p = spec.random_permutation(3)
    x = torch.randn(shape, dtype=torch.float64)
    before = _seen(model, spec, x)
    model.load_state_dict(spec.permute(model.state_dict(), p))
    after = _seen(model, spec, x)
    for space in spec:
        for tap in space.taps:
            a, b = before[tap], after[tap]
            assert a.shape[0] == space.width
            a, b = (t[p[space.name]] if i == 0 else t for i, t in enumerate((a, b)))
            # Other spaces reorder the samples of one unit (heads, places in a head): compare them sorted.
            assert torch.allclose(a.sort(1).values, b.sort(1).values, atol=1e-9), (space.name, tap)


def _seen(model: nn.Module, spec: PermutationSpec, x: torch.Tensor) -> dict[object, torch.Tensor]:
    seen, hooks = {}, []

    def watch(module: nn.Module, tap) -> None:  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            value = inputs[0] if tap.port == "input" else output
            value = value[0] if isinstance(value, tuple) else value
            view, dims = rows(value.detach(), tap)
            view = view.movedim(dims, list(range(len(dims))))
            seen[tap] = view.reshape(view.shape[: len(dims)].numel(), -1)

        hooks.append(module.register_forward_hook(hook))

    for space in spec:
        for tap in space.taps:
            watch(model.get_submodule(tap.module), tap)
    with torch.no_grad():
        model(x)
    for handle in hooks:
        handle.remove()
    return seen


def test_running_statistics_are_moved_but_not_compared() -> None:
    spec = specs.resnet((1, 1), 8)
    compared = {a.tensor: a.compare for s in spec for a in s.axes}
    assert not compared["bn1.running_mean"]
    assert not compared["layer2.0.downsample.1.running_var"]
    assert compared["bn1.weight"]
    assert compared["bn1.bias"]


def test_streams_of_a_resnet() -> None:
    """The last place of a stream is its tap; a stage's shortcut starts the next stream."""
    spec = specs.resnet((2, 1), 8)
    assert [s.name for s in spec] == ["layer1.0.conv1", "layer1.1.conv1", "stem", "layer2.0.conv1", "layer2.0"]
    assert spec["stem"].taps[0].module == "layer1.1"
    assert spec["layer2.0"].taps[0].port == "output"
    assert "layer2.0" in spec.neighbours("stem")
    assert "layer1.0.conv1" in spec.neighbours("stem")
    assert "layer2.0.conv1" not in spec.neighbours("layer1.0.conv1")


def test_heads_of_a_vit_are_tied() -> None:
    spec = specs.vit(1, 24, 3, 20)
    assert spec.ties == {"blocks.0.heads": ("blocks.0.qk", "blocks.0.v")}
    assert [t.pick for t in spec["blocks.0.qk"].taps] == [(0, 0), (0, 1)]
    p = spec.random_permutation(0)
    assert torch.equal(p["blocks.0.qk"][::8] // 8, p["blocks.0.v"][::8] // 8)


def test_huggingface_names_before_transformers_5() -> None:
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 24),
        "vit.embeddings.position_embeddings": (1, 17, 24),
        "vit.embeddings.patch_embeddings.projection.weight": (24, 3, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (24,),
        "classifier.weight": (5, 24),
        "classifier.bias": (5,),
    }
    layer = "vit.encoder.layer.0."
    linear = {f"attention.attention.{n}": (24, 24) for n in ("query", "key", "value")}
    linear |= {"attention.output.dense": (24, 24), "intermediate.dense": (20, 24), "output.dense": (24, 20)}
    for name, shape in linear.items():
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in (f"{layer}layernorm_before", f"{layer}layernorm_after", "vit.layernorm"):
        shapes |= {f"{name}.weight": (24,), f"{name}.bias": (24,)}
    spec = spec_for(shapes, heads=3)
    assert spec == specs.vit(1, 24, 3, 20, names="huggingface4")
    touched = {name for name in shapes if name in spec.entries}
    assert touched == set(shapes) - {"classifier.bias"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no tensors.*Looked for resnet: conv1.weight.*vgg: .*vit: .*mlp: "),
        ({"a.weight": (3, 4)}, "no known architecture.*a.weight"),
        ({"l1.weight": (5, 4), "l2.weight": (5, 4), "l3.weight": (2, 5)}, "no known architecture"),
        ({"q.weight": (4, 4), "k.weight": (4, 4), "v.weight": (4, 4), "o.weight": (4, 4)}, "no known architecture"),
        ({"features.0.weight": (8, 1, 3, 3), "features.1.weight": (8, 1, 3, 3)}, "no known architecture"),
    ],
)
def test_spec_for_says_what_it_looked_for(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        spec_for(shapes)


def test_spec_for_asks_for_what_tensors_do_not_tell() -> None:
    model, _, _ = make("vit fused")
    with pytest.raises(ValueError, match=r"blocks.0: .*number of heads is not told.*heads=\.\.\."):
        spec_for(model.state_dict())
    with pytest.raises(ValueError, match="that divides 24"):
        spec_for(model.state_dict(), heads=5)
    model, _, _ = make("resnet basic group")
    with pytest.raises(ValueError, match=r"bn1: .*number of groups.*groups=\.\.\."):
        spec_for(model.state_dict())
    with pytest.raises(TypeError, match="model: expected a module or a state dict, got int"):
        spec_for(3)  # type: ignore[arg-type]


def test_lookalikes_are_refused() -> None:
    """The same names with a grouped convolution, an extra tensor are other architectures."""
    state = dict(make("resnet basic")[0].state_dict())
    for extra in (
        {"layer1.0.conv1.weight": torch.zeros(8, 4, 3, 3)},
        {"layer1.0.attention.weight": torch.zeros(8, 8)},
        {"layer1.0.conv1.scale": torch.zeros(8)},
    ):
        with pytest.raises(ValueError, match="no known architecture"):
            spec_for({**state, **extra})
    state = dict(make("vit fused")[0].state_dict())
    for extra in ({"blocks.0.attn.relative": torch.zeros(8, 8)}, {"blocks.1.mlp.fc1.weight": torch.zeros(21, 24)}):
        with pytest.raises(ValueError, match="no known architecture"):
            spec_for({**state, **extra}, heads=3)
    del state["pos_embed"]  # rotary positions
    with pytest.raises(ValueError, match="no known architecture"):
        spec_for(state, heads=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: specs.mlp((3,), ("a",)), "layers: expected 2 names"),
        (lambda: specs.mlp((3,), norms=("a", "b")), "norms: expected 1"),
        (lambda: specs.mlp((3,), norm="group"), "norm: expected 'batch' or 'layer'"),
        (lambda: specs.resnet(block="dense"), "block: expected one of basic, bottleneck"),
        (lambda: specs.resnet(norm="layer"), "norm: expected one of"),
        (lambda: specs.resnet(norm="group", groups=7), "blocks must divide the width 64"),
        (lambda: specs.resnet(names="timm"), "names: expected one of torchvision, huggingface"),
        (lambda: specs.vgg(12), "config: expected one of 11, 13, 16, 19"),
        (lambda: specs.vit(names="torchvision"), "names: expected one of timm"),
        (lambda: specs.vit(pool="max"), "pool: expected 'token' or 'mean'"),
        (lambda: specs.vit(heads=7), "heads: 7 heads do not divide the width 384"),
    ],
)
def test_bad_parameters(call: Callable[[], PermutationSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_torchvision_vgg16_names() -> None:
    spec = specs.vgg(16, batch_norm=True)
    assert spec["features.40"].axes[-1].view == (512, 49)
    assert [s.name for s in spec][-2:] == ["classifier.0", "classifier.3"]
    assert len(spec) == 15
