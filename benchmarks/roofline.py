"""What the GPU kernels cannot beat on an H100 or H200: computed from shapes, measured peaks and machine code, not
measured.

python -m benchmarks.roofline [--records FILE] [--write docs/gpu.md]

FILE holds the records of `python -m benchmarks.proof.triton_code`; those of `cuda_code` are read beside. A floor is the
larger of operations over the peak and bytes over the bandwidth, launch by launch; occupancy follows the rule of CUDA's
cuda_occupancy.h.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import marked
from benchmarks.proof.occupancy import Use, blocks

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "triton-code.json"
CUDA_RECORDS = ROOT / "benchmarks" / "results" / "cuda-code.json"

# Measured: bfloat16 products of 8192^3 random matrices by cuBLAS, and device copies (read and written bytes).
PEAKS = {"H100": (798e12, 3.0e12), "H200": (769e12, 4.3e12)}
TENSOR_FMA = 2_048  # bfloat16 multiply-adds a clock and SM on Hopper
SCHEDULERS = 4


@dataclass(frozen=True)
class Shape:
    """One launch: what is computed, and with which kernel variant."""

    name: str
    kernel: str
    variant: str
    operations: float  # of the tensor cores
    bytes: float  # to and from memory, each operand once
    full: float = 0.0  # operations of a plain product of the same result, for what it is compared with
    before: tuple[float, float] = (0.0, 0.0)  # operations and bytes of a launch that has to end first


def _tiles(n: int, rows: int, columns: int) -> int:
    """Tiles on or above the diagonal of an n x n result."""
    return sum((j + 1) * columns > i * rows for i in range(-(-n // rows)) for j in range(-(-n // columns)))


def _near(width: int, samples: int, chunk: int) -> tuple[float, float]:
    """Operations and bytes of the tiles of 128 x 128 in squares of 256 along the diagonals of two models, with column
    sums."""
    side, n = 128, 2 * width
    number = -(-width // side)
    tiles = 2 * (number // 2 * 3 + number % 2)
    once, chunks = 2.0 * n * samples, samples / chunk
    # A chunk reads and writes its tile, and writes two sums a column, which are read again; the squares are zeroed,
    # read, and added to the matrix.
    return 2.0 * side * side * tiles * samples, once + chunks * (8.0 * side * side * tiles + 16.0 * n) + 16.0 * n * 256


def shapes() -> Iterator[Shape]:
    """Spaces of real models: two models, so that n = 2 * width units are multiplied."""
    rows, columns, chunk = 128, 256, 4096  # the chunk at means near 0; planes take half of it
    for width, samples in ((1024, 65_536), (4096, 65_536), (8192, 65_536), (14_336, 32_768)):
        n = 2 * width
        tile = rows * columns * (2 * _tiles(width, rows, columns) + -(-width // rows) * -(-width // columns))
        once = 2.0 * tile * samples
        full = 2.0 * n * n * samples
        added = 8.0 * tile * samples / chunk  # each chunk reads and writes its tile
        # Raw, tiles near the diagonal come first, with the sums that decide; the others do not repeat them.
        near = _near(width, samples, chunk)
        rest = 1.0 - 2 * -(-width // rows) * rows * columns / tile
        yield Shape(
            f"covariance, bf16, 2 x {width}, {samples:,} samples", "product.add_kernel", "bf16", rest * once,
            2.0 * n * samples + rest * added, full, near,
        )  # fmt: skip
        yield Shape(
            f"of it near the diagonal, with column sums, 2 x {width}", "diagonal.diagonal_kernel", "bf16", *near
        )  # fmt: skip
        if width in (4096, 8192):
            planes = 6.0 * n * samples
            yield Shape(
                f"covariance, float32, 2 x {width}, {samples:,} samples", "product.add_kernel", "float32 in 3 planes",
                6 * once, planes + 2 * added, full,
            )  # fmt: skip
            yield Shape(
                f"planes of float32, 2 x {width}, {samples:,} samples", "split.split_kernel",
                "fp32, 3 planes, units adjacent", 0.0, 10.0 * n * samples,
            )  # fmt: skip
    for width, k in ((4096, 24_576), (8192, 57_344), (14_336, 24_576)):
        one = 2.0 * width * width * k
        moved = 12.0 * width * k + 8.0 * width * width * k / 4096
        variant = "cross, 3 planes, last of several"
        yield Shape(
            f"similarity, float32, cross, {width} units, {k:,} columns", "product.blend_kernel", variant, 6 * one,
            moved, one,
        )  # fmt: skip
        yield Shape(
            f"similarity, bf16, cross, {width} units, {k:,} columns", "product.blend_kernel", "cross, 1 plane", one,
            4.0 * width * k + 8.0 * width * width * k / 4096, one,
        )  # fmt: skip
    for n in (14_336, 28_672):
        name = f"lists of a similarity's rows, {n} units"
        yield Shape(name, "candidates.collect_kernel", "lists of up to 128", 0.0, 4.0 * n * n)
    for n in (8192, 28_672):
        yield Shape(
            f"correlations, {n} units", "correlation.correlation_kernel", "triangle", 0.0, 6.0 * n * n
        )  # fmt: skip


def cuda_shapes() -> Iterator[Shape]:
    """Launches of the CUDA kernels, all bound by memory or by waiting."""
    d, columns = 14_336, 8_192
    for dtype, element, size in (("float32", "unsigned int", 4), ("bfloat16", "unsigned short", 2)):
        moved = 2.0 * d * columns * size
        lanes = 16 // size
        for kernel, axis in (("vectors_kernel", "rows"), ("lines_kernel", "columns")):
            variant = f"{kernel}<Move<{element}>, {lanes}>"
            yield Shape(f"regroup, {dtype}, {d} x {columns}, permuted {axis}", kernel, variant, 0.0, moved)
    for width in (4096, d):
        n = 2 * width
        # Loading reads all and writes all, the first search reads half; a merge reads and writes two rows and columns,
        # and waits once for the whole grid, which is not in the floor.
        moved = 10.0 * n * n + width * 20.0 * n
        yield Shape(f"zip, 2 x {width}, {width} merges", "zip_kernel", "zip_kernel<float, true>", 0.0, moved)
    yield Shape("1024 assignments of 128 x 128", "assign_kernel", "assign_kernel<float>", 0.0, 4.0 * 1024 * 128 * 128)


def floor(shape: Shape, chip: str) -> tuple[float, str]:
    """Seconds that no kernel of this kind can beat on a chip, and what bounds it."""
    flops, bandwidth = PEAKS[chip]
    by_operations, by_bytes = shape.operations / flops, shape.bytes / bandwidth
    before = max(shape.before[0] / flops, shape.before[1] / bandwidth)
    bound = "tensor cores" if by_operations > by_bytes else "memory"
    return before + max(by_operations, by_bytes), bound


def occupancy(record: dict[str, Any]) -> int:
    """Blocks that fit on one SM of an H100 or H200."""
    return blocks(Use(32 * record["warps"], record["registers"], record["shared_bytes"]), 90)


def step_cycles(record: dict[str, Any]) -> tuple[int, int]:
    """Clocks that one turn of the main loop takes the tensor cores, and the schedulers, for one block."""
    rows, columns, depth = (int(x) for x in record["config"].split("w")[0].split("x"))
    return rows * columns * depth // TENSOR_FMA, -(-record["loop_instructions"] * record["warps"] // SCHEDULERS)


def _chosen(records: list[dict[str, Any]], shape: Shape, arch: str = "sm_90") -> dict[str, Any]:
    found = [r for r in records if (r["kernel"], r["variant"], r["arch"]) == (shape.kernel, shape.variant, arch)]
    if not found:
        raise ValueError(f"records: none of {shape.kernel}, {shape.variant} on {arch}")
    return found[0]  # the first configuration listed is the one taken


def table(records: list[dict[str, Any]], cuda: list[dict[str, Any]]) -> str:
    """The floors as a Markdown table, and the configurations under it; records of Triton's kernels and of CUDA's."""
    lines = [
        "| computed, not measured | configuration | H100 ms | H200 ms | bound by | counted as a full product |",
        "|---|---|---|---|---|---|",
    ]
    for shape in shapes():
        record = _chosen(records, shape)
        times = {chip: floor(shape, chip)[0] for chip in PEAKS}
        rate = f"{shape.full / times['H100'] / 1e15:.2f} PFLOP/s on H100" if shape.full else ""
        lines.append(
            f"| {shape.name} | {record['config']} | {times['H100'] * 1e3:.3g} | {times['H200'] * 1e3:.3g} "
            f"| {floor(shape, 'H100')[1]} | {rate} |"
        )
    for shape in cuda_shapes():
        _chosen(cuda, shape, "sm_90a")
        times = {chip: floor(shape, chip)[0] for chip in PEAKS}
        lines.append(
            f"| {shape.name} | `{shape.variant}` | {times['H100'] * 1e3:.3g} | {times['H200'] * 1e3:.3g} | memory |  |"
        )
    lines += [
        "",
        "| computed, not measured: kernel on sm_90 | configuration | registers | shared bytes | blocks an SM "
        "| instructions a step | clocks of a step: tensor cores, schedulers |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record["arch"] != "sm_90" or not record["main_loop"]:
            continue
        cycles = step_cycles(record)
        lines.append(
            f"| {record['kernel']}, {record['variant']} | {record['config']} | {record['registers']} "
            f"| {record['shared_bytes']} | {occupancy(record)} | {record['loop_instructions']} "
            f"| {cycles[0]}, {cycles[1]} |"
        )
    return "\n".join([*lines, "", *_cuda_lines(cuda), "", *reasons()])


def _cuda_lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """What the compiler made of the CUDA kernels for Hopper; of regroup, what moves 16 bytes at a time."""
    from benchmarks.proof.cuda_code import vector_bytes

    yield (
        "| computed, not measured: kernel on sm_90a | registers | shared bytes | blocks an SM | instructions "
        "| 16-byte loads, stores |"
    )
    yield "|---|---|---|---|---|---|"
    for r in records:
        if r["arch"] == "sm_90a" and vector_bytes(r["variant"]) in (0, 16):
            yield (
                f"| `{r['variant']}` | {r['registers']} | {r['shared_bytes']} | {r['blocks_an_sm']} "
                f"| {r['instructions']} | {r['loads_16']}, {r['stores_16']} |"
            )


def reasons() -> Iterator[str]:
    """Every configuration listed, the one that is taken first, and why it is listed."""
    from mudsc_fast.backends.triton import configs

    yield "| use | chip | configurations, the first is taken | reason |"
    yield "|---|---|---|---|"
    for use, chips in configs.TABLES.items():
        for chip, found in sorted(chips.items()):
            for config in found:
                yield f"| {use} | sm_{chip} | {config.name} | {config.reason} |"


def main() -> None:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--write", type=Path, default=None)
    options = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (options.records, CUDA_RECORDS)]
    text = table(*found)
    if options.write is None:
        print(text)
    else:
        marked.write(options.write, {"roofline": text.strip()})


if __name__ == "__main__":
    main()
