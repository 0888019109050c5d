"""The ops and the pipeline in plain float64, slow and meant to be read beside docs/method.md.

Nothing here imports the rest of the package. Specs are read by their attributes alone.
"""

from .assignment import Assignment, assign, assign_blocks
from .calibration import ActivationStats, calibrate
from .covariance import Covariance
from .matching import match
from .merging import MergePlan
from .models import merge_models, reset_batchnorm
from .regroup import regroup
from .similarity import Term, dual_similarity, weight_similarity
from .zipping import Zip, zip_units

__all__ = [
    "ActivationStats",
    "Assignment",
    "Covariance",
    "MergePlan",
    "Term",
    "Zip",
    "assign",
    "assign_blocks",
    "calibrate",
    "dual_similarity",
    "match",
    "merge_models",
    "regroup",
    "reset_batchnorm",
    "weight_similarity",
    "zip_units",
]
