"""How the kernels are cut: tile sizes, warps and stages for each use and chip, with the reason beside each.

Nothing here was chosen by a clock: the reasons are counts read from machine code (docs/gpu.md). The first of a list is
taken until a results file of ``make gpu`` names another (``update``).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Written by `update` from a results file; absent until a GPU was measured.
TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class ProductConfig:
    """A product X^T Y of two sets of units over samples.

    rows, columns: units a tile. depth: samples a step. held: chunks that are added up in registers before memory.
    chunk: samples that tensor cores add up before the sum is
    rounded to nearest outside of them. group: tile rows that are walked together, so that their operands stay in the L2
    cache.
    descriptors: operands come by bulk tensor loads. add_descriptors: tiles are added by bulk tensor reductions.
    slices: parts of a tile's columns that its end handles one after another.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool
    reason: str
    add_descriptors: bool = False
    slices: int = 1
    held: int = 1
    chunk: int = 1024
    group: int = 8

    def __post_init__(self) -> None:
        if self.chunk % self.depth or min(self.rows, self.columns, self.depth) < 16:
            raise ValueError(f"chunk: expected a multiple of depth {self.depth}, tiles of at least 16, got {self}")

    @property
    def name(self) -> str:
        """What a results file calls it."""
        shape = f"{self.rows}x{self.columns}x{self.depth}w{self.warps}s{self.stages}c{self.chunk}g{self.group}"
        flags = ("descriptors" if self.descriptors else "pointers", "added" * self.add_descriptors)
        return "-".join(filter(None, (shape, f"p{self.slices}h{self.held}", *flags)))


@dataclass(frozen=True)
class SplitConfig:
    """A pass over the input: samples and units a block, samples a program walks over, warps."""

    samples: int
    units: int
    walk: int
    warps: int
    reason: str

    @property
    def name(self) -> str:
        """What a results file calls it."""
        return f"{self.samples}x{self.units}walk{self.walk}w{self.warps}"


Config = ProductConfig | SplitConfig

# Chips by compute capability: 100 is looked up as itself, anything else as the nearest one below.
_ADD: dict[int, tuple[ProductConfig, ...]] = {
    80: (
        ProductConfig(128, 128, 32, 8, 4, False, "32 mma in a loop of 152: the fewest a product here", slices=4),
        ProductConfig(128, 64, 32, 8, 4, False, "twice as many tiles, for narrow spaces"),
    ),
    90: (
        ProductConfig(128, 256, 64, 8, 4, True, "48 B of loads a clock and SM; 128 x 128 needs 64, the L2 cache's all"),
        ProductConfig(128, 128, 64, 8, 4, True, "128 to 139 registers instead of 242 to 252, twice as many tiles"),
        ProductConfig(128, 128, 64, 8, 4, True, "90 to 96 registers: tiles leave by bulk reduction, not atomics", True),
        ProductConfig(
            128, 128, 64, 8, 4, True, "16 chunks in registers: memory sees a sixteenth of the sums", slices=4, held=16
        ),
        ProductConfig(128, 128, 64, 4, 3, True, "two blocks an SM: one adds while the other multiplies"),
    ),
    100: (
        ProductConfig(128, 256, 64, 8, 4, True, "the product lies in tensor memory: 122 to 124 registers", slices=4),
        ProductConfig(128, 128, 64, 8, 4, True, "twice as many tiles, for narrow spaces"),
    ),
}
_BLEND: dict[int, tuple[ProductConfig, ...]] = {
    80: (ProductConfig(128, 128, 32, 8, 4, False, "as for sums; quarters spill 48 bytes with Triton 3.6", slices=8),),
    90: (
        ProductConfig(128, 128, 64, 8, 4, True, "whole tiles spill 216 bytes, halves 16, quarters none", slices=4),
        ProductConfig(
            128, 128, 64, 8, 3, True, "96 KiB of shared memory: two blocks an SM where registers allow", slices=4
        ),
    ),
    100: (ProductConfig(128, 128, 64, 8, 4, True, "whole tiles spill 416 bytes, quarters none", slices=4),),
}
# Beside its product a tile keeps two sums, or four, of each place of a step's block: half the depth of other tiles.
_DIAGONAL: dict[int, tuple[ProductConfig, ...]] = {
    80: (ProductConfig(64, 64, 32, 8, 4, False, "128 x 128 spills 16 bytes beside its sums, with Triton 3.9"),),
    90: (ProductConfig(128, 128, 32, 8, 4, True, "sums of both operands fit; 64 deep they spill 8 bytes"),),
    100: (ProductConfig(128, 128, 32, 8, 4, True, "as on sm_90; 64 deep they spill 120 bytes", slices=4),),
}
_SPLIT: dict[int, tuple[SplitConfig, ...]] = {
    80: (SplitConfig(16, 64, 1024, 8, "4 entries a thread, 16 B of float32; 8 would spill 8 bytes, 16 up to 32"),),
}
_SPLIT_ACROSS: dict[int, tuple[SplitConfig, ...]] = {
    80: (
        SplitConfig(32, 64, 1024, 8, "samples are adjacent in the input, units in the planes: sectors of 64 and 128 B"),
    ),
}
_SPLIT_TABLES: dict[int, tuple[SplitConfig, ...]] = {
    80: (SplitConfig(16, 128, 1024, 8, "64-bit offsets of 16 entries a thread spill 120 bytes, of 8 none"),),
}
TABLES: dict[str, dict[int, tuple[Config, ...]]] = {
    "add": {chip: tuple(found) for chip, found in _ADD.items()},
    "blend": {chip: tuple(found) for chip, found in _BLEND.items()},
    "diagonal": {chip: tuple(found) for chip, found in _DIAGONAL.items()},
    "split": {chip: tuple(found) for chip, found in _SPLIT.items()},
    "split_across": {chip: tuple(found) for chip, found in _SPLIT_ACROSS.items()},
    "split_tables": {chip: tuple(found) for chip, found in _SPLIT_TABLES.items()},
}


def chip_of(capability: tuple[int, int]) -> int:
    """80, 90 or 100: whose configurations a GPU of this compute capability takes."""
    number = capability[0] * 10 + capability[1]
    if 100 <= number < 120:
        return 100  # consumer Blackwell (120) has no tensor memory and is treated as 80
    return 90 if number == 90 else 80


def listed(use: str, chip: int) -> tuple[Config, ...]:
    """The configurations of a use on a chip, best first as far as is known."""
    table = TABLES[use]
    return table.get(chip) or table[80]


def product_config(use: str, capability: tuple[int, int]) -> ProductConfig:
    """How to cut a product: use "add", "blend" or "diagonal"."""
    found = _chosen(use, capability)
    if not isinstance(found, ProductConfig):
        raise ValueError(f'use: expected "add", "blend" or "diagonal", got {use!r}')
    return found


def split_config(use: str, capability: tuple[int, int]) -> SplitConfig:
    """How to cut a pass over the input: use "split", "split_across" or "split_tables"."""
    found = _chosen(use, capability)
    if not isinstance(found, SplitConfig):
        raise ValueError(f'use: expected "split" or "split_across", got {use!r}')
    return found


def _chosen(use: str, capability: tuple[int, int]) -> Config:
    """The tuned configuration where a results file named it, else the first listed."""
    chip = chip_of(capability)
    found = listed(use, chip)
    name = _tuned().get(use, {}).get(str(chip))
    return next((config for config in found if config.name == name), found[0])


@cache
def _tuned() -> dict[str, dict[str, str]]:
    path = Path(os.environ.get("MUDSC_FAST_TUNED", TUNED))
    if not path.is_file():
        return {}
    read: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return read


def update(results: Path, into: Path = TUNED) -> dict[str, dict[str, str]]:
    """Take over the winners of a results file, whose entry "tuned" is {use: {chip: name of a configuration}}.

    Raises:
        ValueError: no such entry, or a use, chip or configuration that is not in the tables.
    """
    tuned = json.loads(results.read_text(encoding="utf-8")).get("tuned")
    if not isinstance(tuned, dict):
        raise ValueError(f'results: expected an entry "tuned" in {results}, got {type(tuned).__name__}')
    for use, chips in tuned.items():
        for chip, name in chips.items():
            known = [config.name for config in listed(use, int(chip))] if use in TABLES else []
            if name not in known:
                raise ValueError(f"results: expected a configuration of {use!r} on {chip} ({known}), got {name!r}")
    kept = into.with_suffix(".part")
    kept.write_text(json.dumps(tuned, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    kept.replace(into)
    _tuned.cache_clear()
    return tuned
