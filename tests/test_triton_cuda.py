"""The Triton kernels on a GPU: what the interpreter cannot show. Part of `make gpu`."""

from __future__ import annotations

import pytest
import torch
from test_covariance import features

import mudsc_fast as mf
from mudsc_fast import library

pytestmark = pytest.mark.cuda
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def wait() -> None:
    torch.cuda.synchronize()


@pytest.mark.parametrize("ratio", [0, 3, 10, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["full", "cross"])
def test_covariance(dtype: torch.dtype, ratio: float, scope: str) -> None:
    batch = [x.to(dtype) for x in features(5000, 515, 3, ratio=ratio)]
    found, wanted = mf.Covariance(515, 3, scope, "cuda", "triton"), mf.reference.Covariance(515, 3, scope)
    for part in (slice(0, 1500), slice(1500, None)):
        found.update([x[part].cuda() for x in batch])
        wanted.update([x[part] for x in batch])
    assert float((found.correlation().cpu() - wanted.correlation()).abs().max()) <= 1e-5


def test_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from mudsc_fast.backends.triton import configs

    chip = configs.chip_of(torch.cuda.get_device_capability())
    batch = [x.bfloat16() for x in features(1030, 520)]
    weights = [[x.float().T.contiguous() for x in batch]]
    wanted = mf.reference.Covariance(520)
    wanted.update(batch)
    wanted.update([x.float() for x in batch])
    for use in ("add", "diagonal", "blend"):
        for config in configs.listed(use, chip):
            monkeypatch.setitem(configs.TABLES, use, {80: (config,), chip: (config,)})
            found = mf.Covariance(520, device="cuda", backend="triton")
            found.update([x.cuda() for x in batch])  # raw, then in planes
            found.update([x.float().cuda() for x in batch])
            got = mf.dual_similarity([[w.cuda() for w in row] for row in weights], found, 0.5, "full")
            seen = mf.reference.dual_similarity(weights, wanted, 0.5, "full")
            assert float((got.cpu() - seen).abs().max()) <= 1e-5, config.name


def test_images_in_place_and_a_million_samples() -> None:
    x = torch.randn(256, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    found = mf.Covariance(64, device="cuda", backend="triton")
    found.update([x, x.roll(1, 1)], dim=1)
    assert found.count == 2**20
    rows = x.movedim(1, -1).reshape(-1, 64).double()
    wanted = torch.corrcoef(rows.T)
    assert float((found.correlation()[:64, :64] - wanted).abs().max()) <= 1e-5


def test_memory_of_a_similarity() -> None:
    n, k = 4096, 8192
    weights = [torch.randn(n, k, device="cuda") for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mf.weight_similarity([weights], backend="triton")
    wait()
    ours = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    centred = torch.cat([w - w.mean(1, keepdim=True) for w in weights])
    centred /= centred.norm(dim=1, keepdim=True)
    assert (centred @ centred.T).shape == (2 * n, 2 * n)
    assert ours <= (torch.cuda.max_memory_allocated() - before) / 2 + 2**30


@pytest.mark.parametrize("kind", ["any", "ties", "equal"])
@pytest.mark.parametrize("room", [0, 1, 17, 64, 128, 129])
def test_lists_of_a_tile(kind: str, room: int) -> None:
    from mudsc_fast.backends.triton import assign_tile

    generator = torch.Generator().manual_seed(room)
    tile, prices = torch.randn(50, 3001, generator=generator), torch.rand(3001, dtype=torch.float64)
    if kind != "any":
        tile, prices = (tile * 2).round(), prices.round()
    if kind == "equal":
        tile[::2] = 0.5
    worth = tile.double() - prices
    columns, values, threshold, maxima = assign_tile(tile.cuda(), 0, prices, room)
    assert torch.equal(maxima, worth.amax(dim=1))
    if room:
        assert torch.equal(values, tile.double().gather(1, columns.long()))
        assert torch.equal(threshold, worth.scatter(1, columns.long(), -torch.inf).amax(dim=1))
        best = worth.topk(room, dim=1).values
        assert float((worth.gather(1, columns.long()).sort(dim=1, descending=True).values - best).abs().max()) <= 1e-6


def test_an_assignment_in_tiles_is_that_of_the_whole() -> None:
    weights = [x.T.contiguous().float().cuda() for x in features(300, 1500)]
    seen = [x.float().cuda() for x in features(400, 1500, ratio=1)]
    for terms, active in (([weights], None), ([weights], seen), ((), seen)):
        source = mf.SimilarityTiles(terms, active)
        found = mf.assign_tiled(source, tile_bytes=1 << 21, backend="triton")
        whole = mf.assign(source.tile(torch.arange(1500)).cpu())
        assert float((found.value - whole.value).abs()) <= 1e-6
        assert float(found.gap) <= 1e-6 * 1500


def test_covariance_update_in_a_cuda_graph() -> None:
    batch = [torch.randn(2048, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    gram = torch.zeros(512, 512, device="cuda")
    vectors = torch.zeros(4, 512, device="cuda", dtype=torch.float64)
    vectors[1] = 1.0
    for planes in (1, 2, 3):
        library.covariance_update(gram, vectors, batch, -1, planes)  # compiles
        wait()
        gram.zero_()
        vectors[2:] = 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.covariance_update(gram, vectors, batch, -1, planes)
        graph.replay()
        graph.replay()
        wait()
        stacked = torch.cat(batch, dim=1).double()
        wanted = 2 * (stacked.T @ stacked).triu()
        assert float((gram.triu() - wanted).abs().max()) <= 1e-5 * 4096
        assert float((vectors[2] - 2 * stacked.sum(dim=0)).abs().max()) <= 1e-5 * 4096
        assert float((vectors[3] - 2 * stacked.square().sum(dim=0)).abs().max()) <= 1e-5 * 4096


def test_another_stream_and_device_order() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batch = [torch.randn(1000, 128, device="cuda") for _ in range(2)]
        found = mf.Covariance(128, device="cuda", backend="triton")
        found.update(batch)
        got = found.correlation()
    stream.synchronize()
    wanted = torch.corrcoef(torch.cat(batch, dim=1).T.double())
    assert float((got - wanted).abs().max()) <= 1e-5


def test_tensors_of_another_gpu_are_refused() -> None:
    found = mf.Covariance(4, device="cuda", backend="triton")
    with pytest.raises(ValueError, match="expected a tensor on cuda"):
        found.update([torch.zeros(3, 4), torch.zeros(3, 4)])
