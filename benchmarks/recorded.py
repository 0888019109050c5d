"""Assignments as a match meets them: two networks are trained, and what each visit of a space solves is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast import assignment, rematch


@dataclass(frozen=True)
class Visit:
    """One assignment of a match: the similarity, and the duals that the last one of the same space gave."""

    similarity: Tensor
    duals: tuple[Tensor, Tensor] | None


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 64) and classes (n,): scikit-learn's digits, or clusters in their place where it is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        classes = torch.arange(1797) % 10
        centres = torch.randn(10, 64, generator=generator)
        return centres[classes] + 0.7 * torch.randn(1797, 64, generator=generator), classes
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target, dtype=torch.int64)


def trained(width: int, layers: int, seed: int, epochs: int = 8) -> nn.Sequential:
    """A multi-layer perceptron after a few epochs on the digits: not a good network, but no longer a random one."""
    torch.manual_seed(seed)
    images, classes = digits()
    parts: list[nn.Module] = []
    for k in range(layers):
        parts += [nn.Linear(64 if k == 0 else width, width), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 * (256 / width) ** 0.5)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images)), 128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
    return model.eval()


@contextmanager
def _recording() -> Iterator[list[Visit]]:
    """The assignments that matches make meanwhile."""
    visits: list[Visit] = []
    solve = assignment.assign

    def recorder(similarity: Tensor, duals: tuple[Tensor, Tensor] | None = None, **options: Any) -> mf.Assignment:
        kept = None if duals is None else (duals[0].clone(), duals[1].clone())
        visits.append(Visit(similarity.clone(), kept))
        return solve(similarity, duals=duals, **options)

    setattr(rematch, "assign", recorder)  # noqa: B010 - a name that the module only imports
    try:
        yield visits
    finally:
        setattr(rematch, "assign", solve)  # noqa: B010


def visits(width: int, layers: int = 3, seed: int = 0) -> list[Visit]:
    """What an alignment of two trained networks solves, visit after visit; no duals: the first of its space."""
    networks = [trained(width, layers, 2 * seed + k) for k in range(2)]
    # Mappings of another type than dict take the way on which a visit's assignment is a call that can be recorded.
    states = [MappingProxyType(network.state_dict()) for network in networks]
    spec = mf.spec_for(networks[0])
    with torch.no_grad():
        stats = mf.calibrate(networks, torch.split(digits()[0], 256), spec, scope="cross")
    with _recording() as found:
        mf.match(states, spec, activations=stats, progress=False)
    return found
