"""Index arithmetic of the spec algebra, held against loops over single positions.

Tolerances: permutations are exact; the law of the toy model is float64, 1e-10; a zip's sums in float64, 1e-12.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.axes import Columns, axis_labels, columns, rows, split_blocks, take
from mudsc_fast.reference.weights import row_matrices
from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec

D, KV, GROUP, HD, EXPERTS, HIDDEN = 12, 3, 2, 4, 3, 5


class GroupedQuery(nn.Module):
    """Attention whose query heads share keys and values in groups, then fused SwiGLU experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, D)
        self.q, self.k, self.v = nn.Linear(D, KV * GROUP * HD), nn.Linear(D, KV * HD), nn.Linear(D, KV * HD)
        self.o = nn.Linear(KV * GROUP * HD, D)
        self.norm = nn.LayerNorm(D)
        self.router = nn.Linear(D, EXPERTS)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, D))
        self.down = nn.Parameter(torch.randn(EXPERTS, D, HIDDEN))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, KV, GROUP, HD)
        k, v = self.k(x).view(b, t, KV, HD), self.v(x).view(b, t, KV, HD)
        weights = torch.einsum("bqngd,bknd->bngqk", q, k).softmax(-1)
        y = torch.einsum("bngqk,bknd->bqngd", weights, v).reshape(b, t, -1)
        x = self.norm(x + self.o(y))
        gate, up = torch.einsum("btd,ehd->bteh", x, self.gate_up).chunk(2, -1)
        y = torch.einsum("bteh,edh->bted", nn.functional.silu(gate) * up, self.down)
        return self.head(x + (y * self.router(x).softmax(-1)[..., None]).sum(-2))


def both(name: str, **view: object) -> list[Axis]:
    return [Axis(f"{name}.{part}", 0, "out", **view) for part in ("weight", "bias")]


def grouped_query_spec(within: str = "free", tie: str | None = "heads") -> PermutationSpec:
    four, two = (KV, GROUP, HD), (KV, HD)
    return PermutationSpec(
        (
            Space(
                "residual",
                D,
                (
                    *both("embed"),
                    *both("norm"),
                    *both("o"),
                    *(Axis(f"{n}.weight", 1, "in") for n in ("q", "k", "v", "router", "head")),
                    Axis("gate_up", 2, "in"),
                    Axis("down", 1, "out"),
                ),
                (Tap("head", "input", -1),),
            ),
            Space(
                "qk",
                KV * HD,
                (*both("q", view=four, at=(0, 2)), *both("k", view=two, at=(0, 1))),
                (Tap("q", "output", -1, four, (0, 2)), Tap("k", "output", -1)),
                blocks=KV,
                within=within,
                tie=tie,
            ),
            Space(
                "query",
                KV * GROUP,
                (*both("q", view=four, at=(0, 1)), Axis("o.weight", 1, "in", four, (0, 1))),
                blocks=KV,
                tie=tie,
            ),
            Space("value", KV * HD, (*both("v"), Axis("o.weight", 1, "in", four, (0, 2))), blocks=KV, tie=tie),
            Space("experts", EXPERTS, both("router"), blocks=EXPERTS, tie="experts"),
            Space(
                "hidden",
                EXPERTS * HIDDEN,
                (
                    Axis("gate_up", (0, 1), "out", (EXPERTS, 2, HIDDEN), (0, 2)),
                    Axis("down", (0, 2), "in", (EXPERTS, HIDDEN), (0, 1)),
                ),
                blocks=EXPERTS,
                tie="experts",
            ),
        )
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return GroupedQuery().double()


INPUT = torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("within", ["free", "fixed"])
def test_law_of_grouped_query_attention_and_fused_experts(model: nn.Module, within: str) -> None:
    changes = grouped_query_spec(within).verify_each(model, INPUT, seed=3)
    assert set(changes) == {
        "residual", "qk", "query", "value", "experts", "hidden", "tie heads", "tie experts", "all",
    }  # fmt: skip
    assert max(changes.values()) < 1e-10


def test_untied_blocks_on_one_axis_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"o.weight dim 1: a factor is covered twice, by space 'query' and by space 'value'"
    ):
        grouped_query_spec(tie=None)


def test_permutation_moves_single_positions_as_told(model: nn.Module) -> None:
    spec = grouped_query_spec()
    p = spec.random_permutation(5)
    before, after = model.state_dict(), spec.permute(model.state_dict(), p)
    for b, g, d, i in itertools.product(range(KV), range(GROUP), range(HD), range(D)):
        query, value = int(p["query"][b * GROUP + g]), int(p["value"][b * HD + d])
        assert query // GROUP == value // HD
        old = (query // GROUP * GROUP + query % GROUP) * HD + value % HD
        new = (b * GROUP + g) * HD + d
        assert after["o.weight"][i, new] == before["o.weight"][int(p["residual"][i]), old]
    for e, h, i in itertools.product(range(EXPERTS), range(HIDDEN), range(D)):
        expert, unit = divmod(int(p["hidden"][e * HIDDEN + h]), HIDDEN)
        assert after["down"][e, i, h] == before["down"][expert, int(p["residual"][i]), unit]
        assert after["gate_up"][e, HIDDEN + h, i] == before["gate_up"][expert, HIDDEN + unit, int(p["residual"][i])]


def matrix(c: Columns) -> Tensor:
    """Rows and regrouped columns as a plain matrix: (units, columns), columns in an order that labels decide alone."""
    tensor, names = c.tensor, list(range(c.tensor.dim()))
    for dims, labels in c.labels.items():
        size, scale = c.sizes[dims], c.scale.get(dims)
        at = [names.index(d) for d in dims]
        moved = tensor.movedim(at, list(range(len(at)))).flatten(0, len(at) - 1)
        wide = torch.zeros(size, *moved.shape[1:], dtype=moved.dtype).index_add_(0, labels, moved)
        if scale is not None:
            wide = wide * scale.reshape(-1, *[1] * (wide.dim() - 1))
        names = [dims[0], *(n for n in names if n not in dims)]
        tensor = wide
    tensor = tensor.movedim([names.index(r) for r in c.rows], list(range(len(c.rows))))
    return tensor.reshape(tensor.shape[: len(c.rows)].numel(), -1)


def labels_of(spec: PermutationSpec, permutation: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = {}
    for space in spec:
        both_models = torch.arange(space.width).repeat(2, 1)
        both_models[1, permutation[space.name]] = torch.arange(space.width)
        labels[space.name] = both_models
    return labels


def inverse(permutation: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.argsort(p) for name, p in permutation.items()}


def test_columns_of_a_permuted_model_are_those_of_the_model(model: nn.Module) -> None:
    """With the true labels every space sees the same columns in both models, and its rows in the permuted order."""
    spec = grouped_query_spec()
    p = spec.random_permutation(2)
    models = [model.state_dict(), spec.permute(model.state_dict(), inverse(p))]
    labels = labels_of(spec, p)
    for space in spec:
        for axis in space.axes:
            a, b = columns(spec, space.name, axis, [m[axis.tensor] for m in models], labels)
            assert torch.equal(matrix(b)[p[space.name]], matrix(a)), (space.name, axis)
            assert matrix(a).shape[0] == space.width
            raw = columns(spec, space.name, axis, [m[axis.tensor] for m in models], {})
            assert raw[0].labels == {}
            assert raw[0].tensor.data_ptr() == models[0][axis.tensor].data_ptr()


def test_columns_scale_in_axes_by_members_and_leave_out_axes_summed() -> None:
    spec = PermutationSpec(
        (
            Space("a", 4, (Axis("w", 0, "out"),)),
            Space("b", 4, (Axis("w", 1, "in"),)),
        )
    )
    w = torch.randn(2, 4, 4, dtype=torch.float64)
    labels = {"a": torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]]), "b": torch.tensor([[0, 0, 1, 2], [0, 1, 1, 3]])}
    seen = columns(spec, "a", spec["a"].axes[0], list(w), labels)
    for m in range(2):
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for j in range(4):
            members = (labels["b"] == j).sum()
            expected[:, j] = w[m][:, labels["b"][m] == j].sum(1) * 2 / members
        assert torch.allclose(matrix(seen[m]), expected, atol=1e-12)
    seen = columns(spec, "b", spec["b"].axes[0], list(w), labels)
    expected = torch.stack([w[1][labels["a"][1] == j].sum(0) for j in range(4)], 1)
    assert torch.allclose(matrix(seen[1]), expected, atol=1e-12)


def test_columns_inside_shared_blocks_of_a_zip() -> None:
    """Rows are values; the query heads of each block are summed inside it, whatever block the rows go to."""
    view = (2, 3, 2)
    spec = PermutationSpec(
        (
            Space("query", 6, (Axis("o", 1, "in", view, (0, 1)),), blocks=2, tie="t"),
            Space("value", 4, (Axis("o", 1, "in", view, (0, 2)),), blocks=2, tie="t"),
        )
    )
    labels = {"query": torch.tensor([[0, 1, 1, 2, 3, 3], [3, 3, 2, 0, 0, 1]])}
    o = torch.randn(2, 5, 12, dtype=torch.float64)
    seen = columns(spec, "value", spec["value"].axes[0], list(o), labels, {"query": 4})
    members = [int((labels["query"] == j).sum()) for j in range(4)]
    for m in range(2):
        x = o[m].reshape(5, 2, 3, 2)
        expected = torch.zeros(2, 2, 5, 2, dtype=torch.float64)  # block, unit, row of o, merged query head
        for b, g in itertools.product(range(2), range(3)):
            j = int(labels["query"][m, b * 3 + g])
            expected[b, :, :, j % 2] += x[:, b, g].T * 2 / members[j]
        found = matrix(seen[m])
        columns_sorted = expected.reshape(4, -1)
        assert found.shape == columns_sorted.shape
        assert torch.allclose(found, columns_sorted, atol=1e-12)


@pytest.mark.parametrize("merged", [12, 18, 6])
@pytest.mark.parametrize("pick_first", [True, False])
def test_merged_width_of_a_pick_moves_what_comes_after(merged: int, pick_first: bool) -> None:
    view, at, factor = ((3, 3, 4), (1, 2), 0) if pick_first else ((3, 3, 4), (0, 2), 1)
    space = Space("v", 12, (Axis("qkv", 0, "out", view, at, (factor, 1)),), blocks=3)
    spec = PermutationSpec((space,))
    inner = merged // 3
    generator = torch.Generator().manual_seed(0)
    block = torch.randperm(3, generator=generator)
    labels = (block[:, None] * inner + torch.randint(inner, (3, 4), generator=generator)).reshape(-1)
    (found,) = axis_labels(spec, "qkv", (36, 5), {"v": labels}, {"v": merged})
    assert found.sizes == (24 + merged,)
    assert found.role == "out"
    assert found.dims == (0,)
    for a, b, i in itertools.product(range(3), range(3), range(4)):
        old = (a * 3 + b) * 4 + i
        if pick_first:  # (pick, block, unit): three stretches
            if a == 1:
                expected = 12 + int(labels[b * 4 + i])
            else:
                expected = old + (merged - 12 if a == 2 else 0)
        else:  # (block, pick, unit): three stretches in each block
            each = 8 + inner
            target = int(labels[a * 4 + i])
            if b == 1:
                expected = target // inner * each + 4 + target % inner
            else:
                expected = a * each + i + (4 + inner if b == 2 else 0)
        assert int(found.labels[old]) == expected


def test_parts_of_a_concatenation() -> None:
    """A norm over the concatenation of two spaces and an untouched part, as in a DenseNet."""
    spec = PermutationSpec(
        (
            Space("a", 4, (Axis("a.weight", 0, "out"), Axis("norm", 0, "out", part=(0, 4)))),
            Space("b", 3, (Axis("b.weight", 0, "out"), Axis("norm", 0, "out", part=(6, 3)))),
        )
    )
    labels = {"a": torch.tensor([1, 0, 1, 0]), "b": torch.tensor([2, 0, 1])}
    (found,) = axis_labels(spec, "norm", (9,), labels, {"a": 2})
    assert found.labels.tolist() == [1, 0, 1, 0, 2, 3, 6, 4, 5]
    assert found.size == 7
    view, dims = rows(torch.arange(9.0), spec["b"].axes[1])
    assert view.tolist() == [6, 7, 8]
    assert dims == (0,)
    with pytest.raises(ValueError, match=r"norm dim 0.*past the size 8"):
        axis_labels(spec, "norm", (8,), labels)


def test_labels_of_several_models_are_stacked() -> None:
    spec = grouped_query_spec()
    perms = [spec.random_permutation(s) for s in range(3)]
    stacked = {n: torch.stack([p[n] for p in perms]) for n in perms[0]}
    for name, shape in {"o.weight": (D, KV * GROUP * HD), "down": (EXPERTS, D, HIDDEN)}.items():
        together = axis_labels(spec, name, shape, stacked)
        for m, p in enumerate(perms):
            for whole, alone in zip(together, axis_labels(spec, name, shape, p), strict=True):
                assert torch.equal(whole.labels[m], alone.labels)
                assert whole.dims == alone.dims


def test_merged_width_of_flattened_dims() -> None:
    spec = PermutationSpec((Space("h", 6, (Axis("down", (0, 2), "in", (2, 3), (0, 1)),), blocks=2),))
    (found,) = axis_labels(spec, "down", (2, 5, 3), {"h": torch.tensor([2, 3, 3, 0, 0, 1])}, {"h": 4})
    assert found.sizes == (2, 2)
    assert found.size == 4
    assert found.dims == (0, 2)
    assert found.labels.tolist() == [2, 3, 3, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "widths", "message"),
    [
        ({"query": torch.arange(6), "value": torch.tensor([*range(4, 12), *range(4)])}, {}, "o.weight.*tied space"),
        ({"query": torch.arange(5)}, {}, "space 'query': expected 6"),
        ({"query": torch.tensor([0, 2, 1, 3, 4, 5])}, {}, "'query': units of one block go to different blocks"),
        ({"query": torch.arange(6)}, {"query": 7}, "3 blocks do not divide the merged width 7"),
        ({"query": torch.arange(6) + 1}, {}, "expected 0..5"),
        ({"query": torch.arange(6).repeat(1, 1, 1)}, {}, "must be"),
        ({"query": torch.arange(6).repeat(2, 1), "value": torch.arange(12)}, {}, "must be"),
        ({"query": torch.arange(6).repeat(2, 1), "value": torch.arange(12).repeat(3, 1)}, {}, "numbers of models"),
    ],
)
def test_labels_that_do_not_fit(labels: dict[str, Tensor], widths: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axis_labels(grouped_query_spec(), "o.weight", (D, KV * GROUP * HD), labels, widths)


def test_width_is_fixed_where_units_are_spread() -> None:
    spec = PermutationSpec((Space("s", 6, (Axis("w", 0, "out", (2, 5, 3), (0, 2)),)),))
    labels = {"s": torch.tensor([0, 1, 2, 3, 3, 3])}
    with pytest.raises(ValueError, match="spread over the axis"):
        axis_labels(spec, "w", (30,), labels, {"s": 4})


def test_rows_read_in_place() -> None:
    x = torch.randn(5, 24, 3)[:, :, ::2]
    view, dims = rows(x, Tap("m", "output", 1, (2, 3, 4), (0, 2)))
    assert view.shape == (5, 2, 3, 4, 2)
    assert dims == (1, 3)
    assert view.data_ptr() == x.data_ptr()
    view, dims = rows(x, Tap("m", "output", -2, (3, 2, 4), (1, 2), (0, 2)))
    assert dims == (1, 2)
    assert torch.equal(view.flatten(1, 2), x[:, 16:])
    view, dims = rows(x, Axis("w", (0, 1), "out", (5, 2, 12), (0, 2)))
    assert view.shape == (5, 2, 12, 2)
    assert dims == (0, 2)
    for bad in (Tap("m", "output", 1, (5, 5), (0, 1)), Tap("m", "output", 3), Tap("m", "output", 1, part=(20, 5))):
        with pytest.raises(ValueError, match="of an axis"):
            rows(x, bad)


def test_split_blocks_and_take() -> None:
    space = Space("s", 6, (Axis("w", 0, "out"),), blocks=3)
    block, inner = split_blocks(space, torch.tensor([3, 2, 0, 0, 5, 4]), 6)
    assert block.tolist() == [1, 0, 2]
    assert inner.tolist() == [[1, 0], [0, 0], [1, 0]]
    x = torch.randn(3, 5, 2)
    index = torch.tensor([4, 5, 0, 1, 3, 2])
    expected = x.movedim(1, 2).reshape(6, 5)[index].reshape(3, 2, 5).movedim(2, 1)
    assert torch.equal(take(x, (0, 2), index), expected)
    small = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
    assert take(small, (0,), torch.tensor([2, 0, 1])).float().tolist() == [3.0, 1.0, 2.0]


def test_width_one_has_a_row() -> None:
    spec = PermutationSpec((Space("one", 1, (Axis("w", 0, "out"),)), Space("b", 4, (Axis("w", 1, "in"),))))
    (seen,) = columns(spec, "one", spec["one"].axes[0], [torch.randn(1, 4)], {"b": torch.tensor([[0, 1, 2, 3]])})
    assert matrix(seen).shape == (1, 4)


@pytest.mark.parametrize("method", ["align", "zip"])
def test_groups_of_one_query_head(method: str) -> None:
    """Plain multi-head attention written as grouped queries: the space of query heads has one unit a block."""
    heads, size, width = 3, 4, 7
    spec = PermutationSpec(
        (
            Space("residual", width, (*(Axis(name, 1, "in") for name in "qkv"), Axis("o", 0, "out"))),
            Space(
                "value",
                heads * size,
                (Axis("v", 0, "out", (heads, size), (0, 1)), Axis("o", 1, "in", (heads, 1, size), (0, 2))),
                blocks=heads,
                tie="t",
            ),
            Space(
                "query",
                heads,
                (Axis("q", 0, "out", (heads, 1, size), (0, 1)), Axis("o", 1, "in", (heads, 1, size), (0, 1))),
                blocks=heads,
                tie="t",
            ),
            Space(
                "qk",
                heads * size,
                (Axis("q", 0, "out", (heads, 1, size), (0, 2)), Axis("k", 0, "out", (heads, size), (0, 1))),
                blocks=heads,
                within="fixed",
                tie="t",
            ),
        )
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (heads * size, width),
        "k": (heads * size, width),
        "v": (heads * size, width),
        "o": (width, heads * size),
    }
    models = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    plan = mf.match(models, spec, None, method, progress=False)
    want = mf.reference.match(models, spec, None, method)
    assert all(torch.equal(plan.labels[name], want.labels[name]) for name in plan.labels)


@pytest.mark.parametrize("merged", [1, 2, 3])
def test_a_space_of_one_unit_grows(merged: int) -> None:
    spec = PermutationSpec(
        (
            Space("one", 1, (Axis("w", 0, "out"), Axis("v", 1, "in"))),
            Space("b", 3, (Axis("v", 0, "out"), Axis("u", 1, "in"))),
        )
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (1, 4), "v": (3, 1), "u": (5, 3)}
    models = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)]
    plan = mf.match(models, spec, None, "zip", width={"one": merged}, progress=False)
    want = mf.reference.match(models, spec, None, "zip", width={"one": merged})
    assert all(torch.equal(plan.labels[name], want.labels[name]) for name in plan.labels)
    found, expected = plan.merge(models), want.merge(models)
    assert found["w"].shape == (merged, 4)
    assert found["v"].shape == (3, merged)
    assert all(torch.allclose(found[name].double(), expected[name].double(), atol=1e-6) for name in found)


def fused_spec() -> PermutationSpec:
    """Fused qkv, its pick inside the blocks (heads, 3, dims), a part of a concatenation, two spaces of a product."""
    heads, size = 3, 4
    view = (heads, 3, size)

    def fused(which: int) -> Axis:
        return Axis("qkv", 0, "out", view, (0, 2), (1, which))

    return PermutationSpec(
        (
            Space("residual", 5, (Axis("qkv", 1, "in"), Axis("o", 0, "out"), Axis("cat", 1, "in"))),
            Space("qk", 12, (fused(0), fused(1)), blocks=heads, tie="t"),
            Space("v", 12, (fused(2), Axis("o", 1, "in")), blocks=heads, tie="t"),
            Space("a", 2, (Axis("cat", 0, "in", (2, 3), 0, part=(4, 6)), Axis("cat", 2, "out", (3, 2), 1, (0, 1)))),
            Space("b", 3, (Axis("cat", 0, "in", (2, 3), 1, part=(4, 6)),)),
            Space("c", 4, (Axis("cat", 0, "in", part=(0, 4)),)),
            Space("one", 1, (Axis("single", 0, "out"),)),
            Space("d", 2, (Axis("single", 1, "out", (2, 3), 0),)),
        )
    )


FUSED_SHAPES = {"qkv": (36, 5), "o": (5, 12), "cat": (11, 5, 6), "single": (1, 6)}


def zip_labels(spec: PermutationSpec, models: int, seed: int) -> dict[str, Tensor]:
    """Random labels of one width a space that keep blocks and ties; every merged unit has a member somewhere."""
    generator = torch.Generator().manual_seed(seed)
    perms = [spec.random_permutation(seed + m) for m in range(models)]
    labels = {}
    for space in spec:
        each = space.width // space.blocks
        rows_of = []
        for m in range(models):
            block = perms[m][space.name][::each] // each
            inner = torch.randint(each, (space.blocks, each), generator=generator)
            if m == 0:
                inner = torch.arange(each).expand(space.blocks, each)
            rows_of.append((block[:, None] * each + inner).reshape(-1))
        labels[space.name] = torch.stack(rows_of)
    return labels


@pytest.mark.parametrize("unmatched", [(), ("residual",), ("query", "value", "qk")])
@pytest.mark.parametrize("fused", [False, True])
def test_columns_agree_with_the_reference(unmatched: tuple[str, ...], fused: bool) -> None:
    """Products of rows do not depend on the order of columns, which the two are free to choose."""
    torch.manual_seed(1)
    if fused:
        spec = fused_spec()
        models = [{n: torch.randn(s, dtype=torch.float64) for n, s in FUSED_SHAPES.items()} for _ in range(3)]
    else:
        spec = grouped_query_spec()
        models = [GroupedQuery().double().state_dict() for _ in range(3)]
    labels = {n: x for n, x in zip_labels(spec, 3, 4).items() if n not in unmatched}
    for space in spec:
        for axis in space.axes:
            tensors = [m[axis.tensor] for m in models]
            found = torch.cat([matrix(c) for c in columns(spec, space.name, axis, tensors, labels)])
            expected = torch.cat(row_matrices(spec, space, axis, tensors, labels))
            assert torch.allclose(found @ found.T, expected @ expected.T, rtol=1e-12, atol=1e-12), (space.name, axis)
