"""All cases of the Triton kernels in their interpreter.

Cases are functions of a seed that return the largest error against the float64 reference; what is tolerated stands
beside them. The tests run them with seed 0, `make prove` with the seed it is given, and mutants of the kernels must
fail them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import interpreted_covariances as covariances
import interpreted_lists as lists
import interpreted_setup as setup
import interpreted_similarities as similarities
from interpreted_setup import BLENDED, DTYPES, RAW, Case, Error, cut_as

from mudsc_fast.backends.triton import configs
from mudsc_fast.backends.triton.configs import ProductConfig


def _config(use: str, config: ProductConfig, dtype: str) -> Error:
    """One past each tile: a unit, a step and a chunk."""

    def error(seed: int) -> float:
        width, samples = max(config.rows, config.columns) + 1, config.depth + 3
        if use == "diagonal":
            width += config.columns  # one past a square of four tiles
            batch = [x.to(DTYPES[dtype]) for x in setup.features(samples, width, 2, 0.0, seed)]
            cut = replace(config, columns=2 * config.columns)  # two tiles of the triangle a square
            return covariances.covariance_error([batch], "cross", config=cut, near=config, raw=True)
        if use == "add":
            batch = [x.to(DTYPES[dtype]) for x in setup.features(samples, width, 2, 0.0, seed)]
            return covariances.covariance_error([batch], "cross", config=config)
        with cut_as(config):
            weights = [w.to(DTYPES[dtype]) for w in setup.matrices(width, samples, 2, seed)]
            return similarities.similarity_error([weights], "full")

    return error


def _one_past_each_tile() -> Iterator[Case]:
    for use in ("add", "blend", "diagonal"):
        seen = set()
        for chip in configs.TABLES[use].values():
            for config in chip:
                if isinstance(config, ProductConfig) and config.name not in seen:
                    seen.add(config.name)
                    kernels = BLENDED if use == "blend" else RAW
                    yield Case(f"{use}, one past each tile of {config.name}", kernels, _config(use, config, "bfloat16"))


CASES = (*covariances.cases(), *_one_past_each_tile(), *similarities.cases(), *lists.cases())
