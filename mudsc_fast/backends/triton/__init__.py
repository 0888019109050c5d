"""Triton kernels for CUDA tensors: one function an op, as in ``backends.cpu``. Nothing here is imported before it is
picked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mudsc_fast.backends.triton.candidates import assign_tile
from mudsc_fast.backends.triton.covariance_sums import TritonCovariance, add_to
from mudsc_fast.backends.triton.similarity_tiles import Similarities, similarity

__all__ = ["Similarities", "TritonCovariance", "add_to", "assign_tile", "covariance", "similarity"]

if TYPE_CHECKING:
    import torch


def covariance(width: int, models: int, cross: bool, device: torch.device) -> TritonCovariance:
    """Make the empty accumulators of a ``mudsc_fast.Covariance``."""
    return TritonCovariance(width, models, cross, device)
