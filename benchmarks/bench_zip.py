"""zip_units against the official algorithm, re-stated plainly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf

from .harness import OURS, Contender, Row
from .peers import official_zip


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
    return torch.triu(similarity) + torch.triu(similarity, 1).T


def _by_first_member(labels: Tensor) -> Tensor:
    """The same grouping with its groups numbered by their first member."""
    _, groups = labels.flatten().unique(return_inverse=True)
    first = torch.full((int(groups.max()) + 1,), groups.numel()).scatter_reduce(
        0, groups, torch.arange(groups.numel()), "amin"
    )
    return first[groups]


def _row(d: int, blocks: int, against_official: bool, target: float | None, at_most: float | None = None) -> Row:
    held: dict[str, Tensor] = {}

    def contenders() -> list[Contender]:
        similarity = related_similarity(d)
        held["similarity"] = similarity
        found = [Contender(OURS, lambda: mf.zip_units(similarity, blocks=blocks))]
        if against_official:
            pairing = None
            if blocks > 1:
                partners = mf.assign_blocks(similarity[:d, d:], blocks).block_indices
                pairing = torch.stack([torch.arange(blocks), torch.as_tensor(partners)])
            found.append(Contender("official algorithm", lambda: official_zip(similarity, d, pairing=pairing)))
        return found

    def error(name: str, result: Any) -> float:
        """Share of units grouped unlike ours; ours alone: 1 unless every merged unit has a member."""
        if name == OURS:
            held["ours"] = _by_first_member(result.labels)
            return 0.0 if int(result.sizes.min()) > 0 and int(result.sizes.sum()) == 2 * d else 1.0
        return float((held["ours"] != _by_first_member(result)).double().mean())

    case = "one block" if blocks == 1 else f"{blocks} blocks"
    return Row(
        "zip", case, d, contenders, error, 0.0, target=target, against="official algorithm", at_most=at_most, rounds=5
    )


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the suite."""
    yield _row(512, 1, True, None)
    if not quick:
        yield _row(1024, 1, True, 500.0)
    for d in (1024, 2048, 4096) if quick else (2048, 4096, 8192):
        yield _row(d, 1, False, None)
    if not quick:
        yield _row(14336, 1, False, None, at_most=10.0)
    yield _row(768, 12, True, 300.0)
