"""zip_units against the official algorithm, re-stated plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from benchmarks.harness import OURS, Contender, Row
from benchmarks.peers import official_zip


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


def _row(d: int, blocks: int, against_official: bool, target: float | None, at_most: float | None = None) -> Row:
    made: dict[str, Any] = {}

    def contenders() -> list[Contender]:
        similarity = related_similarity(d)
        made["labels"] = None
        found = [Contender(OURS, lambda: mf.zip_units(similarity, blocks=blocks).labels)]
        if against_official:
            pairing = mf.zip_units(similarity, blocks=blocks) if blocks > 1 else None
            made["pairing"] = pairing
            found.append(Contender("official algorithm", _official(similarity, d, blocks)))
        return found

    def error(name: str, labels: Tensor) -> float:
        """Share of units whose label differs from the first contender's; the same greedy rule must give the same."""
        if made["labels"] is None:
            made["labels"] = labels
            valid = bool((labels.flatten().bincount(minlength=d) > 0).all())
            return 0.0 if valid else 1.0
        return float((made["labels"] != labels).double().mean())

    case = "one block" if blocks == 1 else f"{blocks} blocks"
    return Row(
        "zip", case, d, contenders, error, 0.0, target=target, against="official algorithm", at_most=at_most, rounds=5
    )


def _official(similarity: Tensor, d: int, blocks: int) -> Callable[[], Tensor]:
    if blocks == 1:
        return lambda: official_zip(similarity, d)

    def in_blocks() -> Tensor:
        size = d // blocks
        pairs = mf.assign_blocks(similarity[:d, d:], blocks).block_indices
        labels = torch.empty(2, d, dtype=torch.int64)
        for b in range(blocks):
            own = torch.arange(b * size, (b + 1) * size)
            other = int(pairs[b]) * size + torch.arange(size)
            union = torch.cat([own, d + other])
            part = official_zip(similarity[union][:, union], size) + b * size
            labels[0, own], labels[1, other] = part[0], part[1]
        return labels

    return in_blocks


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
