"""The registered ops: their schemas and fake kernels hold, they sit in compiled graphs, and they say what the functions
say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import library


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def similarity(units: int) -> Tensor:
    x = torch.randn(units, units, generator=generator())
    return (x + x.T) / 2


def features(width: int = 5) -> list[Tensor]:
    return [torch.randn(20, width, generator=torch.Generator().manual_seed(m)) + 1 for m in range(2)]


def weights() -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=make) for shape in ((6, 9), (6, 9), (4, 6, 3), (4, 6, 3))]


# op: arguments for it, and the same by the public functions
OPS: dict[str, tuple[Any, tuple[Any, ...], Callable[[], Any]]] = {
    "regroup": (
        library.regroup,
        (torch.randn(3, 7, 2, generator=generator()).transpose(0, 2), torch.arange(7) % 4, 1, 4, torch.rand(4)),
        lambda: mf.regroup(*OPS["regroup"][1]),
    ),
    "assign": (library.assign, (similarity(9),), lambda: _assigned(mf.assign(similarity(9)))),
    "assign, batch": (
        library.assign,
        (similarity(6).expand(2, 6, 6),),
        lambda: _assigned(mf.assign(similarity(6).expand(2, 6, 6))),
    ),
    "assign_blocks": (library.assign_blocks, (similarity(8), 4, "free"), lambda: _blocks(similarity(8))),
    "zip_units": (library.zip_units, (similarity(10), 2, 4), lambda: _zipped(mf.zip_units(similarity(10), 2, 4))),
    "dual_similarity": (
        library.dual_similarity,
        (weights(), [0, 1], 2, None, 1.0, "full"),
        lambda: mf.weight_similarity([weights()[:2], [mf.Term(w, 1) for w in weights()[2:]]], "full"),
    ),
    "dual_similarity, blended": (
        library.dual_similarity,
        (weights(), [0, 1], 2, torch.full((1, 6, 6), 0.5), 0.25, "cross"),
        lambda: 0.25 * mf.weight_similarity([weights()[:2], [mf.Term(w, 1) for w in weights()[2:]]]) + 0.75 * 0.5,
    ),
}


def _assigned(found: mf.Assignment) -> tuple[Tensor, ...]:
    return found.indices, found.value, *found.duals, found.gap


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    found = mf.assign_blocks(matrix, 4)
    return found.indices, found.value, found.block_indices


def _zipped(found: mf.Zip) -> tuple[Tensor, ...]:
    return found.labels, found.sizes, found.value


def agree(found: Any, wanted: Any) -> None:
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, wanted)), strict=True):
        assert x.dtype == y.dtype
        assert torch.allclose(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(OPS))
def test_ops_hold_their_schemas_and_shapes(name: str) -> None:
    op, arguments, _ = OPS[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", list(OPS))
def test_ops_sit_in_compiled_graphs(name: str) -> None:
    op, arguments, plain = OPS[name]
    compiled = torch.compile(lambda *given: op(*given), backend="aot_eager", fullgraph=True)
    agree(compiled(*arguments), plain())
    agree(op(*arguments), plain())


@pytest.mark.parametrize("cross", [False, True])
def test_covariance_update(cross: bool) -> None:
    width = 5
    batch = features(width)
    shape = (width, width) if cross else (2 * width, 2 * width)
    gram, vectors = torch.zeros(shape), torch.zeros(4, 2 * width, dtype=torch.float64)
    vectors[0], vectors[1] = 1.0, 0.5
    torch.library.opcheck(library.covariance_update, (gram.clone(), vectors.clone(), batch))

    def two_batches(gram: Tensor, vectors: Tensor, batch: list[Tensor]) -> None:
        library.covariance_update(gram, vectors, batch)
        library.covariance_update(gram, vectors, batch, 1, 2)

    torch.compile(two_batches, backend="aot_eager", fullgraph=True)(gram, vectors, batch)
    state = {"width": width, "models": 2, "cross": int(cross), "block": 0, "count": 40, "wide": 0}
    covariance = mf.Covariance.from_state_dict({**state, "gram": gram.double(), "vectors": vectors})
    reference = mf.reference.Covariance(width, scope="cross" if cross else "full")
    reference.update([torch.cat((x, x)) for x in batch])
    assert torch.allclose(covariance.correlation().double(), reference.correlation(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gram": torch.zeros(9, 10)}, "gram: expected float32 sums of 2 x 5"),
        ({"gram": torch.zeros(10, 10, dtype=torch.float64)}, "gram: expected float32"),
        ({"vectors": torch.zeros(4, 9, dtype=torch.float64)}, "vectors"),
        ({"features": features()[:1]}, "features"),
        ({"planes": 4}, "planes"),
    ],
)
def test_covariance_update_checks_its_arguments(change: dict[str, Any], words: str) -> None:
    given = {"gram": torch.zeros(10, 10), "vectors": torch.zeros(4, 10, dtype=torch.float64), "features": features()}
    with pytest.raises(ValueError, match=words):
        library.covariance_update(**(given | change))


def test_ops_that_wait_are_kept_out_of_cuda_graphs() -> None:
    unsafe = library._UNSAFE
    if unsafe is None:
        pytest.skip("this torch has no such tag")
    for name in {key.split(",")[0] for key in OPS} | {"covariance_update"}:
        assert (unsafe in getattr(torch.ops.mudsc_fast, name).default.tags) == (name != "covariance_update"), name
