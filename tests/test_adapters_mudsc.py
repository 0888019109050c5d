"""The official MuDSC module's conventions: recorded merges come out again, and its dictionaries obey the law."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import networks
import pytest
import tool_algorithms as restated
import torch
from golden_cases import Case, covariance_cases, mlp_batches, mlp_cases, mlp_state_dicts
from torch import nn

import mudsc_fast as mf

# What an official script does after its one changed line.
from mudsc_fast.adapters import mudsc as weight_fusion
from mudsc_fast.adapters.mudsc_perms import Perms, translate

TOLERANCE = {"tensors": 2e-5, "correlation": 1e-4, "law": 1e-5}

MLP_PERM: Perms = {
    0: [[0, "fc1.weight"], [0, "fc1.bias"], [1, "fc2.weight", weight_fusion.IN_CFG]],
    1: [[0, "fc2.weight"], [0, "fc2.bias"], [1, "fc3.weight", weight_fusion.IN_CFG]],
    2: [[0, "fc3.weight"], [0, "fc3.bias"], [1, "head.weight", weight_fusion.IN_CFG]],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded_networks() -> list[nn.Module]:
    nets = []
    for state in mlp_state_dicts():
        net = networks.MLP(inputs=64, widths=(48, 48, 48))
        net.load_state_dict(state)
        nets.append(net)
    return nets


# Without ties at dead units (tests/data/goldens/README.md); "align" and "align_act" have them.
RECORDED = [pytest.param(case, id=case[0]) for case in mlp_cases() if case[0] not in ("align", "align_act")]


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_merges(case: Case) -> None:
    name, inputs, expected = case
    fusion = weight_fusion.WeightFusion(
        fix_sims=True, fix_rate=0.5, use_permute=inputs["method"] == "align", verbose=False
    )
    loader = [(x, None) for x in mlp_batches()] if inputs["activations"] else None
    before = copy.deepcopy(MLP_PERM)
    merged = fusion.transform(recorded_networks(), MLP_PERM, act_loader=loader, in_weight_space=inputs["balance"] > 0)
    assert before == MLP_PERM
    assert isinstance(merged, networks.MLP)
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(
            tensor, expected["tensors"][key], rtol=0, atol=TOLERANCE["tensors"], msg=f"{name} {key}"
        )
    for key, (merge, unmerge) in fusion.perm_mats.items():
        labels = expected["labels"][f"fc{key + 1}"].flatten()
        assert torch.equal(unmerge.argmax(1), labels)
        torch.testing.assert_close(merge, 2 * unmerge / unmerge.sum(0))


def test_recorded_covariances() -> None:
    for name, inputs, expected in covariance_cases():
        metric = weight_fusion.CovarianceMetric()
        for batch in inputs["batches"]:
            metric.update(*batch)
        found = metric.finalize(eps=1e-7)
        assert (found.double() - expected["correlation"]).abs().max() < TOLERANCE["correlation"], name
        assert torch.equal(metric.finalize(), found)


def test_plain_average_and_cosine() -> None:
    nets = recorded_networks()
    averaged = weight_fusion.WeightFusion(no_fusion=True, verbose=False).transform(nets, MLP_PERM)
    for key, tensor in averaged.state_dict().items():
        torch.testing.assert_close(tensor, (nets[0].state_dict()[key] + nets[1].state_dict()[key]) / 2)
    fusion = weight_fusion.WeightFusion(use_cos=True, use_permute=True, iter=1, verbose=False)
    fusion.transform(nets, {0: MLP_PERM[0]})
    a, b = (net.state_dict() for net in nets)
    rows = [torch.cat([s["fc1.weight"], s["fc1.bias"][:, None], s["fc2.weight"].T], 1).double() for s in (a, b)]
    unit = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    expected = restated.permute((unit @ unit.T).numpy(), 2)
    assert fusion.perm_mats[0][1].tolist() == expected.tolist()


def test_each_models_regrouped_tensors() -> None:
    nets = recorded_networks()
    fusion = weight_fusion.WeightFusion(verbose=False)
    each = fusion.transform(nets, MLP_PERM, return_state_dict=True)
    merged = fusion.fusion_model.state_dict()
    assert set(each) == set(merged)
    for name in ("fc1.weight", "fc2.weight", "head.weight"):
        torch.testing.assert_close(sum(each[name]) / 2, merged[name])
    merge, _ = fusion.perm_mats[0]
    own = merge.chunk(2)[1].T @ nets[1].state_dict()["fc1.weight"]
    torch.testing.assert_close(each["fc1.weight"][1], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduce", [0.25, 0.5, 0.6])
def test_other_widths_run(reduce: float) -> None:
    fusion = weight_fusion.WeightFusion(reduce=reduce, verbose=False)
    merged = fusion.transform(recorded_networks(), MLP_PERM)
    width = int(96 * (1 - reduce) + 1e-4)
    assert merged.fc2.weight.shape == (width, width)
    assert (merged.fc2.in_features, merged.fc2.out_features) == (width, width)
    assert merged(torch.randn(3, 64)).shape == (3, 10)


# ---- dictionaries of architectures ----


def _resnet(**options: Any) -> nn.Module:
    return networks.randomise_norms(networks.ResNet(blocks=(2, 1, 1), width=8, num_outputs=5, **options)).eval()


def _vit() -> nn.Module:
    return networks.randomise_norms(networks.ViT(image=8, width=24, depth=2, num_heads=3, num_outputs=5)).eval()


NAMES = {"shortcut_name": "downsample", "fc_name": "fc"}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "resnet": (_resnet, lambda: weight_fusion.get_resnet_perm(num_blocks=(2, 1, 1), pool_name="fc", **NAMES)),
    "resnet with groups": (
        lambda: _resnet(norm="group", groups=4),
        lambda: weight_fusion.get_resnet_perm_group(num_blocks=(2, 1, 1), pool_name="fc", group_num=4, **NAMES),
    ),
    "vit": (_vit, lambda: weight_fusion.get_vit_perm(num_layer=2, num_heads=3)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dictionaries_obey_the_law(name: str) -> None:
    build, perms = ARCHITECTURES[name]
    model = build()
    torch.manual_seed(0)
    spec = translate(perms(), model.state_dict()).spec
    inputs = torch.randn(4, 3, 8, 8)
    assert spec.verify(model, inputs) <= TOLERANCE["law"]
    own = mf.spec_for(model)
    moved = {(a.tensor, a.dim) for s in spec for a in s.axes}
    assert moved == {(a.tensor, a.dim) for s in own for a in s.axes}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_permuted_model_is_found_again_like_a_script_does(name: str) -> None:
    build, perms = ARCHITECTURES[name]
    model = build()
    torch.manual_seed(1)
    moved = copy.deepcopy(model)
    spec = mf.spec_for(model)
    moved.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(3)))
    loader = [(torch.randn(16, 3, 8, 8), torch.zeros(16)) for _ in range(3)]
    fusion = weight_fusion.WeightFusion(a=0.5, b=1, fix_rate=0.5, fix_sims=True, use_permute=True, verbose=False)
    merged = fusion.transform([model, moved], perms(), act_loader=loader, in_weight_space=True)
    for key, tensor in merged.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-5, atol=1e-5, msg=key)


def test_heads_move_together_unless_asked() -> None:
    perms = weight_fusion.get_vit_perm(num_layer=2, num_heads=3)
    state = _vit().state_dict()
    assert set(translate(perms, state).spec.ties) == {"heads of blocks.0.attn.qkv", "heads of blocks.1.attn.qkv"}
    assert not translate(perms, state, tie=False).spec.ties
    fusion = weight_fusion.WeightFusion(tie_heads=False, use_permute=True, verbose=False)
    each = fusion.transform([_vit(), _vit()], perms, return_state_dict=True)
    assert each["blocks.0.attn.qkv.weight_k"][1].shape == (24, 24)
    assert "blocks.0.attn.qkv.weight" not in each


def test_swin_and_clip_dictionaries_name_each_axis_once() -> None:
    for perms in (weight_fusion.get_swin_perm((1, 1, 1), (1, 2, 2)), weight_fusion.get_vit_clip_perm(2, 3)):
        named = [(axis, name) for own in perms.values() for axis, name, *_ in own]
        assert len(named) == len(set(named))
        assert list(perms) == list(range(len(perms)))


# ---- bad input ----


def _perm(*entries: Any) -> dict[int, Any]:
    return {0: list(entries)}


IN = weight_fusion.IN_CFG
BAD: list[tuple[Any, str]] = [
    ({0: "fc1.weight"}, "expected a list of"),
    (_perm([0]), "expected .axis, tensor. or"),
    (_perm([0, "fc9.weight"]), "the models have no tensor 'fc9.weight'"),
    (_perm([5, "fc1.weight"]), "fc1.weight has no axis 5"),
    (_perm([0, "fc1.weight", {"inn": None}]), "expected cfg keys group, split_dim"),
    (_perm([0, "fc1.weight", weight_fusion.group_cfg(7)]), "blocks must divide the width 48"),
    (
        _perm([0, "fc1.weight", weight_fusion.group_cfg(4)], [0, "fc1.bias", weight_fusion.group_cfg(8)]),
        "different numbers",
    ),
    (_perm([0, "fc1.weight"], [0, "fc1.weight"]), "fc1.weight"),
    (_perm([0, "fc1.weight"], [1, "head.weight", {"in": "nowhere"}]), "no module 'nowhere'"),
    (_perm([0, "fc1.weight", weight_fusion.act_module_cfg(hook="after")]), "hook: expected 'pre' or 'post'"),
    (_perm([0, "fc1.weight", weight_fusion.act_module_cfg(reshape_func=("fold", {}))]), "expected norm_qk, group_conv"),
]


@pytest.mark.parametrize(("perm", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_dictionaries(perm: Any, said: str) -> None:
    loader = [(x, None) for x in mlp_batches()]
    with pytest.raises(ValueError, match=said):
        weight_fusion.WeightFusion(verbose=False).transform(recorded_networks(), perm, act_loader=loader)


def test_bad_arguments() -> None:
    fusion = weight_fusion.WeightFusion(verbose=False)
    with pytest.raises(ValueError, match="nets: expected two or more, got 1"):
        fusion.transform(recorded_networks()[:1], MLP_PERM)
    with pytest.raises(ValueError, match="act_loader: expected at least one batch"):
        fusion.transform(recorded_networks(), MLP_PERM, act_loader=[])
    with pytest.raises(ValueError, match="transform has not run"):
        _ = weight_fusion.WeightFusion().perm_mats
    for options, said in (({"reduce": 1}, "reduce"), ({"fix_rate": 2}, "fix_rate")):
        with pytest.raises(ValueError, match=said):
            weight_fusion.WeightFusion(**options)
    nets: list[nn.Module] = recorded_networks()
    for call, said in (
        (
            lambda: fusion.transform([net.state_dict() for net in nets], MLP_PERM),
            "nets: expected modules, got OrderedDict",
        ),
        (lambda: fusion.transform(nets, None), "perm: expected .*, got NoneType"),
        (lambda: fusion.transform(nets, MLP_PERM, [{"x": torch.ones(8, 64)}]), "act_loader: .*, got dict"),
        (lambda: fusion.transform(nets, MLP_PERM, [("x", None)]), "act_loader: .*, got tuple of str"),
        (lambda: weight_fusion.WeightFusion(a="0.5"), "a: expected a number, got '0.5'"),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    nets[1].train()
    hooks = [len(m._forward_pre_hooks) for m in nets[1].modules()]
    fusion.transform(nets, MLP_PERM, act_loader=[(x, None) for x in mlp_batches()])
    assert [len(m._forward_pre_hooks) for m in nets[1].modules()] == hooks
    assert nets[1].training
    assert not nets[0].eval().training
