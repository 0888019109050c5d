"""Merging of trained networks without training (MuDSC, arXiv 2403.01753), on compiled kernels.

Everything public is listed here and imported when first used, so that ``import mudsc_fast`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "covariance": ("Covariance",),
    "similarity": ("Term", "weight_similarity", "dual_similarity"),
    "assignment": ("Assignment", "assign", "assign_blocks"),
    "tiles": ("MatrixTiles", "SimilarityTiles", "Tiles"),
    "tiled_assignment": ("assign_tiled",),
    "zipping": ("Zip", "zip_units"),
    "regrouping": ("regroup",),
    "spaces": ("Axis", "Space", "Tap"),
    "spec": ("PermutationSpec",),
    "specs": ("spec_for",),
    "calibration": ("ActivationStats", "calibrate"),
    "matching": ("match",),
    "plan": ("MergePlan",),
    "batchnorm": ("reset_batchnorm",),
    "merging": ("merge_models",),
    "experts": ("Experts",),
    "expert_merging": ("ExpertMatch", "align_experts", "merge_experts"),
    "best": ("Best", "merge_best"),
    "searching": ("BalanceSearch", "search_balance"),
    "agreeing": ("agreement",),
    "installing": ("installed",),
    "rotations": ("Rotations", "align_rotations"),
    "elastic": ("elastic_widths",),
    "counts": ("merged_parameters",),
    "resizing": ("resizable_spaces",),
    "moments": ("Moments",),
    "selection": ("Selection", "select_units"),
    "partial": ("merge_partially", "shared_spec"),
    "repairs": ("calibrate_readers", "decode", "refit", "repair"),
    "build": ("build_config",),
}
_WHERE = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = ("reference", "specs", "backends", "library")

__all__ = [*sorted(_WHERE), "__version__", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("mudsc_fast._core").__version__
    elif name in _WHERE:
        value = getattr(importlib.import_module(f"mudsc_fast.{_WHERE[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"mudsc_fast.{name}")
    else:
        raise AttributeError(f"module 'mudsc_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    __version__: str
