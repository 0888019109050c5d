"""Adapters against the algorithms of their tools, restated in tool_algorithms, and their errors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import tool_algorithms as restated
import torch
from networks import MLP
from torch import Tensor

from mudsc_fast.adapters import experts, rebasin, zipit

# Sums of up to 800 products in float32 against float64, of features of size 1; a covariance is not normalised.
TOLERANCE = {"covariance": 2e-5, "matrices": 1e-7}


def batches_of(models: int, channels: int, seed: int = 0) -> list[list[Tensor]]:
    """Three batches whose models share permuted, noisy features."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(channels, generator=generator) for _ in range(models)]
    result = []
    for samples in (200, 120, 80):
        shared = torch.randn(channels, samples, generator=generator)
        noise = [torch.randn(channels, samples, generator=generator) for _ in range(models)]
        result.append([shared[o] + 0.7 * n + 2 for o, n in zip(orders, noise, strict=True)])
    return result


def metric_of(batches: list[list[Tensor]]) -> dict[str, Tensor]:
    """The metric dictionary as ZipIt's ModelMerge makes it."""
    metric = zipit.get_metric_fns(["covariance"])["covariance"]()
    seen = 0
    for batch in batches:
        metric.update(batch[0].shape[1], *batch)
        seen += batch[0].shape[1]
    return {"covariance": metric.finalize(seen)}


# ---- ZipIt ----


@pytest.mark.parametrize("models", [2, 3])
def test_zipit_covariance(models: int) -> None:
    batches = batches_of(models, 14)
    batches[1][0][3, 5] = float("nan")
    found = metric_of(batches)["covariance"]
    expected = restated.covariance(batches)
    assert np.abs(found.numpy() - expected).max() <= TOLERANCE["covariance"] * np.abs(expected).max()
    metric = zipit.CorrelationMetric()
    for batch in batches:
        metric.update(batch[0].shape[1], 1.0, *batch)
    assert np.abs(metric.finalize().numpy() - restated.correlation(expected)).max() < 1e-5
    assert torch.equal(metric.finalize(), metric.finalize())


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.125), (0.5, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("models", [2, 3])
def test_zipit_zip(models: int, a: float, b: float) -> None:
    metric = metric_of(batches_of(models, 24))
    before = metric["covariance"].clone()
    merge, unmerge = zipit.match_tensors_zipit(metric, 1 - 1 / models, a, b, eps=1e-5)
    expected = restated.zip_greedily(restated.correlation(before.double().numpy()), models, 24, a, b)
    assert np.array_equal(unmerge.numpy(), expected)
    np.testing.assert_allclose(merge.numpy(), (expected / (expected.sum(0) + 1e-5)).T, atol=TOLERANCE["matrices"])
    assert torch.equal(metric["covariance"], before)
    again, _, value = zipit.match_tensors_zipit(metric, r=1 - 1 / models, a=a, b=b, get_merge_value=True, eps=1e-5)
    assert torch.equal(again, merge)
    assert 0 < float(value) < 1


@pytest.mark.parametrize("models", [2, 3])
def test_zipit_permute_and_identity(models: int) -> None:
    metric = metric_of(batches_of(models, 20))
    merge, unmerge, value = zipit.match_tensors_permute(metric, 1 - 1 / models, get_merge_value=True)
    expected = restated.permute(restated.correlation(metric["covariance"].double().numpy()), models)
    assert np.array_equal(unmerge.numpy(), expected)
    np.testing.assert_allclose(merge.numpy(), expected.T / models, atol=TOLERANCE["matrices"])
    assert float(value) > 0.5
    merge, unmerge = zipit.match_tensors_identity(metric, 1 - 1 / models)
    assert torch.equal(unmerge, torch.eye(20).repeat(models, 1))
    assert torch.equal(merge, unmerge.T / models)


def test_zipit_bias_row_and_other_metrics() -> None:
    similarity = torch.from_numpy(restated.correlation(restated.covariance(batches_of(2, 10)))).float()
    similarity = (similarity + similarity.T) / 2
    for key in ("cossim", "correlation"):
        _, unmerge = zipit.match_tensors_zipit({key: similarity}, 0.5, 0.5, 1.0, add_bias=True, anything="else")
        plain = zipit.match_tensors_zipit({key: similarity}, 0.5, 0.5, 1.0)[1]
        assert unmerge.shape == (22, 11)
        for m in range(2):
            own = unmerge[11 * m : 11 * (m + 1)]
            assert torch.equal(own[:10, :10], plain[10 * m : 10 * (m + 1)])
            assert own[10].tolist() == [0.0] * 10 + [1.0]
            assert float(own[:10, 10].sum()) == 0


def test_zipit_merges_weights_as_model_merge_multiplies_them() -> None:
    metric = metric_of(batches_of(2, 16))
    merge, unmerge = zipit.match_tensors_zipit(metric, 0.5, 0.5, 1.0)
    weights = [torch.randn(16, 7), torch.randn(16, 7)]
    # of two equal models with one matching, merge times 2 and the average give the model back
    same = sum(2 * m @ weights[0] for m in zipit.match_tensors_identity(metric, 0.5)[0].chunk(2, 1)) / 2
    torch.testing.assert_close(same, weights[0], rtol=0, atol=0)
    merged = sum(2 * m @ w for m, w in zip(merge.chunk(2, 1), weights, strict=True)) / 2
    counts = unmerge.sum(0)
    expected = (unmerge.T @ torch.cat(weights)) / counts[:, None]
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: zipit.match_tensors_zipit({"covarianse": torch.eye(4)}),
            "metric: expected one of the keys covariance",
        ),
        (lambda: zipit.match_tensors_permute({}), "metric: expected one of the keys"),
        (lambda: zipit.match_tensors_identity({"mean": torch.eye(4)}), "got mean"),
        (lambda: zipit.match_tensors_zipit({"covariance": torch.ones(4, 3)}), "expected a square matrix of 2 models"),
        (lambda: zipit.match_tensors_zipit({"covariance": torch.eye(5)}), "expected a square matrix of 2 models"),
        (lambda: zipit.match_tensors_zipit({"covariance": torch.eye(4)}, 1.0), "r: expected a share"),
        (lambda: zipit.get_metric_fns(["cosine"]), "names: expected covariance, correlation, got 'cosine'"),
        (lambda: zipit.CovarianceMetric().finalize(3), "finalize needs at least one update"),
        (lambda: zipit.CovarianceMetric().update(3, torch.ones(2, 3)), "two or more, got 1"),
    ],
)
def test_zipit_errors(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
    with pytest.raises(TypeError, match="expected a dictionary"):
        zipit.match_tensors_zipit(torch.eye(4))  # type: ignore[arg-type]


# ---- git-re-basin ----


AXES: dict[str, tuple[str | None, ...]] = {
    "conv.weight": ("P_0", None, None, None),
    "bn.weight": ("P_0", None),  # the forks write a second axis that is not there
    "bn.bias": ("P_0",),
    "res.weight": ("P_1", "P_0", None, None),
    "out.weight": ("P_0", "P_1", None, None),
    "head.weight": (None, "P_0"),
    "head.bias": (None,),
}
SHAPES = {
    "conv.weight": (18, 3, 3, 3),
    "bn.weight": (18,),
    "bn.bias": (18,),
    "res.weight": (26, 18, 3, 3),
    "out.weight": (18, 26, 3, 3),
    "head.weight": (5, 18),
    "head.bias": (5,),
}
PS = rebasin.permutation_spec_from_axes_to_perm(AXES)


def params(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("seed", range(4))
def test_rebasin_weight_matching(seed: int) -> None:
    a, b = params(seed), params(seed + 10)
    torch.manual_seed(seed)
    found = rebasin.weight_matching(PS, a, b)
    torch.manual_seed(seed)
    expected = restated.weight_matching(AXES, a, b)
    assert list(found) == list(expected)
    for p, indices in expected.items():
        assert found[p].dtype == torch.int64
        assert np.array_equal(found[p].numpy(), indices), p


def test_rebasin_finds_a_planted_permutation_and_applies_it() -> None:
    a = params(1)
    planted = {"P_0": torch.randperm(18).float(), "P_1": torch.randperm(26)}  # floats as the forks give them
    b = rebasin.apply_permutation(PS, planted, a)
    assert torch.equal(b["conv.weight"], a["conv.weight"].index_select(0, planted["P_0"].int()))
    assert torch.equal(b["out.weight"], a["out.weight"][planted["P_0"].long()][:, planted["P_1"]])
    start = {p: torch.arange(len(x)).float() for p, x in planted.items()}
    found = rebasin.weight_matching(PS, a, b, max_iter=20, init_perm=start, silent=True)
    for name, tensor in rebasin.apply_permutation(PS, found, b).items():
        assert torch.equal(tensor, a[name])
    assert torch.equal(start["P_0"], torch.arange(18).float())
    same = rebasin.weight_matching(torch.Generator().manual_seed(3), PS, a, b)
    assert all(torch.equal(same[p], found[p]) for p in found)
    array = rebasin.weight_matching(
        PS, {k: v.numpy() for k, v in a.items()}, {k: v.numpy() for k, v in b.items()}, rng=3
    )
    assert all(np.array_equal(array[p], found[p].numpy()) for p in found)
    assert isinstance(array["P_0"], np.ndarray)


def test_rebasin_mlp_spec_keeps_a_networks_function() -> None:
    ps = rebasin.mlp_permutation_spec(2)
    assert ps.perm_to_axes["P_0"] == [("layer0.weight", 0), ("layer0.bias", 0), ("layer1.weight", 1)]
    model = MLP(inputs=6, widths=(10, 12), num_outputs=3)
    names = {"fc1": "layer0", "fc2": "layer1", "head": "layer2"}
    state = {names[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in model.state_dict().items()}
    moved = rebasin.apply_permutation(ps, {"P_0": torch.randperm(10), "P_1": torch.randperm(12)}, state)
    back = {v: k for k, v in names.items()}
    x = torch.randn(4, 6)
    before = model(x)
    model.load_state_dict({back[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in moved.items()})
    torch.testing.assert_close(model(x), before)


def test_rebasin_activation_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator)
    order = torch.randperm(12, generator=generator)
    y = x[:, order] * 3 + 0.2 * torch.randn(500, 12, generator=generator) - 7
    found = rebasin.activation_matching(None, {"P": list(x.split(200))}, {"P": list(y.split(200))})  # type: ignore[arg-type]
    both = np.corrcoef(x.double().numpy().T, y.double().numpy().T)[:12, 12:]
    assert np.array_equal(found["P"].numpy(), restated.linear_sum_assignment(both, maximize=True)[1])
    assert torch.equal(order[found["P"]], torch.arange(12))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rebasin.weight_matching(PS, params(0), {}), "no tensor"),
        (
            lambda: rebasin.weight_matching(PS, params(0), {**params(1), "bn.bias": torch.ones(7)}),
            "bn.bias: expected 18",
        ),
        (
            lambda: rebasin.weight_matching(PS, params(0), params(1), init_perm={"P_0": torch.arange(18)}),
            "no permutation 'P_1'",
        ),
        (
            lambda: rebasin.weight_matching(
                PS, params(0), params(1), init_perm={"P_0": torch.zeros(18), "P_1": torch.arange(26)}
            ),
            "expected each of 0..17 once",
        ),
        (lambda: rebasin.apply_permutation(PS, {}, {"bn.running_mean": torch.ones(18)}), "no tensor 'bn.running_mean'"),
        (lambda: rebasin.activation_matching(PS, {}, {}), "no activations of 'P_0'"),
        (lambda: rebasin.mlp_permutation_spec(0), "expected 1 or more"),
    ],
)
def test_rebasin_errors(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(18), "expected each of 0..17 once"),
        (torch.arange(18) + 0.5, "expected each of 0..17 once"),
        (torch.arange(18) + 1, "expected each of 0..17 once"),
        ([2, 1, 0], r"expected each of 0..17 once, got \[2, 1, 0\]"),
        (torch.eye(18), r"got shape \(18, 18\)"),
        (torch.full((18,), float("nan")), "expected each of 0..17 once"),
    ],
)
def test_rebasin_refuses_what_is_no_permutation(wrong: Any, said: str) -> None:
    """Twice the same unit left labels unwritten: an error about them at best, tensors of chance at worst."""
    with pytest.raises(ValueError, match=r"perm\['P_0'\]: .*" + said):
        rebasin.apply_permutation(PS, {"P_0": wrong, "P_1": torch.arange(26)}, params(0))


def test_rebasin_names_what_is_wrong_and_takes_other_names() -> None:
    a, b = params(0), params(1)
    by_name = rebasin.weight_matching(ps=PS, fixed=a, to_permute=b, rng=0)
    expected = rebasin.weight_matching(ps=PS, params_a=a, params_b=b, max_iter=np.int64(100), rng=0)
    assert all(torch.equal(by_name[p], expected[p]) for p in expected)
    assert list(inspect.signature(rebasin.weight_matching).parameters)[:5] == [
        "ps", "params_a", "params_b", "max_iter", "init_perm",
    ]  # fmt: skip
    for call, said in (
        (lambda: rebasin.weight_matching(PS, 3, b), "params_a: expected a mapping"),
        (lambda: rebasin.weight_matching(3, PS, a, list(b)), "params_b: expected a mapping"),
        (lambda: rebasin.weight_matching(ps=a, params_a=a, params_b=b), "ps: expected a PermutationSpec, got dict"),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(ValueError, match="max_iter: expected a number"):
        rebasin.weight_matching(PS, a, b, "many")
    with pytest.raises(ValueError, match=r"params: res\.weight holds NaN"):
        rebasin.weight_matching(PS, a, {**b, "res.weight": b["res.weight"] * float("nan")})
    far = rebasin.permutation_spec_from_axes_to_perm({"bn.bias": (None, "P_0")})
    with pytest.raises(ValueError, match=r"bn\.bias has no axis 1 for 'P_0'"):
        rebasin.apply_permutation(far, {"P_0": torch.arange(18)}, {"bn.bias": torch.ones(18)})


def test_rebasin_takes_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    a, b = ({k: jax.numpy.asarray(v.numpy()) for k, v in params(seed).items()} for seed in (0, 10))
    torch.manual_seed(0)
    expected = rebasin.weight_matching(PS, params(0), params(10))
    torch.manual_seed(0)
    found = rebasin.weight_matching(PS, a, b)
    assert all(isinstance(found[p], jax.Array) and found[p].tolist() == expected[p].tolist() for p in expected)
    rebasin.weight_matching(jax.random.key(0), PS, a, b)
    assert isinstance(rebasin.apply_permutation(PS, found, b)["head.weight"], jax.Array)


# ---- experts ----


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_expert_permutations(gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    ups = torch.randn(5, 24, 8, generator=generator).to(dtype)
    downs = torch.randn(5, 8, 24, generator=generator).to(dtype)
    gates = torch.randn(5, 24, 8, generator=generator).to(dtype) if gated else None
    # Units of equal length: the nearest are then those with the largest product, with the same optimum.
    found = experts.permutations(list(ups), list(downs), None if gates is None else list(gates), reference=2)
    expected = restated.expert_permutations(ups, downs, gates, 2)
    assert np.array_equal(found.numpy(), expected)
    moved = experts.permute(found, ups, downs, gates)
    x = torch.randn(3, 8, generator=generator)
    for e in range(5):

        def run(up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
            hidden = torch.relu(x @ up.float().T) * (1 if gate is None else x @ gate.float().T)
            return hidden @ down.float().T

        before = run(ups[e], downs[e], None if gates is None else gates[e])
        torch.testing.assert_close(run(moved[0][e], moved[1][e], moved[2][e] if gated else None), before)
    assert torch.equal(found[2], torch.arange(24))
    again = experts.permute(found.float(), ups, downs, gates)
    assert all(torch.equal(x, y) for x, y in zip(again, moved, strict=True))


def test_expert_errors() -> None:
    ups, downs = torch.randn(3, 6, 4), torch.randn(3, 4, 6)
    for call, said in (
        (lambda: experts.permutations(ups, downs, reference=3), "reference: expected an expert 0..2"),
        (lambda: experts.permutations(ups, downs.transpose(1, 2)), "one number of experts and hidden units"),
        (lambda: experts.permutations([ups[0], ups[1][:5]], downs[:2]), "ups: expected one shape"),
        (lambda: experts.permutations([], []), "ups: expected a floating matrix"),
        (lambda: experts.permute(torch.zeros(2, 6), ups, downs), "indices: expected shape"),
        (
            lambda: experts.permute(torch.zeros(3, 6).long(), ups, downs),
            "indices: expected each of 0..5 once for expert 0",
        ),
        (lambda: experts.permute(torch.arange(6).repeat(3, 1) + 0.5, ups, downs), "each of 0..5 once"),
        (lambda: experts.permutations([np.ones((6, 4))], [np.ones((4, 6))]), "ups: .* a tensor, got ndarray"),
        (lambda: experts.permutations(ups.int(), downs), "ups: .* got torch.int32"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
