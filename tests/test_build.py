"""The build and the ground under all kernels: instruction sets, threads, the GIL, signals, forks, the CUDA option."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mudsc_fast as mf
from mudsc_fast import _core

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_build_config_describes_the_build() -> None:
    config = mf.build_config()
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert config["version"] == mf.__version__ == version.group(1)
    assert config["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert set(config["isas_usable"]) <= set(config["isas_built"])
    assert config["isa"] == config["isas_usable"][-1]
    assert isinstance(config["cuda_archs"], list)
    assert config["triton"] is None or re.match(r"\d+\.\d+", config["triton"])


@pytest.mark.parametrize("isa", _core.build_info()["isas_usable"])
def test_environment_forces_an_instruction_set(isa: str) -> None:
    ran = run("import mudsc_fast as mf; print(mf.build_config()['isa'])", MUDSC_FAST_ISA=isa)
    assert ran.stdout.strip() == isa, ran.stderr


def test_unknown_instruction_set_is_refused_when_first_needed() -> None:
    code = "import mudsc_fast as mf, torch; mf.assign(torch.eye(3))"
    ran = run(code, MUDSC_FAST_ISA="mmx")
    assert ran.returncode == 1
    assert "ValueError: unknown instruction set 'mmx'; this build has" in ran.stderr


def test_an_instruction_set_that_this_cpu_lacks_is_refused() -> None:
    info = _core.build_info()
    for isa in set(info["isas_built"]) - set(info["isas_usable"]):
        with pytest.raises(RuntimeError, match=f"'{isa}' cannot run on this CPU"):
            _core.use_isa(isa)
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        _core.use_isa("sse9")
    assert _core.isa() == info["isas_usable"][-1]


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind, which shows a CPU without AVX-512, is missing")
def test_a_smaller_cpu_gets_kernels_that_it_can_run(tmp_path: Path) -> None:
    """On valgrind's CPU, which has AVX2 and no AVX-512, choosing and running must not meet an unknown instruction."""
    source = tmp_path / "choose.cpp"
    source.write_text(
        '#include <cstdio>\n#include <exception>\n#include "cpu/kernels.h"\nint main() {\n'
        "  puts(mudsc::kernels().isa);\n"
        '  try { mudsc::use_isa("avx512"); } catch (const std::exception& e) { puts(e.what()); }\n}\n'
    )
    build = ROOT / "csrc"
    program = tmp_path / "choose"
    objects = []
    for isa, flags in {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}.items():
        objects.append(tmp_path / f"{isa}.o")
        table = tmp_path / f"{isa}.cpp"
        table.write_text(
            f'#include "cpu/kernels.h"\nnamespace mudsc {{ namespace {isa} {{ const KernelTable& table(); '
            f'static const KernelTable t = {{"{isa}"}}; const KernelTable& table() {{ return t; }} }} }}\n'
        )
        compile_table = ["g++", "-std=c++17", f"-I{build}", "-Wno-missing-field-initializers", *flags, "-c"]
        subprocess.run([*compile_table, str(table), "-o", str(objects[-1])], check=True)
    isas = "-DMUDSC_FAST_ISAS=X(baseline) X(avx2) X(avx512)"
    sources = [str(source), str(build / "cpu/isa.cpp"), *map(str, objects)]
    subprocess.run(["g++", "-std=c++17", isas, f"-I{build}", *sources, "-o", str(program)], check=True)
    ran = subprocess.run(["valgrind", "-q", str(program)], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["avx2", "instruction set 'avx512' cannot run on this CPU"]


def test_the_gil_is_released_while_a_kernel_runs() -> None:
    similarity = torch.rand(3000, 3000)
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before = time.perf_counter()
    while time.perf_counter() - before < 0.3:
        mf.assign(similarity)
    stop.set()
    thread.join()
    # Held for a whole call, the GIL would leave gaps as long as the calls; most ticks come at the switching interval.
    gaps = sorted(b - a for a, b in pairwise(ticks))
    assert gaps[len(gaps) // 2] < 0.02


def test_python_threads_may_share_the_kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(200, 300, generator=generator) for _ in range(6)]
    labels = torch.randint(100, (300,), generator=generator)
    wanted = [mf.regroup(tensor, labels, 1, 100) for tensor in tensors]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(50):
            if not torch.equal(mf.regroup(tensors[k], labels, 1, 100), wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, torch, mudsc_fast as mf
torch.set_num_threads(2)
x, labels = torch.randn(400, 4000), torch.arange(4000).flip(0)
want = mf.regroup(x, labels, 1, 4000)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(mf.regroup(x, labels, 1, 4000), want) else 3)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
"""


def test_the_pool_works_after_a_fork() -> None:
    ran = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert "child 0" in ran.stdout, ran.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_cuda_on_without_nvcc_says_what_to_do(tmp_path: Path) -> None:
    import pybind11

    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-DSKBUILD_PROJECT_VERSION=0.0.0",
        "-DMUDSC_FAST_CUDA=ON",
        "-DCMAKE_CUDA_COMPILER=NOTFOUND",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    ran = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "MUDSC_FAST_CUDA=ON but no nvcc was found" in re.sub(r"\s+", " ", ran.stderr)
    configure[configure.index("-DMUDSC_FAST_CUDA=ON")] = "-DMUDSC_FAST_CUDA=maybe"
    ran = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert "it must be AUTO, ON or OFF" in re.sub(r"\s+", " ", ran.stderr)
