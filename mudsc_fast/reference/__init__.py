"""The ops and the pipeline in plain float64, slow and meant to be read beside docs/method.md.

Nothing here imports the rest of the package. Specs are read by their attributes alone.
"""

from .assignment import Assignment, assign, assign_blocks
from .covariance import Covariance
from .regroup import regroup
from .similarity import Term, dual_similarity, weight_similarity
from .zipping import Zip, zip_units

__all__ = [
    "Assignment",
    "Covariance",
    "Term",
    "Zip",
    "assign",
    "assign_blocks",
    "dual_similarity",
    "regroup",
    "weight_similarity",
    "zip_units",
]
