"""Looking at merges: loss landscapes and reports. Nothing here takes part in a merge."""

from mudsc_fast.evaluation.landscape import Landscape, Path1D, landscape, loss_path

__all__ = ["Landscape", "Path1D", "landscape", "loss_path"]
