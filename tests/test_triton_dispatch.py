"""Who picks the Triton kernels and why not; their configurations; what a results file may change."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mudsc_fast as mf
from mudsc_fast import backends


def reason(name: str = "triton") -> str | None:
    return next(backend for backend in backends.BACKENDS if backend.name == name).why_not()


def test_nothing_is_imported_before_it_is_picked() -> None:
    code = "import sys, mudsc_fast; mudsc_fast.Covariance(3); sys.exit('mudsc_fast.backends.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "torch finds no CUDA device (it was built without CUDA)"
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", old)
    assert reason() == (
        "torch finds no CUDA device (The NVIDIA driver on your system is too old (found version 11040).)"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert reason() == "Triton kernels need compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert reason() is None
    monkeypatch.setattr(backends, "_triton_version", lambda: "3.4.1")
    assert reason() == "Triton 3.4.1 is installed, its kernels here need 3.6 or newer (which torch 2.11 brings)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason() == "triton is not installed (pip install 'mudsc-fast[gpu]')"


def test_asked_for_by_name_it_runs_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install"):
        backends.pick("covariance", "cuda", "triton")
    with pytest.raises(ValueError, match="'triton' does not run 'covariance' on 'cpu' tensors"):
        mf.Covariance(3, backend="triton")
    with pytest.raises(ValueError, match="'triton' does not run 'zip' on 'cuda' tensors"):
        backends.pick("zip", "cuda", "triton")
    assert backends.pick("covariance", "cuda").name == "torch_device"
    assert backends.pick("similarity", "cuda").name == "host"
    assert backends.pick("assign_tile", "cuda").name == "host"


def test_with_a_gpu_it_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert backends.pick("covariance", "cuda").name == "triton"
    assert backends.pick("similarity", "cuda").name == "triton"
    assert backends.pick("assign_tile", "cuda").name == "triton"


triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system")


@triton
def test_configurations_by_chip() -> None:
    from mudsc_fast.backends.triton import configs

    for capability, chip in (((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)):
        assert configs.chip_of(capability) == chip
        for use in configs.TABLES:
            names = [config.name for config in configs.listed(use, chip)]
            assert len(set(names)) == len(names) > 0
            assert all(config.reason for config in configs.listed(use, chip))
    assert not configs.product_config("add", (8, 6)).descriptors
    assert configs.product_config("add", (9, 0)).descriptors
    with pytest.raises(ValueError, match='"add", "blend" or "diagonal"'):
        configs.product_config("split", (9, 0))
    with pytest.raises(ValueError, match='"split_across"'):
        configs.split_config("blend", (9, 0))
    with pytest.raises(ValueError, match="multiple of depth"):
        configs.ProductConfig(64, 64, 48, 4, 3, True, "no", chunk=64)


@triton
def test_a_results_file_names_the_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mudsc_fast.backends.triton import configs

    other = configs.listed("add", 90)[1]
    results, tuned = tmp_path / "results.json", tmp_path / "tuned.json"
    results.write_text(json.dumps({"tuned": {"add": {"90": other.name}}}))
    monkeypatch.setenv("MUDSC_FAST_TUNED", str(tuned))
    configs._tuned.cache_clear()
    try:
        assert configs.product_config("add", (9, 0)) == configs.listed("add", 90)[0]
        configs.update(results, tuned)
        assert configs.product_config("add", (9, 0)) == other
        assert configs.product_config("add", (8, 0)) == configs.listed("add", 80)[0]
        for bad in ({"tuned": {"add": {"90": "1x1x1"}}}, {"tuned": {"mine": {"90": other.name}}}, {"rows": []}):
            results.write_text(json.dumps(bad))
            with pytest.raises(ValueError, match="results: expected"):
                configs.update(results, tuned)
        assert configs.product_config("add", (9, 0)) == other
    finally:
        configs._tuned.cache_clear()


@triton
def test_tiles_are_walked_once_each_in_groups() -> None:
    from mudsc_fast.backends.triton.configs import ProductConfig
    from mudsc_fast.backends.triton.launching import tile_order

    config = ProductConfig(32, 64, 32, 4, 2, False, "a test", group=2)
    cpu = torch.device("cpu")
    whole = tile_order(100, 200, config, False, cpu).tolist()
    assert sorted(whole) == [[i, j] for i in range(4) for j in range(4)]
    assert whole[:4] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    square = tile_order(200, 200, config, True, cpu).tolist()
    assert sorted(square) == [[i, j] for i in range(7) for j in range(4) if 64 * j + 63 >= 32 * i]
    # All but the squares of 64 along the diagonal, of a triangle and of a whole.
    beyond = tile_order(200, 200, config, True, cpu, None, 64).tolist()
    assert sorted(beyond) == [[i, j] for i in range(7) for j in range(4) if j > i // 2]
    both = tile_order(200, 200, config, False, cpu, None, 128).tolist()
    assert sorted(both) == [[i, j] for i in range(7) for j in range(4) if j // 2 != i // 4]
    assert len(tile_order(64, 64, config, True, cpu, None, 64)) == 0
    assert sorted(tile_order(100, 64, config, False, cpu, (32, 70)).tolist()) == [[1, 0], [2, 0]]
    with pytest.raises(ValueError, match="multiple of 32"):
        tile_order(100, 64, config, False, cpu, (16, 70))


def test_the_torch_accumulators_keep_a_scale() -> None:
    # A state of the CPU's accumulators brings scales with it, and samples that come later must be scaled alike.
    batch = [torch.randn(200, 6, generator=torch.Generator().manual_seed(m)) * 1e-20 for m in range(2)]
    before = mf.Covariance(6)
    before.update([x[:100] for x in batch])
    state = before.state_dict()
    from mudsc_fast.backends.torch_device import TorchCovariance
    from mudsc_fast.covariance import relayout

    sums = TorchCovariance(6, 2, False, torch.device("cpu"))
    gram, vectors = relayout(state["gram"], state["vectors"], 6, 2, False, state["block"], 0)
    assert bool((vectors[1] != 1).any())
    sums.load(gram, vectors, 100, torch.float32)
    sums.update([x[100:] for x in batch], 1)
    reference = mf.reference.Covariance(6)
    reference.update(batch)
    assert float((sums.correlation(False) - reference.correlation()).abs().max()) < 1e-5
