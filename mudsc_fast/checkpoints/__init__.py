"""Checkpoints: lazily read safetensors in, safetensors files or sharded folders out."""

from __future__ import annotations

from .layout import TensorInfo, parse_size
from .reading import Checkpoint, open_checkpoint
from .stacked import StackedCheckpoint
from .writing import CheckpointWriter, cast_layout, check_output, layout_of, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "StackedCheckpoint",
    "TensorInfo",
    "cast_layout",
    "check_output",
    "layout_of",
    "open_checkpoint",
    "parse_size",
    "save_checkpoint",
]
