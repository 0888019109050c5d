"""The computed floors: the arithmetic, and that the document shows what the records give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import roofline

DOCUMENT = roofline.ROOT / "docs" / "gpu.md"


def records() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(roofline.RECORDS.read_text(encoding="utf-8"))
    return found


def test_the_document_shows_what_the_records_give() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.split(roofline.BEGIN)[1].split(roofline.END)[0].strip()
    assert shown == roofline.table(records()).strip(), "python -m benchmarks.roofline --write docs/gpu.md"
    assert shown.count("computed, not measured") == 2


def test_floors_by_hand() -> None:
    shape = roofline.Shape("x", "product.add_kernel", "bf16", 798e12 * 0.018, 1e9)
    assert roofline.floor(shape, "H100") == (pytest.approx(0.018), "tensor cores")
    shape = roofline.Shape("x", "split.split_kernel", "bf16", 0.0, 4.3e9)
    assert roofline.floor(shape, "H200") == (pytest.approx(1e-3), "memory")
    # 2 x 8192 units: one triangle of 16384 and what its diagonal tiles have too much, half of a full product and 1 %.
    wide = next(s for s in roofline.shapes() if s.name.startswith("covariance, bf16, 2 x 8192"))
    assert 0.5 < wide.operations / wide.full < 0.51
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


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    roofline.write(path, "new")
    assert path.read_text() == f"before\n{roofline.BEGIN}\nnew\n{roofline.END}\nafter\n"
    assert [p.name for p in tmp_path.iterdir()] == ["document.md"]


def test_a_variant_without_a_record_is_named() -> None:
    with pytest.raises(ValueError, match=r"records: none of product\.add_kernel"):
        roofline.table([])
