"""zip_units against the official algorithm, re-stated plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core

from . import refusal, second_core
from .harness import OURS, Contender, Row
from .peers import official_zip

# Of 4096 merges. Each searches 8192 x 8192 entries and cuts a row and a column out of them, so all would take hours.
MERGES_TIMED = 10
# Up to this size similarities are made exactly symmetric; larger ones, which no other contender reads, are so up to
# rounding, and the kernel mirrors them.
LARGEST_MIRRORED = 4096


def related_similarity(d: int, seed: int = 0, samples: int = 256, noise: float = 0.5) -> Tensor:
    """(2 d, 2 d) float32 correlation of two noisy, differently ordered copies of the same features."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, d, generator=generator)
    parts = []
    for _ in range(2):
        part = shared[:, torch.randperm(d, generator=generator)] + noise * torch.randn(samples, d, generator=generator)
        part -= part.mean(0)
        parts.append(part / part.norm(dim=0))
    stacked = torch.cat(parts, dim=1)
    similarity = stacked.T @ stacked
    if d > LARGEST_MIRRORED:
        return similarity
    return torch.triu(similarity) + torch.triu(similarity, 1).T


def _by_first_member(labels: Tensor) -> Tensor:
    """The same grouping with its groups numbered by their first member."""
    _, groups = labels.flatten().unique(return_inverse=True)
    first = torch.full((int(groups.max()) + 1,), groups.numel()).scatter_reduce(
        0, groups, torch.arange(groups.numel()), "amin"
    )
    return first[groups]


def prepared(d: int, blocks: int) -> Callable[[], Any]:
    """One call, for the second core's processes."""
    similarity = related_similarity(d)
    return lambda: mf.zip_units(similarity, blocks=blocks)


def _row(
    d: int,
    blocks: int,
    against_official: bool,
    target: float | None,
    at_most: float | None = None,
    merges: int | None = None,
    isa: str | None = None,
) -> Row:
    """``merges``: the official algorithm is stopped after so many of its merges, ours makes all of them."""
    official = "official algorithm" if merges is None else f"official algorithm, first {merges} merges"
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        similarity = related_similarity(d)
        held["similarity"] = similarity

        def ours() -> Any:
            _core.use_isa(isa)
            zipped = mf.zip_units(similarity, blocks=blocks)
            _core.use_isa(None)
            return zipped

        found = [Contender(OURS, ours)]
        if against_official:
            pairing = None
            if blocks > 1:
                partners = mf.assign_blocks(similarity[:d, d:], blocks).block_indices
                pairing = torch.stack([torch.arange(blocks), torch.as_tensor(partners)])
            run = lambda: official_zip(similarity, d, pairing=pairing, most_merges=merges)  # noqa: E731
            found.append(Contender(official, run))
        return found

    def error(name: str, result: Any) -> float:
        """Share of units grouped unlike ours; ours alone: 1 unless every merged unit has a member."""
        if name == OURS:
            held["ours"] = _by_first_member(result.labels)
            return 0.0 if int(result.sizes.min()) > 0 and int(result.sizes.sum()) == 2 * d else 1.0
        if merges is not None:
            return 0.0  # unfinished: nothing to compare; the smaller rows do
        return float((held["ours"] != _by_first_member(result)).double().mean())

    case = ("one block" if blocks == 1 else f"{blocks} blocks") + (f", {isa}" if isa else "")
    return Row(
        "zip",
        case,
        d,
        contenders,
        error,
        0.0,
        target=target,
        against=official,
        at_most=at_most,
        memory_at_most=1.2 * (2 * d) ** 2 * 4 / 2**20 + 4,  # MiB; 1.2 times the similarity, and lists of units
        rounds=5,
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    yield _row(768, 12, True, 300.0)
    if quick:
        yield _row(512, 1, True, None)
        for d in (1024, 2048, 4096):
            yield _row(d, 1, False, None)
        return
    yield _row(512, 1, True, None)
    yield _row(1024, 1, True, 500.0)
    for d in (2048, 4096, 8192):
        yield _row(d, 1, False, None)
    yield _row(14336, 1, False, None, at_most=10.0)
    yield _row(1024, 32, True, 300.0, merges=8 * MERGES_TIMED)
    yield _row(2048, 32, False, None)
    yield _row(4096, 32, True, 300.0, merges=MERGES_TIMED)
    for d in (512, 1024, 2048, 4096):
        yield refusal.row("zip", "one block", d, partial(related_similarity, d))
    for isa in _core.build_info()["isas_usable"][:-1]:
        yield _row(2048, 1, False, None, isa=isa)
    yield second_core.row("zip", "one block", 4096, prepared, (4096, 1), rounds=3)
    yield second_core.row("zip", "32 blocks", 4096, prepared, (4096, 32), rounds=3)
