"""The machine code of every Triton kernel, for every configuration and chip, compiled without a GPU and read back.

python -m benchmarks.proof.triton_code [--quick] [--only NAME] prints one JSON list of records; PYTHONPATH chooses the
Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.proof.occupancy import SHARED_LIMIT, Use, blocks

CHIPS = (80, 90, 100)
KERNELS = Path("mudsc_fast/backends/triton")


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: what is compiled for which chip."""

    kernel: str
    variant: str
    chip: int
    config: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    unaligned: tuple[str, ...] = ()
    main_loop: bool = field(default=False)
    descriptors: bool = field(default=False)


def cases(quick: bool = False) -> Iterator[Case]:
    """Every kernel, configuration and chip; quick: one variant of each."""
    from mudsc_fast.backends.triton import configs

    for chip in CHIPS:
        for config in configs.listed("add", chip):
            for variant in ADD_VARIANTS[:1] if quick else ADD_VARIANTS:
                if variant.channels and not config.descriptors:
                    continue
                yield _add(config, chip, variant)
        for config in configs.listed("diagonal", chip):
            for near in DIAGONAL_VARIANTS[:1] if quick else DIAGONAL_VARIANTS:
                if config.descriptors or not near[2]:
                    yield _diagonal(config, chip, *near)
        for config in configs.listed("blend", chip):
            for blend in BLEND_VARIANTS[:1] if quick else BLEND_VARIANTS:
                yield _blend(config, chip, blend)
        for use in ("split", "split_across", "split_tables"):
            variants = SPLIT_VARIANTS if use != "split_tables" else (("table", 3),)
            for config in configs.listed(use, chip):
                for source, planes in variants[:1] if quick else variants:
                    yield _split(config, chip, use, source, planes)
        yield from _correlations(chip)
        yield from _lists(chip)


@dataclass(frozen=True)
class AddVariant:
    """Which inputs `add_kernel` is compiled for."""

    name: str
    dtype: str
    planes: int
    channels: bool = False


ADD_VARIANTS = (
    AddVariant("bf16", "bf16", 1),
    AddVariant("float32 in 3 planes", "bf16", 3),
    AddVariant("shifted in 2 planes", "bf16", 2),
    AddVariant("fp16", "fp16", 1),
    AddVariant("bf16 images", "bf16", 1, True),
)
# name, type, images, sums of both operands
DIAGONAL_VARIANTS = (
    ("bf16, both operands", "bf16", False, True),
    ("bf16", "bf16", False, False),
    ("fp16", "fp16", False, False),
    ("bf16 images, both operands", "bf16", True, True),
    ("bf16 images", "bf16", True, False),
)
# name, planes, and the constants that differ
BLEND_VARIANTS: tuple[tuple[str, int, dict[str, bool]], ...] = (
    ("full, 3 planes", 3, {"ACTIVATION": True, "PARTIAL": True, "TRIANGLE": True, "MIRROR": True}),
    ("cross, 1 plane", 1, {"ACTIVATION": True}),
    ("cross, 3 planes, last of several", 3, {"ACTIVATION": True, "PARTIAL": True}),
    ("largest, 3 planes", 3, {"ACTIVATION": True, "PARTIAL": True, "PRICES": True, "LARGEST": True}),
)
SPLIT_VARIANTS = (("bf16", 1), ("fp32", 3), ("bf16", 2), ("fp32", 0))


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _operands(config: Any, dtype: str, channels: bool) -> dict[str, str]:
    if not config.descriptors:
        return {"left": f"*{dtype}", "right": f"*{dtype}"}
    if channels:
        return {
            side: f"tensordesc<{dtype}[1, {n}, {config.depth}]>"
            for side, n in (("left", config.rows), ("right", config.columns))
        }
    return {
        side: f"tensordesc<{dtype}[{config.depth}, {n}]>"
        for side, n in (("left", config.rows), ("right", config.columns))
    }


def _shape(config: Any, planes: int) -> dict[str, Any]:
    from mudsc_fast.backends.triton import product

    return {
        "DESCRIPTORS": config.descriptors,
        "PRODUCTS": product.PRODUCTS[planes],
        "LEFT": product.LEFT_PLANES[planes],
        "RIGHT": product.RIGHT_PLANES[planes],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "STAGES": config.stages,
        "SLICES": config.slices,
    }


def _add(config: Any, chip: int, variant: AddVariant) -> Case:
    integers = (
        "tile_count splits chunk_steps steps samples image_steps plane_rows left_units right_units"
        " left_pitch right_pitch out_pitch"
        " first_row"
    )
    out = f"tensordesc<fp32[{config.rows}, {config.columns}]>" if config.add_descriptors else "*fp32"
    signature = {**_operands(config, variant.dtype, variant.channels), "out": out, "tiles": "*i32"}
    signature |= _integers(integers)
    constants = {
        "CHANNELS": variant.channels,
        "ADD_DESCRIPTORS": config.add_descriptors,
        "HELD": config.held,
        **_shape(config, variant.planes),
    }
    # What is not a multiple of 16 in general, so that nothing is proven for lucky sizes alone.
    odd = ("tile_count", "splits", "steps", "image_steps", "samples")
    return Case(
        "product.add_kernel", variant.name, chip, config.name, signature, constants, config.warps, config.stages, odd,
        True, config.descriptors,
    )  # fmt: skip


def _diagonal(config: Any, chip: int, name: str, dtype: str, channels: bool, both: bool) -> Case:
    signature = {**_operands(config, dtype, channels), "out": "*fp32", "partial": "*fp32", "tiles": "*i32"}
    signature |= _integers("tile_count splits chunk_steps steps samples image_steps units left_pitch right_pitch")
    constants = {
        "DESCRIPTORS": config.descriptors, "CHANNELS": channels, "BOTH": both, "BAND": 256, "SIDE": config.rows,
        "DEPTH": config.depth, "STAGES": config.stages, "SLICES": config.slices,
    }  # fmt: skip
    odd = ("tile_count", "splits", "steps", "image_steps", "samples")
    return Case(
        "diagonal.diagonal_kernel", name, chip, config.name, signature, constants, config.warps, config.stages, odd,
        True, config.descriptors,
    )  # fmt: skip


def _blend(config: Any, chip: int, variant: tuple[str, int, dict[str, bool]]) -> Case:
    name, planes, flags = variant
    signature = {**_operands(config, "bf16", False), "out": "*fp32", "partial": "*fp32", "tiles": "*i32"}
    signature |= _integers("tile_count first_step steps samples plane_rows left_units right_units")
    signature |= _integers("left_pitch right_pitch out_pitch")
    signature |= {"left_moments": "*fp32", "right_moments": "*fp32", "moments_pitch": "i32"}
    signature |= {"gram": "*fp32", "gram_pitch": "i32", "over_columns": "fp32", "over_count": "fp32", "balance": "fp32"}
    signature |= {"prices": "*fp32", "first_row": "i32", "mirrored": "*fp32"}
    constants = dict.fromkeys(("PARTIAL", "ACTIVATION", "TRIANGLE", "MIRROR", "PRICES", "LARGEST"), False)
    constants |= flags | _shape(config, planes)
    return Case(
        "product.blend_kernel", name, chip, config.name, signature, constants, config.warps, config.stages,
        ("tile_count", "first_step", "steps", "samples"), True, config.descriptors,
    )  # fmt: skip


def _split(config: Any, chip: int, use: str, source: str, planes: int) -> Case:
    tables = source == "table"
    dtype = "fp32" if tables else source
    plane = "bf16" if planes else "fp64"
    signature = {"x": f"*{dtype}", "shift": "*fp32", "scale": "*fp32", "planes": f"*{plane}", "partial": "*fp64"}
    offsets = "*i64" if tables else "*fp64"
    signature |= {"unit_at": offsets, "member_at": offsets, "members": offsets}
    signature |= {"factor": "*fp32" if tables else "*fp64"}
    signature |= _integers(
        "outer inner units outer_step inner_step unit_step plane_step pitch first_row group parts most"
    )
    # Triton makes an argument that is 1 a constant: units are adjacent, or samples are.
    one = "inner_step" if use == "split_across" else "unit_step"
    constants: dict[str, Any] = {
        "PLANES": planes, "TABLES": tables, "WALK": config.walk, "SAMPLES": config.samples,
        "UNITS": config.units, one: 1,
    }  # fmt: skip
    name = f"{source}, {planes} planes, {'samples' if use == 'split_across' else 'units'} adjacent"
    odd = ("outer", "inner", "first_row", "group", "parts", "most")
    return Case("split.split_kernel", name, chip, config.name, signature, constants, config.warps, 3, odd)


def _correlations(chip: int) -> Iterator[Case]:
    from mudsc_fast.backends.triton import correlation

    block = {"BLOCK": correlation.BLOCK}
    signature = {"gram": "*fp32", "out": "*fp32", "row_moments": "*fp32", "column_moments": "*fp32"}
    signature |= {"over_count": "fp32"}
    signature |= _integers("rows columns gram_pitch out_pitch row_pitch column_pitch")
    for triangle in (True, False):
        name = "triangle" if triangle else "rectangle"
        yield Case(
            "correlation.correlation_kernel", name, chip, "64x64w4", signature, {"TRIANGLE": triangle, **block}, 4, 3
        )
    square = {"square": "*fp32", "units": "i32", "pitch": "i32"}
    yield Case("correlation.mirror_kernel", "square", chip, "64x64w4", square, dict(block), 4, 3)


def _lists(chip: int) -> Iterator[Case]:
    from mudsc_fast.backends.triton import candidates

    block, warps = {"BLOCK": candidates.BLOCK}, candidates.WARPS
    config = f"{candidates.BLOCK}w{warps}"
    row = {"tile": "*fp32", "pitch": "i32", "n": "i32", "prices": "*fp64", "maxima": "*fp64"}
    last = {"first_row": "i32", "room": "i32"}
    odd = ("n", "first_row", "room")
    signature = {**row, "bad": "*i32", "found": "*i64", "overflow": "*i32", **last}
    for kept in (0, 16, 128):
        name = f"lists of up to {kept}" if kept else "largest alone"
        constants = {"LISTS": kept > 0, "KEPT": kept or 16, **block}
        yield Case("candidates.collect_kernel", name, chip, config, signature, constants, warps, 3, odd)
    signature = {**row, "found": "*i64", "overflow": "*i32", "columns": "*i32", "values": "*fp32", "threshold": "*fp64"}
    for kept in (16, 128):
        constants = {"KEPT": kept, **block}
        name = f"lists of up to {kept}"
        yield Case("candidates.order_kernel", name, chip, config, {**signature, **last}, constants, warps, 3, odd)


def record(case: Case) -> dict[str, Any]:
    """Compile one case and read its machine code."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"mudsc_fast.backends.triton.{module}"), name)
    order = kernel.arg_names
    signature = {arg: "constexpr" if arg in case.constants else case.signature[arg] for arg in order}
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, arg in enumerate(order)
        if (signature[arg].startswith("*") or signature[arg] == "i32") and arg not in case.unaligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    target = GPUTarget("cuda", case.chip, 32)
    made = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    found = read(made.asm["cubin"])
    return {
        "kernel": case.kernel,
        "variant": case.variant,
        "config": case.config,
        "source": str(KERNELS / f"{module}.py"),
        "arch": f"sm_{case.chip}",
        "triton": triton.__version__,
        "shared_bytes": made.metadata.shared,
        "main_loop": case.main_loop,
        "descriptors": case.descriptors,
        "warps": case.warps,
        **found,
    }


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and the instructions of the innermost loop around the tensor cores, from machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [_tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = [
        (int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+;)", listing)
    ]  # fmt: skip
    texts = [text for _, text in lines]
    return {
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],
        "local_accesses": _count(texts, "STL", "LDL"),
        "wgmma": _count(texts, "HGMMA"),
        "mma": _count(texts, "HMMA", "UTCHMMA", "UTCQMMA"),
        "tma": _count(texts, "UTMALDG"),
        "transposed": sum("HGMMA" in text and "tnspA.tnspB" in text for text in texts),
        "instructions": len(texts),
        **_loop(lines),
    }


def _count(texts: list[str], *names: str) -> int:
    return sum(bool(re.search(rf"(^|\s){name}\b", text)) for text in texts for name in names)


def _loop(lines: list[tuple[int, str]]) -> dict[str, int]:
    """The shortest loop (a branch backwards) that has matrix instructions in it."""
    best: list[str] = []
    for k, (at, text) in enumerate(lines):
        target = re.search(r"BRA(?:\.\w+)*.*?\b0x([0-9a-f]+)", text)
        if target is None or int(target.group(1), 16) > at:
            continue
        body = [t for a, t in lines[: k + 1] if a >= int(target.group(1), 16)]
        if any(re.search(r"HGMMA|HMMA|UTC\w*MMA", t) for t in body) and (not best or len(body) < len(best)):
            best = body
    return {
        "loop_instructions": len(best),
        "loop_mma": sum(bool(re.search(r"HGMMA|HMMA|UTC\w*MMA", t)) for t in best),
        "loop_tma": _count(best, "UTMALDG"),
        "loop_local": _count(best, "STL", "LDL"),
    }


def records(quick: bool = False, only: str = "", workers: int = 2) -> list[dict[str, Any]]:
    """One record for every case whose kernel or variant has `only` in it."""
    chosen = [case for case in cases(quick) if only in f"{case.kernel} {case.variant} {case.config} sm_{case.chip}"]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(record, chosen))


def faults(found: dict[str, Any]) -> list[str]:
    """What a record shows that must not be."""
    chip = int(found["arch"].removeprefix("sm_"))
    said = []
    if found["spills"] or found["local_accesses"]:
        said.append(f"{found['spills']} bytes of local memory, {found['local_accesses']} accesses to it")
    if found["shared_bytes"] > SHARED_LIMIT[chip]:
        said.append(f"{found['shared_bytes']} bytes of shared memory, a block may have {SHARED_LIMIT[chip]}")
    if not blocks(Use(32 * found["warps"], found["registers"], 0), chip):
        said.append(f"{found['registers']} registers for {found['warps']} warps do not fit an SM")
    if found["main_loop"]:
        if not found["loop_mma"]:
            said.append("no matrix instructions in a loop")
        if chip == 90 and found["descriptors"]:
            if not found["wgmma"] or (found["transposed"] < found["wgmma"] and "images" not in found["variant"]):
                said.append(f"{found['transposed']} of {found['wgmma']} wgmma take both operands transposed")
            if not found["loop_tma"]:
                said.append("no bulk tensor loads in the main loop")
    return said


def main() -> None:
    """Print the records as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print(json.dumps(records(options.quick, options.only), indent=1))


if __name__ == "__main__":
    main()
