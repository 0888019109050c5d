"""What goes wrong around GPU kernels, provoked without a GPU: devices, dtypes, memory, drivers, launches.

Tensors on "meta" stand for those of another device; torch and its driver are stand-ins. Elsewhere: what the launchers
say of an old driver, a missing kernel image, a refused launch and scratch memory (test_simt_kernels), reasons of the
dispatch (test_triton_dispatch), sums after a failed launch (interpreted/cases_kernels), a full device
(test_cuda_backend).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core, backends, library

HERE = torch.eye(4)
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system")


def elsewhere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sums(features: list[Tensor], gram: Tensor | None = None, vectors: Tensor | None = None) -> None:
    gram = torch.zeros(8, 8) if gram is None else gram
    library.covariance_update(gram, torch.zeros(4, 8, dtype=torch.float64) if vectors is None else vectors, features)


MIXED: dict[str, tuple[Callable[[], object], str]] = {
    "covariance": (lambda: mf.Covariance(4).update([HERE, elsewhere(4, 4)]), r"features\[1\].* cpu, got one on meta"),
    "covariance_update": (lambda: sums([HERE, elsewhere(4, 4)]), r"features\[1\]: .* cpu as gram is, got one on meta"),
    "vectors": (
        lambda: sums([HERE, HERE], vectors=elsewhere(4, 8, dtype=torch.float64)),
        "vectors: .* cpu as gram is, got one on meta",
    ),
    "similarity": (lambda: mf.weight_similarity([[HERE, elsewhere(4, 4)]]), r"terms\[0\]\[1\].* cpu, got one on meta"),
    "terms": (
        lambda: mf.weight_similarity([[HERE, HERE], [elsewhere(4, 2), elsewhere(4, 2)]]),
        r"terms\[1\]\[0\].* cpu, got one on meta",
    ),
    "regroup": (lambda: mf.regroup(HERE, torch.arange(4), 0, 4, out=elsewhere(4, 4)), "out: .* on cpu, got .* on meta"),
    "tiles": (lambda: mf.SimilarityTiles((), [HERE, elsewhere(4, 4)]), r"features\[1\]: .* cpu, got one on meta"),
}
OPS = {
    "regroup": lambda x: mf.regroup(x, torch.arange(4), 0, 4),
    "zip": mf.zip_units,
    "assign_small": mf.assign,
    "assign": lambda x: mf.assign(x.expand(300, 300)),
    "assign_tile": lambda x: mf.assign_tiled(mf.MatrixTiles(x)),
    "similarity": lambda x: mf.weight_similarity([[x, x]]),
    "covariance": lambda x: mf.Covariance(4, device=x.device),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_named(name: str) -> None:
    call, words = MIXED[name]
    with pytest.raises((ValueError, RuntimeError), match=words):
        call()


@pytest.mark.parametrize("op", OPS)
def test_a_device_that_nothing_serves(op: str) -> None:
    x = elsewhere(1, 1) if op == "assign" else elsewhere(4, 4)
    with pytest.raises(ValueError, match=f"backend: nothing here runs '{op}' on 'meta' tensors: no backend serves it"):
        OPS[op](x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_no_kernel_takes(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 4).to(dtype)
    for call in (
        lambda: mf.Covariance(4).update([x, x]),
        lambda: mf.weight_similarity([[x, x]]),
        lambda: mf.zip_units(x),
        lambda: mf.assign(x),
        lambda: mf.MatrixTiles(x),
        lambda: mf.regroup(x, torch.arange(4) // 2, 0, 2),  # sums; bits can be moved
    ):
        with pytest.raises(TypeError, match=r"expected .*(floating|moved|member)"):
            call()


def test_without_a_gpu_its_ops_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", old)
    monkeypatch.setattr(_core, "build_info", lambda: {"cuda_archs": ["90"]})
    for op in ("zip", "regroup", "assign_small"):
        with pytest.raises(ValueError, match=f"nothing here runs '{op}' on 'cuda'.* driver on your system is too old"):
            backends.pick(op, "cuda", "cuda")
    monkeypatch.setattr(_core, "build_info", lambda: {"cuda_archs": []})
    with pytest.raises(ValueError, match=r"no CUDA kernels \(build with MUDSC_FAST_CUDA=ON\)"):
        backends.pick("zip", "cuda", "cuda")


class Devices:
    """Stands for torch.cuda: remembers which device was made the current one."""

    def __init__(self) -> None:
        self.current = [0]

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.current.append(device.index)
        yield
        self.current.pop()


@triton
def test_triton_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from mudsc_fast.backends.triton.launching import launching

    devices = Devices()
    monkeypatch.setattr(torch.cuda, "device", devices.device)
    with launching("a.kernel", torch.device("cuda:3")):
        assert devices.current == [0, 3]
    assert devices.current == [0]


def test_cuda_kernels_are_launched_on_the_stream_of_their_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from mudsc_fast.backends import cuda

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    assert cuda._stream(torch.device("cuda:3")) == 103


@triton
def test_a_failed_launch_names_kernel_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from mudsc_fast.backends.triton.launching import launching

    monkeypatch.setattr(torch.cuda, "device", Devices().device)
    with (
        pytest.raises(RuntimeError, match=r"product\.add_kernel failed on cuda:1: OSError: out of resource"),
        launching("product.add_kernel", torch.device("cuda:1")),
    ):
        raise OSError("out of resource: shared memory")


@triton
@pytest.mark.parametrize(
    ("shape", "what", "instead", "figure"),
    [
        ((28672, 28672), "Covariance: the sums of 2 x 14336 units", 'scope="cross" needs less', r"3\.06 GiB"),
        ((9, 28672), "similarity: some rows", "fewer rows at a time need less", r"0\.00 GiB"),
    ],
)
def test_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], what: str, instead: str, figure: str
) -> None:
    from mudsc_fast.backends.triton.launching import allocate

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=f"{what} needs {figure} on cuda:1, which has less free; {instead}"):
        allocate(shape, torch.float32, torch.device("cuda:1"), what, instead)


def test_nothing_falls_back_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is asked for by name runs or raises; every fallback of the table is a row of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in backends.BACKENDS:
        if backend.why_not is backends._always:
            continue
        for op in backend.ops:
            with pytest.raises(
                ValueError, match=f"backend: nothing here runs '{op}' on 'cuda' tensors: {backend.name}: "
            ):
                backends.pick(op, "cuda", backend.name)
    assert {b.name for b in backends.BACKENDS if b.why_not is backends._always} == {"cpu", "torch_device", "host"}
