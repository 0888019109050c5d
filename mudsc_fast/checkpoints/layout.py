"""What a checkpoint looks like before any weight is read: names, shapes, dtypes, headers and shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

# Only dtypes with one element in a whole number of bytes: packed 4- and 6-bit formats cannot be regrouped unit by unit.
# Looked up by name because the oldest torch that is supported lacks some of them.
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}

# The decimal units of the Hugging Face tools, so that "5GB" cuts the same shards here and there.
_SIZE_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """One output file: its name, its tensors in file order, its encoded header and its size in bytes."""

    filename: str
    offsets: dict[str, int]
    header: bytes
    nbytes: int


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes in a size such as ``"5GB"``, ``"500MB"`` or ``1000``; units are powers of 1000. what: named in errors.

    Raises ValueError for an unknown unit, a size that is not a number, or less than one byte.
    """
    text = str(size).strip().upper()
    unit = next((u for u in _SIZE_UNITS if text.endswith(u)), "")
    digits = text[: len(text) - len(unit)].strip()
    try:
        value = int(float(digits) * _SIZE_UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ValueError(f"{what}: expected a number of bytes or a size such as '5GB' or '500MB', got {size!r}")
    return value


def plan_shards(
    layout: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    max_shard_size: int | None,
    stem: str = "model",
) -> list[Shard]:
    """Cut a layout into files of at most ``max_shard_size`` bytes of tensors, in the layout's order.

    A tensor that is larger than the limit gets a file of its own; None makes one file. The cuts and names are those of
    ``huggingface_hub.split_torch_state_dict_into_shards``.
    Raises ValueError for a dtype or a name that safetensors cannot hold.
    """
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, info in layout.items():
        if info.dtype not in DTYPE_CODES:
            raise ValueError(f"{name}: expected a dtype that safetensors can hold, got {info.dtype}")
        if name == "__metadata__":
            raise ValueError("__metadata__: this name belongs to the safetensors header and cannot be a tensor's")
        if max_shard_size is not None and info.nbytes > max_shard_size:
            groups.append([name])
            continue
        if max_shard_size is not None and filled + info.nbytes > max_shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += info.nbytes
    if current or not groups:
        groups.append(current)
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [
        _encode_shard(filename, {n: layout[n] for n in group}, metadata)
        for filename, group in zip(names, groups, strict=True)
    ]


def encode_index(shards: Iterable[Shard], layout: Mapping[str, TensorInfo]) -> bytes:
    """The ``model.safetensors.index.json`` of several shards: total size and the file of each tensor."""
    weight_map = {name: shard.filename for shard in shards for name in shard.offsets}
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in layout.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _encode_shard(filename: str, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Shard:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    # Widest dtype first keeps every tensor aligned to its element without gaps, which the format forbids.
    for name in sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, n)):
        info = infos[name]
        end = position + info.nbytes
        header[name] = {
            "dtype": DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        offsets[name] = position
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    prefix = len(encoded).to_bytes(8, "little") + encoded
    return Shard(filename, {n: len(prefix) + o for n, o in offsets.items()}, prefix, len(prefix) + position)
