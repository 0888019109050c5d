"""The reference pipeline: the law, rule 9 with dense matrices, rule 8 step by step, and its corrected behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_models import (
    CHANNELS,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV,
    ConvNet,
    FusedAttention,
    GroupedAttention,
    conv_spec,
    fused_spec,
    grouped_spec,
    odd_spec,
    odd_tensors,
)
from torch import Tensor, nn

from mudsc_fast import reference as ref
from mudsc_fast.reference.weights import row_matrices
from mudsc_fast.spec import PermutationSpec

# Everything runs in float64 and differs by the order of sums alone.
TOLERANCE = {"exact": 1e-12, "function": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(shape: tuple[int, ...] = (16, 7, CHANNELS), count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def labels_from(permutation: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels of (model, model permuted by it): its unit i is the model's unit permutation[i]."""
    return {name: torch.stack([torch.arange(len(p)), p]) for name, p in permutation.items()}


SYSTEMS: dict[str, Any] = {
    "fused": (fused_spec(), lambda seed: FusedAttention(seed).state_dict()),
    "grouped": (grouped_spec(), lambda seed: GroupedAttention(seed).state_dict()),
    "fixed": (grouped_spec("fixed"), lambda seed: GroupedAttention(seed).state_dict()),
    "conv": (conv_spec(), lambda seed: ConvNet(seed).state_dict()),
    "odd": (odd_spec(), odd_tensors),
}

systems = pytest.mark.parametrize("system", list(SYSTEMS))


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@systems
def test_alignment_undoes_any_permutation(system: str) -> None:
    spec, make = SYSTEMS[system]
    state = make(0)
    for seed in range(3):
        permutation = spec.random_permutation(seed)
        permuted = spec.permute(state, permutation)
        plan = ref.MergePlan(spec, labels_from(permutation), "align")
        same(plan.align(permuted), dict(state))
        same(plan.align(state, model=0), dict(state))
        same(plan.merge([state, permuted]), dict(state))


@systems
def test_similarity_of_a_permuted_model_is_one(system: str) -> None:
    """Rows of a model and of its permuted self are equal once all neighbours are in merged coordinates."""
    spec, make = SYSTEMS[system]
    state = make(1)
    permutation = spec.random_permutation(5)
    labels = labels_from(permutation)
    permuted = spec.permute(state, permutation)
    for space in spec.spaces:
        for axis in space.axes:
            tensors = [state[axis.tensor], permuted[axis.tensor]]
            first, second = row_matrices(spec, space, axis, tensors, labels)
            torch.testing.assert_close(second, first[permutation[space.name]], rtol=0, atol=TOLERANCE["exact"])


MATCHED: dict[str, Any] = {
    "fused": (fused_spec(), FusedAttention, (16, 7, CHANNELS)),
    "grouped": (grouped_spec(), GroupedAttention, (16, 7, CHANNELS)),
    "conv": (conv_spec(), ConvNet, (16, 2, 5, 5)),
}


# At the tap of o, query heads and value dimensions are each other's samples, and samples are paired by position: only
# weights tell that a permuted GroupedAttention is the same.
FOUND = [(s, m, b) for s in MATCHED for m in ("align", "zip") for b in (0.0, 0.5, 1.0) if s != "grouped" or b == 1.0]


@pytest.mark.parametrize(("system", "method", "balance"), FOUND)
def test_a_permuted_model_is_found_again(system: str, method: str, balance: float) -> None:
    spec, make, shape = MATCHED[system]
    model = make(2)
    permutation = spec.random_permutation(3)
    other = make(2)
    other.load_state_dict(spec.permute(model.state_dict(), permutation))
    stats = ref.calibrate([model, other], batches(shape), spec)
    states = [model.state_dict(), other.state_dict()]
    plan = ref.match(states, spec, stats, method, balance)
    for space in spec.spaces:
        assert torch.equal(plan.labels[space.name], labels_from(permutation)[space.name]), space.name
        assert plan.values[space.name] == pytest.approx(1.0, abs=TOLERANCE["exact"])
    assert (plan.history == []) == (balance == 0.0)
    same(plan.merge(states), states[0])


def random_labels(spec: PermutationSpec, models: int, seed: int) -> dict[str, Tensor]:
    """Zip labels that keep blocks and ties: blocks permuted, units inside at random, every merged unit used."""
    g = torch.Generator().manual_seed(seed)
    of_tie: dict[Any, Tensor] = {}
    result = {}
    for space in spec.spaces:
        n = space.width // space.blocks
        blocks = torch.stack([torch.randperm(space.blocks, generator=g) for _ in range(models)])
        blocks = blocks if space.tie is None else of_tie.setdefault(space.tie, blocks)
        inner = torch.randint(n, (models, space.blocks, n), generator=g)
        inner[0] = torch.arange(n)
        if space.within == "fixed":
            inner[:] = torch.arange(n)
        result[space.name] = (blocks[:, :, None] * n + inner).reshape(models, -1)
    return result


def test_merge_is_the_matrix_formula() -> None:
    """W* = 1/N sum_m (N M_m)^T W_m U_m, with dense U and M."""
    spec, models = conv_spec(), 3
    states = [ConvNet(m).state_dict() for m in range(models)]
    labels = random_labels(spec, models, 1)
    u = {name: nn.functional.one_hot(found).double() for name, found in labels.items()}
    m = {name: models * x / x.sum((0, 1)) for name, x in u.items()}
    merged = ref.MergePlan(spec, labels, "zip").merge(states)

    def mean(equation: str, name: str, *matrices: Tensor) -> Tensor:
        return sum(torch.einsum(equation, s[name], *(x[k] for x in matrices)) for k, s in enumerate(states)) / models

    s, i = "stream", "inner"
    expected = {
        "conv.weight": mean("oihw,op->pihw", "conv.weight", m[s]),
        "conv.bias": mean("o,op->p", "conv.bias", m[s]),
        "block.conv1.weight": mean("oihw,op,iq->pqhw", "block.conv1.weight", m[i], u[s]),
        "block.conv2.weight": mean("oihw,op,iq->pqhw", "block.conv2.weight", m[s], u[i]),
        "block.bn1.running_var": mean("o,op->p", "block.bn1.running_var", m[i]),
        "head.weight": mean("oi,iq->oq", "head.weight", u[s]),
        "head.bias": mean("o->o", "head.bias"),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=TOLERANCE["exact"])


def test_weights_are_per_member_and_per_model() -> None:
    spec = conv_spec()
    states = [ConvNet(m).state_dict() for m in range(3)]
    states[0]["block.bn1.num_batches_tracked"] += 7
    labels = random_labels(spec, 3, 2)
    w = [0.2, 0.0, 1.8]
    merged = ref.MergePlan(spec, labels, "zip").merge(states, weights=w)
    stream = labels["stream"]
    for j in range(6):
        members = [(k, i) for k in range(3) for i in range(6) if int(stream[k, i]) == j]
        mean = sum(w[k] * states[k]["conv.weight"][i] for k, i in members) / sum(w[k] for k, _ in members)
        torch.testing.assert_close(merged["conv.weight"][j], mean, rtol=0, atol=TOLERANCE["exact"])
        column = sum(w[k] * states[k]["head.weight"][:, i] for k, i in members) / sum(w)
        torch.testing.assert_close(merged["head.weight"][:, j], column, rtol=0, atol=TOLERANCE["exact"])
    mean = sum(w[k] * states[k]["head.bias"] for k in range(3)) / sum(w)
    torch.testing.assert_close(merged["head.bias"], mean, rtol=0, atol=TOLERANCE["exact"])
    assert int(merged["block.bn1.num_batches_tracked"]) == 7
    for bad in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="weights"):
            ref.MergePlan(spec, labels, "zip").merge(states, weights=bad)


def test_weight_rows_use_mean_for_in_and_sum_for_out() -> None:
    spec, models = conv_spec(), 3
    states = [ConvNet(m).state_dict() for m in range(models)]
    labels = random_labels(spec, models, 3)
    stream, inner = spec.spaces
    u = {name: nn.functional.one_hot(found).double() for name, found in labels.items()}
    m = {name: models * x / x.sum((0, 1)) for name, x in u.items()}
    tensors = [s["block.conv1.weight"] for s in states]  # (inner "out", stream "in", 3, 3)
    rows = row_matrices(spec, inner, inner.axes[0], tensors, labels)
    columns = row_matrices(spec, stream, stream.axes[2], tensors, labels)
    raw = row_matrices(spec, inner, inner.axes[0], tensors, {"inner": labels["inner"]})
    for k, x in enumerate(tensors):
        expected = torch.einsum("oihw,iq->oqhw", x, m["stream"][k]).flatten(1)
        torch.testing.assert_close(rows[k], expected, rtol=0, atol=TOLERANCE["exact"])
        expected = torch.einsum("oihw,op->iphw", x, u["inner"][k]).flatten(1)
        torch.testing.assert_close(columns[k].sort().values, expected.sort().values, rtol=0, atol=TOLERANCE["exact"])
        torch.testing.assert_close(raw[k], x.flatten(1), rtol=0, atol=0)


def test_weight_rows_of_a_space_on_both_axes() -> None:
    spec, labels = odd_spec(), random_labels(odd_spec(), 2, 4)
    tensors = [odd_tensors(k)["square"] for k in range(2)]
    space = spec.spaces[0]
    n_j = torch.bincount(labels["a"].flatten()).double()
    for k, found in enumerate(row_matrices(spec, space, space.axes[1], tensors, labels)):
        u = nn.functional.one_hot(labels["a"][k], 4).double()
        expected = torch.einsum("oik,iq->oqk", tensors[k], u * (2 / n_j)).flatten(1)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE["exact"])


def test_weight_rows_on_an_axis_shared_by_a_tie() -> None:
    """The value space's rows of o: the query heads of each block are regrouped inside the block."""
    spec, models = grouped_spec(), 2
    labels = random_labels(spec, models, 6)
    tensors = [GroupedAttention(k).state_dict()["o.weight"] for k in range(models)]
    values, queries = spec.spaces[1], labels["queries"]
    n_j = torch.bincount(queries.flatten(), minlength=KV * GROUP)
    for k, found in enumerate(row_matrices(spec, values, values.axes[2], tensors, labels)):
        expected = torch.zeros(KV * HEAD_DIM, GROUP, CHANNELS, dtype=torch.float64)
        x = tensors[k].reshape(CHANNELS, KV, GROUP, HEAD_DIM)
        for b in range(KV):
            for q in range(GROUP):
                j = int(queries[k, b * GROUP + q])
                for d in range(HEAD_DIM):
                    expected[b * HEAD_DIM + d, j % GROUP] += x[:, b, q, d] * models / n_j[j]
        torch.testing.assert_close(found, expected.flatten(1), rtol=0, atol=TOLERANCE["exact"])


# Rule 8


def test_sweeps_step_by_step() -> None:
    spec, states = conv_spec(), [ConvNet(m).state_dict() for m in range(2)]
    plan = ref.match(states, spec, None, "align", balance=1.0, seed=4, patience=3)
    g = torch.Generator().manual_seed(4)
    labels: dict[str, Tensor] = {}
    values: dict[str, float] = {}
    best, best_labels, strikes, history = -1.0, labels, 0, []
    while strikes < 3:
        for k in torch.randperm(2, generator=g).tolist():
            space = spec.spaces[k]
            terms = [
                row_matrices(spec, space, axis, [s[axis.tensor] for s in states], labels)
                for axis in space.axes
                if axis.compare
            ]
            found = ref.assign(ref.weight_similarity(terms)[0])
            labels[space.name] = torch.stack([torch.arange(space.width), found.indices.argsort()])
            values[space.name] = float(found.value)
        history.append((values["stream"] + values["inner"]) / 2)
        if history[-1] > best:
            best, best_labels, strikes = history[-1], dict(labels), 0
        else:
            labels, strikes = dict(best_labels), strikes + 1
    assert plan.history == pytest.approx(history, abs=TOLERANCE["exact"])
    assert all(torch.equal(plan.labels[name], best_labels[name]) for name in best_labels)
    short = ref.match(states, spec, None, "align", balance=1.0, seed=4, max_sweeps=1)
    assert short.history == pytest.approx(history[:1], abs=TOLERANCE["exact"])


def test_balance_zero_reads_no_weights_and_keeps_untapped_spaces() -> None:
    models = [GroupedAttention(m) for m in range(2)]
    spec = grouped_spec()
    stats = ref.calibrate(models, batches(), spec)
    cut = {name: stats[name] for name in ("qk", "v")}
    plan = ref.match(None, spec, cut, "align", balance=0.0)
    assert plan.history == []
    heads = plan.labels["queries"].reshape(2, KV, GROUP)
    assert torch.equal(heads % GROUP, torch.arange(GROUP).expand(2, KV, GROUP))
    assert torch.equal(heads[:, :, 0] // GROUP, plan.labels["v"].reshape(2, KV, HEAD_DIM)[:, :, 0] // HEAD_DIM)
    for options, message in (
        ({"balance": 0.0}, "activations"),
        ({"balance": 0.5}, "state_dicts"),
        ({"activations": cut, "balance": 0.0, "method": "glue"}, "method"),
    ):
        with pytest.raises(ValueError, match=message):
            ref.match(None, spec, **options)


def test_fixed_spaces_are_aligned_in_a_zip_plan() -> None:
    models = [GroupedAttention(m) for m in range(2)]
    spec = grouped_spec("fixed")
    stats = ref.calibrate(models, batches(), spec)
    plan = ref.match([m.state_dict() for m in models], spec, stats, "zip", width={"v": 4, "queries": 4})
    inner = plan.labels["qk"].reshape(2, KV, HEAD_DIM) % HEAD_DIM
    assert torch.equal(inner, torch.arange(HEAD_DIM).expand(2, KV, HEAD_DIM))
    merged = plan.merge([m.state_dict() for m in models])
    assert merged["o.weight"].shape == (CHANNELS, KV * 2 * 2)
    assert merged["q.weight"].shape == (KV * 2 * HEAD_DIM, CHANNELS)
    assert merged["v.bias"].shape == (KV * 2,)


def test_zip_to_another_width_lays_fused_axes_out_anew() -> None:
    models = [FusedAttention(m) for m in range(2)]
    spec = fused_spec()
    stats = ref.calibrate(models, batches(), spec)
    states = [m.state_dict() for m in models]
    plan = ref.match(states, spec, stats, "zip", balance=0.0, width=2 / 3)
    assert {name: int(found.max()) + 1 for name, found in plan.labels.items()} == {"qk": 8, "v": 8}
    only = ref.match(states, spec, stats, "zip", balance=0.0, width={"v": 16})
    merged = only.merge(states)
    assert merged["qkv.weight"].shape == (12 + 12 + 16, CHANNELS)
    assert merged["proj.weight"].shape == (CHANNELS, 16)
    found = only.labels["v"]
    for j in range(16):
        members = [(k, i) for k in range(2) for i in range(12) if int(found[k, i]) == j]
        mean = sum(states[k]["qkv.bias"][24 + i] for k, i in members) / len(members)
        assert float(merged["qkv.bias"][24 + j]) == pytest.approx(float(mean), abs=TOLERANCE["exact"])


def test_flattened_dims_can_shrink_unless_a_pick_shares_them() -> None:
    spec, states = odd_spec(), [odd_tensors(k) for k in range(2)]
    labels = random_labels(spec, 2, 8)
    experts = labels["experts"].reshape(2, 2, 3)
    labels["experts"] = (experts // 3 * 2 + experts % 3 % 2).reshape(2, 6)
    down = {name: spec[name] for name in ("a", "b", "still")}
    only_down = PermutationSpec((*down.values(), replace(spec["experts"], axes=spec["experts"].axes[2:])))
    merged = ref.MergePlan(only_down, labels, "zip").merge(states)["down"]
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for k in range(2):
        expected.index_add_(0, labels["experts"][k], states[k]["down"].flatten(0, 1) / 2)
    torch.testing.assert_close(merged, expected.reshape(2, 2, 5), rtol=0, atol=TOLERANCE["exact"])
    with pytest.raises(ValueError, match="cannot change their width"):
        ref.MergePlan(spec, labels, "zip").merge(states)


# Corrected


def relative_change(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def test_corrected_tied_heads_keep_the_function() -> None:
    models = [FusedAttention(m) for m in (10, 11)]
    x = batches()[0]
    changes = {}
    for tied in (True, False):
        spec = fused_spec(tied)
        stats = ref.calibrate(models, batches(), spec)
        plan = ref.match([m.state_dict() for m in models], spec, stats)
        aligned = FusedAttention(0)
        aligned.load_state_dict(plan.align(models[1].state_dict()))
        with torch.no_grad():
            changes[tied] = relative_change(models[1](x), aligned(x))
        heads = [plan.labels[name].reshape(2, HEADS, HEAD_DIM)[:, :, 0] // HEAD_DIM for name in ("qk", "v")]
        assert torch.equal(*heads) == tied
    assert changes[True] <= TOLERANCE["function"]
    assert changes[False] > 0.1


def test_an_untied_spec_matches_each_space_on_its_own() -> None:
    models = [FusedAttention(m) for m in (10, 11)]
    spec = fused_spec(tied=False)
    stats = ref.calibrate(models, batches(), spec, scope="cross")
    plan = ref.match(None, spec, stats, balance=0.0)
    for space in spec.spaces:
        found = ref.assign_blocks(stats[space.name].correlation()[0], HEADS)
        assert torch.equal(plan.labels[space.name][1], found.indices.argsort())
        assert plan.values[space.name] == pytest.approx(float(found.value), abs=TOLERANCE["exact"])


def test_corrected_activations_of_the_query_count() -> None:
    models = [FusedAttention(m) for m in range(2)]
    data = batches()
    both, key = (ref.calibrate(models, data, fused_spec(both_taps=b))["qk"] for b in (True, False))
    rows = []
    for model in models:
        seen = torch.cat([model.qkv(x).reshape(-1, 3, HEADS * HEAD_DIM) for x in data]).detach()
        rows.append(torch.cat([seen[:, 0], seen[:, 1]]))
    expected = torch.corrcoef(torch.cat(rows, dim=1).T)
    torch.testing.assert_close(both.correlation(), expected, rtol=0, atol=TOLERANCE["exact"])
    with torch.no_grad():
        models[1].qkv.weight[: HEADS * HEAD_DIM] *= -1.0
    both_after, key_after = (ref.calibrate(models, data, fused_spec(both_taps=b))["qk"] for b in (True, False))
    assert torch.equal(key.correlation(), key_after.correlation())
    assert (both.correlation() - both_after.correlation()).abs().max() > 0.1


@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("copies", [2, 3])
def test_corrected_merging_a_model_with_itself_changes_nothing(method: str, copies: int) -> None:
    model = ConvNet(3).float()
    data = [x.float() for x in batches((16, 2, 5, 5))]
    stats = ref.calibrate([model] * copies, data, conv_spec())
    states = [model.state_dict()] * copies
    # At attenuation 1 a third copy is still as close as the second.
    merged = ref.match(states, conv_spec(), stats, method, attenuation=1.0).merge(states)
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged[name], tensor), name
        assert merged[name].dtype == tensor.dtype


def test_corrected_an_impossible_budget_names_space_budget_and_width() -> None:
    models = [ConvNet(m) for m in range(2)]
    stats = ref.calibrate(models, batches((16, 2, 5, 5)), conv_spec())
    states = [m.state_dict() for m in models]
    with pytest.raises(ValueError, match=r"space 'inner'.*width 4 with budget 0\.0"):
        ref.match(states, conv_spec(), stats, "zip", width={"inner": 4}, budget=0.0)


def test_corrected_nan_in_weights_names_the_space() -> None:
    states = [ConvNet(m).state_dict() for m in range(2)]
    states[1]["block.conv2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"space '.*NaN"):
        ref.match(states, conv_spec(), None, balance=1.0)


def plain(value: Any) -> Any:
    """A spec as bare attributes, so that nothing checks it when it is made."""
    if isinstance(value, tuple) and value and hasattr(value[0], "__dict__"):
        return tuple(plain(item) for item in value)
    if hasattr(value, "__dict__") and not isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{k: plain(v) for k, v in vars(value).items() if not k.startswith("_")})
    return value


def test_corrected_a_doubled_axis_is_refused() -> None:
    spec = plain(conv_spec())
    state = ConvNet(0).state_dict()
    labels = labels_from(conv_spec().random_permutation(0))
    ref.MergePlan(spec, labels, "align").align(state)
    spec.spaces[0].axes += (spec.spaces[0].axes[1],)
    with pytest.raises(ValueError, match=r"conv\.bias.*covered twice"):
        ref.MergePlan(spec, labels, "align").align(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": (2, 4)}, "does not factor"),
        ({"dim": 3}, "names dim 3"),
        ({"role": "in"}, "role"),
        ({"view": (2, 3), "at": 0}, "expected 6 units"),
    ],
)
def test_axes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    spec = plain(conv_spec())
    spec.spaces[0].axes += (SimpleNamespace(**{**vars(spec.spaces[0].axes[1]), **change}),)
    with pytest.raises(ValueError, match=message):
        ref.MergePlan(spec, random_labels(conv_spec(), 2, 0), "align").merge([ConvNet(0).state_dict()] * 2)


def test_labels_that_break_blocks_or_ties_are_refused() -> None:
    spec, state = grouped_spec(), GroupedAttention(0).state_dict()
    good = labels_from(spec.random_permutation(0))
    torn = {**good, "v": torch.stack([torch.arange(6), torch.tensor([0, 1, 3, 2, 4, 5])])}
    with pytest.raises(ValueError, match="different blocks"):
        ref.MergePlan(spec, torn, "align").align(state)
    swapped = {**good, "v": (good["v"] + HEAD_DIM * torch.tensor([[0], [1]])) % (KV * HEAD_DIM)}
    with pytest.raises(ValueError, match="unlike the others of its tie"):
        ref.MergePlan(spec, swapped, "align").align(state)
    with pytest.raises(ValueError, match="align"):
        ref.MergePlan(spec, good, "zip").align(state)


# Calibration, batch norm, everything in one call


def test_calibrate_takes_many_kinds_of_batches_and_leaves_no_trace() -> None:
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = ConvNet(seed)

        def forward(self, pixels: Tensor, mask: None = None) -> dict[str, Tensor]:
            return {"logits": self.net(x=pixels)}

    spec = conv_spec()
    models = [ConvNet(m).train() for m in range(2)]
    data = batches((4, 2, 5, 5))
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    plain_stats = ref.calibrate(models, data, spec)
    again = ref.calibrate(models, [(x, "label") for x in data], spec)
    assert models[0].training
    same(models[0].state_dict(), before)
    wrapped = [Wrapped(m) for m in range(2)]
    named = plain(spec)
    for space in named.spaces:
        for tap in space.taps:
            tap.module = f"net.{tap.module}"
    keyword = ref.calibrate(wrapped, [{"pixels": x, "mask": None} for x in data], named)
    for name in plain_stats:
        assert plain_stats[name].count == 3 * 4 * 25
        assert torch.equal(plain_stats[name].correlation(), again[name].correlation())
        assert torch.equal(plain_stats[name].correlation(), keyword[name].correlation())
    with pytest.raises(ValueError, match="batches"):
        ref.calibrate(models, [], spec)


def test_reset_batchnorm_averages_over_batches() -> None:
    model, data = ConvNet(0), batches((8, 2, 5, 5))
    model.block.bn2.momentum = 0.3
    assert ref.reset_batchnorm(model, data) == 2
    assert not model.block.bn1.training
    assert model.block.bn2.momentum == 0.3
    seen = [model.block.conv1(model.conv(x)) for x in data]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.block.bn1.running_mean, mean, rtol=0, atol=TOLERANCE["exact"])
    torch.testing.assert_close(model.block.bn1.running_var, variance, rtol=0, atol=TOLERANCE["exact"])
    assert ref.reset_batchnorm(nn.Linear(2, 2), data) == 0


def test_merge_models_is_the_pipeline() -> None:
    models, data, spec = [ConvNet(m) for m in range(2)], batches((8, 2, 5, 5)), conv_spec()
    states = [m.state_dict() for m in models]
    found = ref.merge_models(models, iter(data), spec, method="zip", seed=1)
    expected = ConvNet(5)
    expected.load_state_dict(ref.match(states, spec, ref.calibrate(models, data, spec), "zip", seed=1).merge(states))
    ref.reset_batchnorm(expected, data)
    same(found, expected.state_dict())
    weights_only = ref.merge_models(models, None, spec, method="align", balance=1.0)
    same(weights_only, ref.match(states, spec, None, "align", 1.0).merge(states))
    narrow = ref.merge_models(models, data, spec, width=0.5)
    assert narrow["conv.weight"].shape[0] == 3
    with pytest.raises(ValueError, match="spec"):
        ref.merge_models(models, data)
