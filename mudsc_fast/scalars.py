"""Checks of single numbers among the arguments of a public function. Those of numpy are numbers too."""

from __future__ import annotations

from numbers import Integral, Real

from torch import Tensor


def integer(value: object) -> int | None:
    """The value as an int if it is an integer, numpy's included; None for anything else, bools included."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def check_dim(name: str, dim: object) -> int:
    """The dim as an int; TypeError, naming the argument, unless an integer."""
    found = integer(dim)
    if found is None:
        raise TypeError(f"{name}: expected an integer, got {dim!r}")
    return found


def check_number(name: str, value: object) -> float:
    """The value as a float; TypeError, naming the argument, unless a real number, numpy's or torch's."""
    if isinstance(value, bool) or not (isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_seed(seed: object) -> int:
    """The seed as an int; TypeError unless an integer, ValueError unless torch takes it."""
    found = integer(seed)
    if found is None:
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not -(2**63) <= found < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
    return found
