"""Repairs of a merged net, without labels or training: rescaling, decoding, and the closed-form refit."""

from mudsc_fast.repairs.decoding import calibrate_readers, decode
from mudsc_fast.repairs.refitting import refit
from mudsc_fast.repairs.rescaling import repair

__all__ = ["calibrate_readers", "decode", "refit", "repair"]
