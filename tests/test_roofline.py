"""The computed floors: the arithmetic, and that the document shows what the records give."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import marked, roofline
from benchmarks.proof import occupancy

DOCUMENT = roofline.ROOT / "docs" / "gpu.md"


def records(path: Path = roofline.RECORDS) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_document_shows_what_the_records_give() -> None:
    pytest.importorskip("triton")
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = marked.part(text, "roofline")
    made = roofline.table(records(), records(roofline.CUDA_RECORDS)).strip()
    assert shown == made, "python -m benchmarks.roofline --write docs/gpu.md"
    assert shown.count("computed, not measured") == 3


def test_floors_by_hand() -> None:
    shape = roofline.Shape("x", "product.add_kernel", "bf16", 798e12 * 0.018, 1e9)
    assert roofline.floor(shape, "H100") == (pytest.approx(0.018), "tensor cores")
    shape = roofline.Shape("x", "split.split_kernel", "bf16", 0.0, 4.3e9)
    assert roofline.floor(shape, "H200") == (pytest.approx(1e-3), "memory")
    # 2 x 8192 units: one triangle of 16384 and what its diagonal tiles have too much, half of a full product and 1 %.
    wide = next(s for s in roofline.shapes() if s.name.startswith("covariance, bf16, 2 x 8192"))
    assert 0.5 < (wide.operations + wide.before[0]) / wide.full < 0.51
    # Before the others 96 tiles of 128 x 128 a model, and the input read once for them; both launches take their time.
    assert wide.before[0] == 2 * 128 * 128 * 2 * 96 * 65_536
    assert 2 * 16_384 * 65_536 < wide.before[1] < 1.5 * 2 * 16_384 * 65_536
    two = roofline.Shape("x", "product.add_kernel", "bf16", 798e12 * 0.018, 1e9, 0.0, (0.0, 3.0e9))
    assert roofline.floor(two, "H100") == (pytest.approx(0.019), "tensor cores")
    assert roofline._tiles(256, 128, 128) == 3
    assert roofline._tiles(256, 128, 256) == 2


def test_occupancy_and_steps_by_hand() -> None:
    record = {
        "registers": 128,
        "warps": 8,
        "shared_bytes": 100_000,
        "config": "128x128x64w8s4",
        "loop_instructions": 85,
    }
    assert roofline.occupancy(record) == 2
    assert roofline.occupancy(record | {"registers": 168}) == 1
    assert roofline.occupancy(record | {"shared_bytes": 196_640}) == 1
    assert roofline.occupancy(record | {"registers": 32, "shared_bytes": 0}) == 8
    assert roofline.step_cycles(record) == (512, 170)


OCCUPANCY_MAIN = """
#include "cuda_occupancy.h"
#include <stdio.h>
int main() {
    int chip, threads, registers, shared;
    while (scanf("%d %d %d %d", &chip, &threads, &registers, &shared) == 4) {
        const size_t block = chip == 80 ? 166912 : 232448;
        cudaOccDeviceProp device;
        memset(&device, 0, sizeof(device));
        device.computeMajor = chip / 10;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = 2048;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 49152;
        device.sharedMemPerMultiprocessor = block + 1024;
        device.numSms = 132;
        device.sharedMemPerBlockOptin = block;
        device.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes use;
        memset(&use, 0, sizeof(use));
        use.maxThreadsPerBlock = 1024;
        use.numRegs = registers;
        use.maxDynamicSharedSizeBytes = block;
        use.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        cudaOccDeviceState state;
        cudaOccResult result;
        memset(&result, 0, sizeof(result));
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &use, &state, threads, shared) != 0) return 1;
        printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


def occupancy_header() -> Path | None:
    """Triton and the CUDA toolkit bring it."""
    found = importlib.util.find_spec("triton")
    places = [Path(found.origin).parent / "backends" / "nvidia" / "include"] if found and found.origin else []
    return next((p for p in [*places, Path("/usr/local/cuda/include")] if (p / "cuda_occupancy.h").exists()), None)


@pytest.mark.skipif(occupancy_header() is None or shutil.which("g++") is None, reason="no cuda_occupancy.h or no g++")
def test_occupancy_is_that_of_cudas_own_rule(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(OCCUPANCY_MAIN)
    command = ["g++", f"-I{occupancy_header()}", str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    subprocess.run(command, check=True)
    rng = random.Random(0)
    asked = [
        (chip, 32 * rng.randint(1, 32), rng.randint(16, 255), rng.choice((0, 64, 4_676, rng.randint(0, 232_448))))
        for chip in (80, 90, 100)
        for _ in range(700)
    ]
    lines = "\n".join(" ".join(map(str, one)) for one in asked)
    done = subprocess.run([str(tmp_path / "main")], input=lines, capture_output=True, text=True)
    assert done.returncode == 0
    theirs = [int(line) for line in done.stdout.split()]
    ours = [occupancy.blocks(occupancy.Use(*use), chip) for chip, *use in asked]
    assert ours == theirs
    assert len(set(ours)) > 8


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    marked.write(path, {"a": "new"})
    assert path.read_text() == "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    assert marked.part(path.read_text(), "a") == "new"
    with pytest.raises(ValueError, match="expected one part between <!-- b: begin -->"):
        marked.write(path, {"a": "newer", "b": "new"})
    assert marked.part(path.read_text(), "a") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["document.md"]


def test_a_variant_without_a_record_is_named() -> None:
    with pytest.raises(ValueError, match=r"records: none of product\.add_kernel"):
        roofline.table([], [])
    with pytest.raises(ValueError, match=r"records: none of vectors_kernel, .* on sm_90a"):
        roofline.table(records(), [])
