"""The reference ops on their own: against brute force and scipy, at the edges, and in their corrected behaviour."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mudsc_fast import reference as ref

# All float64; the bounds leave room for the order of sums only.
TOLERANCE = {"exact": 1e-12, "correlation": 1e-9}


def symmetric(units: int, seed: int) -> Tensor:
    x = torch.rand(units, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + x.T) / 2


def numpy_correlation(stacked: Tensor) -> Tensor:
    """Correlation of the columns of (samples, units)."""
    return torch.from_numpy(np.corrcoef(stacked.double().numpy().T))


def test_the_reference_imports_nothing_else_of_the_package() -> None:
    for path in Path(ref.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path.name
                assert node.level == 1 or "mudsc_fast" not in (node.module or ""), path.name
            elif isinstance(node, ast.Import):
                assert not any("mudsc_fast" in alias.name for alias in node.names), path.name


# Covariance


def test_covariance_equals_numpy_for_any_split_layout_and_merge() -> None:
    torch.manual_seed(0)
    x = [torch.randn(7, 5, 3, 2, dtype=torch.float64) * 3 + 4 for _ in range(3)]
    flat = torch.cat([t.movedim(1, -1).reshape(-1, 5) for t in x], dim=1)
    expected = numpy_correlation(flat)
    whole = ref.Covariance(5, 3)
    whole.update(x, dim=1)
    left, right = ref.Covariance(5, 3), ref.Covariance(5, 3)
    left.update([t[:1] for t in x], dim=1)
    right.update([t[1:4] for t in x], dim=1)
    right.update([t[4:].transpose(1, 3) for t in x], dim=3)
    left.merge(ref.Covariance.from_state_dict(right.state_dict()))
    for covariance in (whole, left):
        assert covariance.count == 42
        torch.testing.assert_close(covariance.correlation(), expected, rtol=0, atol=TOLERANCE["exact"])
        torch.testing.assert_close(covariance.correlation(), covariance.correlation(), rtol=0, atol=0)
        torch.testing.assert_close(covariance.mean.flatten(), flat.mean(0), rtol=0, atol=TOLERANCE["exact"])
        variance = flat.var(0, unbiased=False)
        torch.testing.assert_close(covariance.variance.flatten(), variance, rtol=0, atol=1e-11)
    cross = ref.Covariance(5, 3, scope="cross")
    cross.update(x, dim=1)
    assert cross.correlation().shape == (2, 5, 5)
    torch.testing.assert_close(cross.correlation()[1], expected[:5, 10:], rtol=0, atol=TOLERANCE["exact"])


def test_covariance_all_reduce_pools_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    parts = [[torch.randn(9, 3, dtype=torch.float64) + 5 for _ in range(2)] for _ in range(2)]
    ranks = [ref.Covariance(3, 2) for _ in parts]
    for covariance, part in zip(ranks, parts, strict=True):
        covariance.update(part)
    states = [covariance.state_dict() for covariance in ranks]

    def gather(gathered: list[Any], state: Any, group: Any = None) -> None:
        gathered[:] = states

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    ranks[1].all_reduce()
    assert ranks[1].count == 18
    expected = numpy_correlation(torch.cat([torch.cat(model) for model in zip(*parts, strict=True)], dim=1))
    torch.testing.assert_close(ranks[1].correlation(), expected, rtol=0, atol=TOLERANCE["exact"])


def test_covariance_one_sample_and_width_one() -> None:
    covariance = ref.Covariance(1, 2)
    covariance.update([torch.ones(1, 1), torch.ones(1, 1)])
    assert torch.equal(covariance.correlation(), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0, 1e5])
def test_corrected_covariance_survives_a_large_mean(ratio: float) -> None:
    torch.manual_seed(1)
    x = [(torch.randn(400, 6) + ratio).float() for _ in range(2)]
    covariance = ref.Covariance(6, 2)
    for part in zip(*(t.split(37) for t in x), strict=True):
        covariance.update(list(part))
    expected = numpy_correlation(torch.cat(x, dim=1))
    torch.testing.assert_close(covariance.correlation(), expected, rtol=0, atol=TOLERANCE["correlation"])


def test_corrected_every_sample_counts_once() -> None:
    torch.manual_seed(2)
    long = [torch.randn(2, 30, 4, dtype=torch.float64) for _ in range(2)]
    short = [torch.randn(20, 1, 4, dtype=torch.float64) + 2 for _ in range(2)]
    covariance = ref.Covariance(4, 2)
    covariance.update(long)
    covariance.update(short)
    rows = [torch.cat([a.reshape(-1, 4), b.reshape(-1, 4)]) for a, b in zip(long, short, strict=True)]
    torch.testing.assert_close(
        covariance.correlation(), numpy_correlation(torch.cat(rows, dim=1)), rtol=0, atol=TOLERANCE["exact"]
    )
    by_image = [torch.cat([a.reshape(-1, 4), b.reshape(-1, 4).repeat(30, 1)]) for a, b in zip(long, short, strict=True)]
    assert (covariance.correlation() - numpy_correlation(torch.cat(by_image, dim=1))).abs().max() > 0.05


def test_corrected_the_guard_is_relative() -> None:
    torch.manual_seed(3)
    x = [torch.randn(200, 4, dtype=torch.float64) * 1e-9 for _ in range(2)]
    x[1][:, 2] = 0.1  # constant, so dead; its sums are not exactly constant
    covariance = ref.Covariance(4, 2)
    for part in zip(*(t.split(7) for t in x), strict=True):
        covariance.update(list(part))
    found = covariance.correlation()
    assert torch.equal(found.diagonal(), torch.ones(8, dtype=torch.float64))
    dead = found[6].clone()
    dead[6] = 0.0
    assert not dead.any()
    alive = [0, 1, 2, 3, 4, 5, 7]
    expected = numpy_correlation(torch.cat(x, dim=1)[:, alive])
    torch.testing.assert_close(found[alive][:, alive], expected, rtol=0, atol=1e-7)


def test_corrected_the_guard_is_relative_for_weights() -> None:
    torch.manual_seed(4)
    weights = [torch.randn(3, 50, dtype=torch.float64) * 1e-8 for _ in range(2)]
    weights[0][1] = 5.0
    found = ref.weight_similarity([weights], scope="full")
    assert torch.equal(found.diagonal(), torch.ones(6, dtype=torch.float64))
    assert float(found[1].sum()) == 1.0
    alive = [0, 2, 3, 4, 5]
    expected = numpy_correlation(torch.cat(weights).T[:, alive])
    torch.testing.assert_close(found[alive][:, alive], expected, rtol=0, atol=TOLERANCE["correlation"])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([torch.zeros(4, 3)], "one tensor a model"),
        ([torch.zeros(4, 2), torch.zeros(4, 3)], r"features\[0\]: expected 3 units"),
        ([torch.zeros(0, 3), torch.zeros(0, 3)], "at least one sample"),
        ([torch.zeros(4, 3), torch.zeros(5, 3)], "as many samples"),
    ],
)
def test_covariance_refuses(features: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref.Covariance(3, 2).update(features)


def test_covariance_refuses_another_kind() -> None:
    with pytest.raises(ValueError, match="other"):
        ref.Covariance(3).merge(ref.Covariance(3, scope="cross"))
    with pytest.raises(ValueError, match="scope"):
        ref.Covariance(3, scope="half")
    with pytest.raises(ValueError, match="models"):
        ref.Covariance(3, models=1)


def test_weight_similarity_refuses_terms_that_do_not_fit() -> None:
    x = torch.randn(4, 5)
    for terms, message in (
        ([], "at least one"),
        ([[x, x[:, :3]]], r"terms\[0\]"),
        ([[x, x], [x]], r"terms\[1\]"),
        ([[ref.Term(x, 0, {0: torch.arange(4)})] * 2], "named twice"),
        ([[ref.Term(x, 0, None, torch.ones(5))] * 2], "bare tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            ref.weight_similarity(terms)
    with pytest.raises(TypeError, match="floating"):
        ref.weight_similarity([[x.int(), x.int()]])
    with pytest.raises(ValueError, match="scope"):
        ref.weight_similarity([[x, x]], scope="half")


def test_covariance_refuses_no_samples_and_integers() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        ref.Covariance(3).correlation()
    with pytest.raises(TypeError, match="floating"):
        ref.Covariance(3).update([torch.zeros(4, 3, dtype=torch.int64)] * 2)


# Weight and dual similarity


def test_terms_are_permuted_regrouped_and_concatenated() -> None:
    torch.manual_seed(5)
    labels = torch.tensor([[0, 1, 2, 2, 1, 0], [0, 0, 1, 3, 3, 2]])  # merged unit 3 has no member in model 0
    scale = 2.0 / torch.bincount(labels.flatten())
    first = [torch.randn(3, 4, 2, 3, dtype=torch.float64) for _ in range(2)]  # units on (1, 3); labels on (2, 0)
    second = [torch.randn(12, dtype=torch.float64) for _ in range(2)]
    terms = [
        [ref.Term(first[m], (1, -1), {(2, 0): labels[m]}, scale) for m in range(2)],
        [ref.Term(second[m], 0) for m in range(2)],
    ]
    rows = []
    for m in range(2):
        for c, w in itertools.product(range(4), range(3)):
            columns = [0.0] * 4
            for a, b in itertools.product(range(2), range(3)):
                j = int(labels[m, a * 3 + b])
                columns[j] += float(first[m][b, c, a, w]) * float(scale[j])
            rows.append([*columns, float(second[m][c * 3 + w])])
    expected = numpy_correlation(torch.tensor(rows, dtype=torch.float64).T)
    full = ref.weight_similarity(terms, scope="full")
    torch.testing.assert_close(full, expected, rtol=0, atol=TOLERANCE["exact"])
    cross = ref.weight_similarity(terms)
    torch.testing.assert_close(cross[0], expected[:12, 12:], rtol=0, atol=TOLERANCE["exact"])
    assert torch.equal(full, full.T)


def test_dual_is_the_blend() -> None:
    torch.manual_seed(6)
    weights = [torch.randn(4, 9) for _ in range(3)]
    covariance = ref.Covariance(4, 3)
    covariance.update([torch.randn(20, 4) for _ in range(3)])
    by_weight, by_activation = ref.weight_similarity([weights], "full"), covariance.correlation()
    found = ref.dual_similarity([weights], covariance, 0.3, "full")
    torch.testing.assert_close(found, 0.3 * by_weight + 0.7 * by_activation, rtol=0, atol=TOLERANCE["exact"])
    assert torch.equal(ref.dual_similarity([], covariance, 0.3, "full"), by_activation)
    assert torch.equal(ref.dual_similarity([weights], covariance, 0.0, "full"), by_activation)
    assert torch.equal(ref.dual_similarity([weights], None, 0.3, "full"), by_weight)
    cross = ref.dual_similarity([weights], covariance, 0.3)
    torch.testing.assert_close(cross[1], found[:4, 8:], rtol=0, atol=TOLERANCE["exact"])
    with pytest.raises(ValueError, match="balance"):
        ref.dual_similarity([weights], covariance, 1.5)
    narrow = ref.Covariance(4, 3, scope="cross")
    narrow.update([torch.randn(20, 4) for _ in range(3)])
    with pytest.raises(ValueError, match="activation"):
        ref.dual_similarity([weights], narrow, 0.3, "full")


def test_corrected_nan_in_weights_raises() -> None:
    weights = [torch.randn(4, 9), torch.randn(4, 9)]
    weights[1][2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ref.weight_similarity([weights])


# Assignment


@pytest.mark.parametrize("n", [1, 2, 5, 33, 64])
@pytest.mark.parametrize("kind", ["random", "integers", "constant"])
def test_assign_is_optimal_and_proves_it(n: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(n)
    s = {
        "random": torch.randn(n, n, generator=generator, dtype=torch.float64),
        "integers": torch.randint(-3, 4, (n, n), generator=generator).double(),
        "constant": torch.full((n, n), -2.5, dtype=torch.float64),
    }[kind].T
    rows, columns = linear_sum_assignment(s.numpy(), maximize=True)
    cold = ref.assign(s)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    for found in (cold, ref.assign(s, cold.duals), ref.assign(s, (noise, noise))):
        assert torch.equal(found.indices.sort().values, torch.arange(n))
        assert float(found.value) == pytest.approx(s.numpy()[rows, columns].mean(), abs=TOLERANCE["exact"])
        u, v = found.duals
        assert float((u[:, None] + v[None, :] - s).min()) >= -TOLERANCE["exact"]
        assert abs(float(found.gap)) <= 1e-11


def test_assign_batches_and_edges() -> None:
    s = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    batched = ref.assign(s)
    single = [ref.assign(m) for m in s]
    assert torch.equal(batched.indices, torch.stack([a.indices for a in single]))
    assert batched.value.shape == batched.gap.shape == (3,)
    assert torch.equal(ref.assign(s, batched.duals).indices, batched.indices)
    assert ref.assign(torch.zeros(0, 0)).indices.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_corrected_nan_in_a_similarity_raises(bad: float) -> None:
    s = torch.zeros(4, 4)
    s[1, 2] = bad
    with pytest.raises(ValueError, match="similarity"):
        ref.assign(s)
    with pytest.raises(ValueError, match="similarity: expected finite entries off the diagonal"):
        ref.zip_units(s)
    s = symmetric(4, 0)
    assert torch.equal(ref.zip_units(s.clone().fill_diagonal_(bad)).labels, ref.zip_units(s).labels)


def brute_blocks(similarities: list[Tensor], blocks: int, kinds: list[str]) -> float:
    """Best total of pair scores over all block permutations, by trying everything."""

    def score(s: Tensor, a: int, b: int, kind: str) -> float:
        n = s.shape[0] // blocks
        pair = s[a * n : (a + 1) * n, b * n : (b + 1) * n]
        choices = [tuple(range(n))] if kind == "fixed" else list(itertools.permutations(range(n)))
        return max(float(pair[range(n), list(p)].mean()) for p in choices)

    def total(p: tuple[int, ...]) -> float:
        return sum(score(s, a, p[a], kind) for s, kind in zip(similarities, kinds, strict=True) for a in range(blocks))

    return max(total(p) for p in itertools.permutations(range(blocks)))


def test_assign_blocks_shares_one_block_match() -> None:
    g = torch.Generator().manual_seed(7)
    similarities = [torch.randn(4 * n, 4 * n, generator=g, dtype=torch.float64) for n in (3, 1, 2)]
    kinds = ["free", "free", "fixed"]
    found = ref.assign_blocks(similarities, 4, kinds)
    total = 0.0
    for s, a, kind in zip(similarities, found, kinds, strict=True):
        n = s.shape[0] // 4
        assert a.block_indices is not None
        assert torch.equal(a.block_indices, found[0].block_indices)
        assert torch.equal(a.indices.reshape(4, n) // n, a.block_indices[:, None].expand(4, n))
        if kind == "fixed":
            assert torch.equal(a.indices.reshape(4, n) % n, torch.arange(n).expand(4, n))
        total += 4 * float(a.value)
    assert total == pytest.approx(brute_blocks(similarities, 4, kinds), abs=TOLERANCE["exact"])
    assert float(ref.assign_blocks(similarities[0], 1).value) == pytest.approx(
        float(ref.assign(similarities[0]).value), abs=TOLERANCE["exact"]
    )
    batched = ref.assign_blocks(torch.stack([similarities[0], similarities[0].T]), 4)
    assert torch.equal(batched.indices[0], ref.assign_blocks(similarities[0], 4).indices)
    with pytest.raises(ValueError, match="blocks"):
        ref.assign_blocks(similarities[0], 5)


# Zip


def plain_zip(s: Tensor, models: int, width: int, attenuation: float) -> list[set[int]]:
    """Groups by complete linkage with attenuation, on sets; no budgets."""
    total = s.shape[0]
    groups = {i: {i} for i in range(total)}
    current = {(i, j): float(s[i, j]) for i in range(total) for j in range(total) if i != j}
    while len(groups) > width:
        pairs = [(i, j) for i in groups for j in groups if i < j]
        best = max(current[p] for p in pairs)
        i, j = next(p for p in pairs if current[p] == best)
        groups[i] |= groups.pop(j)
        for k in groups:
            if k != i:
                value = min(current[i, k], current[j, k]) * attenuation
                current[i, k] = current[k, i] = value
    return [groups[i] for i in sorted(groups)]


@pytest.mark.parametrize(("models", "width"), [(1, 3), (2, 7), (3, 9), (2, 14), (2, 1)])
def test_zip_is_complete_linkage(models: int, width: int) -> None:
    s = symmetric(models * 7, 11)
    s = (s * 20).round() / 20  # with many ties
    found = ref.zip_units(s, models, width, attenuation=0.7, budget=1e9)
    groups = [set((found.labels.flatten() == j).nonzero().flatten().tolist()) for j in range(width)]
    assert groups == plain_zip(s, models, width, 0.7)
    assert found.sizes.tolist() == [len(group) for group in groups]


def test_corrected_budget_zero_merges_nothing_inside_a_model() -> None:
    s = symmetric(12, 0) * 0.1
    s[:6, :6] += 5.0  # units of one model are far more alike than units of two
    s[6:, 6:] += 5.0
    found = ref.zip_units(s, 2, 6, budget=0.0)
    for m in range(2):
        assert found.labels[m].unique().numel() == 6
    inside = ref.zip_units(s, 2, 6, budget=1.0)
    assert inside.labels[0].unique().numel() == 3


def test_corrected_no_feasible_pair_raises() -> None:
    with pytest.raises(ValueError, match=r"width 4 with budget 0\.0"):
        ref.zip_units(symmetric(12, 0), 2, 4, budget=0.0)


@pytest.mark.parametrize("attenuation", [0.0, -0.5])
def test_corrected_attenuation_at_or_below_zero_never_merges_twice(attenuation: float) -> None:
    s = symmetric(16, 5)
    found = ref.zip_units(s, 2, 8, attenuation=attenuation)
    assert found.sizes.tolist() == [2] * 8
    taken = sorted((float(s[a, b]) for a, b in pairs_of(found.labels)), reverse=True)
    assert float(found.value) == pytest.approx(sum(taken) / 8, abs=TOLERANCE["exact"])
    with pytest.raises(ValueError, match="no feasible pair"):
        ref.zip_units(s, 2, 7, attenuation=attenuation)


def pairs_of(labels: Tensor) -> list[tuple[int, int]]:
    flat = labels.flatten()
    members = [(flat == j).nonzero().flatten().tolist() for j in range(int(flat.max()) + 1)]
    return [(m[0], m[1]) for m in members if len(m) == 2]


def test_zip_blocks_keep_to_their_union() -> None:
    s = symmetric(2 * 12, 9)
    given = torch.tensor([[0, 1, 2], [2, 0, 1]])
    found = ref.zip_units(s, 2, 12, blocks=3, block_indices=given)
    for b in range(3):
        assert set((found.labels[0, b * 4 : b * 4 + 4] // 4).tolist()) == {b}
        other = int(given[1, b])
        assert set((found.labels[1, other * 4 : other * 4 + 4] // 4).tolist()) == {b}
    own = ref.zip_units(s, 2, 12, blocks=3)
    match = ref.assign_blocks(s[:12, 12:], 3)
    assert match.block_indices is not None
    pairing = torch.stack([torch.arange(3), match.block_indices])
    turned = torch.tensor([2, 0, 1])
    assert torch.equal(own.labels, ref.zip_units(s, 2, 12, blocks=3, block_indices=pairing[:, turned]).labels)
    assert torch.equal(own.labels, ref.zip_units(s, 2, 12, blocks=3, block_indices=pairing).labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 11, "blocks": 3}, "width: expected a multiple of 3"),
        ({"width": 0}, "width"),
        ({"width": 25}, "width"),
        ({"models": 5}, "models"),
        ({"blocks": 5}, "blocks"),
        ({"budget": -1.0}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"attenuation": float("nan")}, "attenuation"),
        ({"blocks": 3, "block_indices": torch.tensor([[0, 1, 2], [0, 0, 1]])}, "block_indices"),
        ({"similarity": torch.zeros(24, 23)}, "square"),
    ],
)
def test_zip_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref.zip_units(**{"similarity": symmetric(24, 0), **changes})


# Regroup


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_regroup_is_the_indicator_product(dim: int) -> None:
    torch.manual_seed(8)
    x = torch.randn(4, 4, 4).transpose(0, 2)
    labels, scale = torch.tensor([2, 0, 2, 4]), torch.rand(5)
    unmerge = torch.zeros(4, 5, dtype=torch.float64)
    unmerge[torch.arange(4), labels] = 1.0
    expected = (x.double().movedim(dim, -1) @ (unmerge * scale)).movedim(-1, dim)
    found = ref.regroup(x, labels, dim, 5, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE["exact"])
    out = torch.empty_like(found)
    assert ref.regroup(x, labels, dim, 5, scale, out=out) is out
    assert torch.equal(out, found)


def test_regroup_integers_and_refusals() -> None:
    x = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    assert torch.equal(ref.regroup(x, torch.tensor([1, 0, 1]), 0, 2), torch.tensor([[2, 3], [4, 6]], dtype=torch.int32))
    assert ref.regroup(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 0, 0).shape == (0, 2)
    assert ref.regroup(x, torch.tensor([1, 0, 1], dtype=torch.int16), 0, 2).tolist() == [[2, 3], [4, 6]]
    with pytest.raises(TypeError, match="scale"):
        ref.regroup(x, torch.tensor([1, 0, 1]), 0, 2, torch.ones(2))
    with pytest.raises(TypeError, match="real"):
        ref.regroup(torch.zeros(2, dtype=torch.complex64), torch.tensor([0, 1]), 0, 2)
    with pytest.raises(ValueError, match="labels"):
        ref.regroup(x, torch.tensor([1, 0]), 0, 2)
    with pytest.raises(ValueError, match="labels"):
        ref.regroup(x, torch.tensor([1, 0, 2]), 0, 2)
