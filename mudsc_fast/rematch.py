"""Matching one space, or the spaces of one tie, with the others' labels as they stand (docs/method.md rules 2 to 7)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast.assignment import Assignment, assign, assign_blocks, match_block_rows
from mudsc_fast.axes import columns, rows, split_blocks
from mudsc_fast.covariance import Covariance
from mudsc_fast.distributed import World
from mudsc_fast.moments import joint_covariance
from mudsc_fast.network import Network
from mudsc_fast.selection import select_blocks, select_units
from mudsc_fast.similarity import Term, dual_similarity
from mudsc_fast.streaming import UnitTiles, streamed_similarity
from mudsc_fast.tiled_assignment import UNPROVEN, assign_tiled
from mudsc_fast.tiled_zip import PAIR_BYTES, zip_tiled
from mudsc_fast.tiles import SimilarityTiles, Tiles
from mudsc_fast.weights import Weights
from mudsc_fast.wide_statistics import BlendedTiles, StatisticsTiles, sums_of
from mudsc_fast.workplan import WorkPlan
from mudsc_fast.zipping import unions_of, zip_units

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec


_PIECE = 2**28  # bytes of rows read at once, where no plan of work says another number


@dataclass(frozen=True)
class Match:
    """The match of one space: labels (models, width) int64 on the CPU, its value, leaders where units are selected."""

    labels: Tensor
    value: float
    leaders: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of merged units."""
        return int(self.labels.max()) + 1


@dataclass
class Matcher:
    """All that a match of any space needs, apart from the labels.

    weights: None at balance 0. activations: by space; may be empty. widths: merged width of every space that is zipped.
    work: how each space is compared; None: all its tensors at once. duals: of each space's last assignment.
    together: spaces whose tensors are added up by all processes of `world`, which then visit them at the same time.
    network: makes a visit in one call where it can; None: every visit the plain way.
    whole_blocks: a selection takes blocks from one model each, where the width stays.
    """

    spec: PermutationSpec
    models: int
    method: str
    weights: Weights | None
    activations: Mapping[str, Covariance]
    balance: float
    widths: Mapping[str, int]
    attenuation: float
    budget: float
    device: torch.device | None
    work: WorkPlan | None = None
    duals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    together: frozenset[str] = frozenset()
    world: World | None = None
    network: Network | None = None
    whole_blocks: bool = False

    def rematch(
        self,
        tie: Sequence[Space],
        current: Mapping[str, Match],
        balance: float | None = None,
        tried: bool = False,
    ) -> list[Match]:
        """The spaces of one tie matched anew, against the current matches; spaces not in `current` count raw.

        tried: `rematch_many` left this tie to the plain way.
        """
        balance = self.balance if balance is None else balance
        if not tried and not any(space.name in self.together for space in tie):
            made = self.rematch_many([tie], current, balance)[0]
            if made is not None:
                return made
        step = None if self.work is None else self.work.step_of(tie[0].name)
        if step is not None and step.way == "tiled" and self.weights is not None:
            return [self._zipped_on_lists(tie[0], current, self.weights, step.piece)]
        if step is not None and step.way == "rows":
            return [self._assigned_by_rows(tie[0], current, balance, step.piece)]
        if step is not None and step.way == "blocks":
            return self._assigned_by_blocks(tie, current, balance)
        similarities = [self.similarity(space, current, balance) for space in tie]
        if len(tie) > 1 or tie[0].blocks > 1 or tie[0].within == "fixed":
            return self._in_blocks(tie, similarities)
        if self.method == "align":
            return [self._assigned(tie[0], similarities[0])]
        return [self._zipped(tie[0], similarities[0], None)]

    def rematch_many(
        self, ties: Sequence[Sequence[Space]], current: Mapping[str, Match], balance: float
    ) -> list[list[Match] | None]:
        """The first of these ties matched anew, one after another, as far as one call does it: at least one.

        A None at the end stands for a tie that has to be matched the plain way.
        """
        if self.network is None:
            return [None]
        made = self.network.visit([[space.name for space in tie] for tie in ties], current, balance)
        return [None if found is None else [Match(labels, value) for labels, value in found] for found in made]

    def unmatched(self, space: Space, current: Mapping[str, Match]) -> Tensor:
        """(models, width) labels of a space without anything to compare: units stay, blocks follow the tie."""
        if self.widths[space.name] != space.width:
            raise ValueError(
                f"width: space {space.name!r} has nothing to compare at balance {self.balance}, so it keeps "
                f"{space.width} units; got {self.widths[space.name]}"
            )
        order = torch.arange(space.width).reshape(space.blocks, -1)
        labels = order.reshape(-1).repeat(self.models, 1)
        for other in self.spec.spaces:
            if space.tie is not None and other.tie == space.tie and other.name in current:
                match = current[other.name]
                for m in range(self.models):
                    goes_to, _ = split_blocks(other, match.labels[m], match.width)
                    labels[m] = order[goes_to].reshape(-1)
                break
        return labels

    def _aligned(self, space: Space) -> bool:
        return self.method == "align" or space.within == "fixed"

    def similarity(self, space: Space, current: Mapping[str, Match], balance: float) -> Tensor:
        """What `rematch` matches by: (models - 1, width, width) where the space is aligned, else of all units."""
        activation = self.activations.get(space.name) if balance < 1 else None
        scope = "cross" if self._aligned(space) else "full"
        step = self.work.step_of(space.name) if self.work is not None else None
        compared = balance > 0 and any(axis.compare for axis in space.axes)
        split = self.world if space.name in self.together else None
        streamed = split is not None or (step is not None and step.way == "streamed")
        if compared and self.weights is not None and streamed:
            labels = {name: match.labels for name, match in current.items()}
            widths = {name: match.width for name, match in current.items()}
            piece = _PIECE if step is None else step.piece
            return streamed_similarity(
                self.spec,
                space,
                self.weights,
                labels,
                widths,
                activation,
                balance,
                scope,
                piece,
                self.device,
                split,
            )
        terms = self._terms(space, current) if balance > 0 else []
        if not terms and activation is None:
            activation = self.activations.get(space.name)
        return dual_similarity(terms, activation, balance, scope)

    def _terms(self, space: Space, current: Mapping[str, Match]) -> list[list[Term]]:
        # Rebuilt at every visit: a sum over the tensors whose neighbours stood still would have to be kept for every
        # tensor, width^2 each, and a space whose neighbours all stood still is not visited again at all.
        if self.weights is None:
            return []
        terms = []
        for axis in space.axes:
            if not axis.compare:
                continue
            tensors = [self.weights.finite(m, axis.tensor) for m in range(self.models)]
            device = self.device or tensors[0].device
            touching = {other.name for other, _ in self.spec.entries[axis.tensor]}
            near = {name: found for name, found in current.items() if name in touching}
            labels = {name: match.labels for name, match in near.items()}
            widths = {name: match.width for name, match in near.items()}
            seen = columns(self.spec, space.name, axis, [x.to(device) for x in tensors], labels, widths)
            terms.append([Term(c.tensor, c.rows, _by_dims(c.labels), _by_dims(c.scale)) for c in seen])
        return terms

    def _assigned(self, space: Space, similarity: Tensor) -> Match:
        # The last duals are nearly feasible for a similarity that changed a little.
        found = assign(similarity, duals=self.duals.get(space.name))
        self.duals[space.name] = found.duals
        return Match(_labels_of(found.indices), float(found.value.mean()))

    def _assigned_by_rows(self, space: Space, current: Mapping[str, Match], balance: float, tile_bytes: int) -> Match:
        """The same match where the similarity is too large to be held: some of its rows at a time."""
        indices, value = [], 0.0
        for m, source in self._tiles(space, current, balance):
            found = assign_tiled(source, tile_bytes=tile_bytes)
            indices.append(found.indices)
            value += float(found.value) / (self.models - 1)
            left = float(found.gap) / space.width
            if left > UNPROVEN * max(abs(float(found.value)), UNPROVEN):
                warnings.warn(
                    f"space {space.name!r}: the match of model {m} is not proven to be the best; its mean similarity "
                    f"{float(found.value):.6f} is at most {left:.2g} below the best one's",
                    stacklevel=2,
                )
        return Match(_labels_of(torch.stack(indices)), value)

    def _tiles(self, space: Space, current: Mapping[str, Match], balance: float) -> Iterator[tuple[int, Tiles]]:
        """(m, rows of the similarity of models 0 and m) for every other model."""
        terms = self._terms(space, current) if balance > 0 else []
        sums = None
        if space.name in self.activations and (balance < 1 or not terms):
            sums = sums_of(self.activations, space.name)
        for m in range(1, self.models):
            sources: list[Tiles] = []
            if terms:
                sources.append(SimilarityTiles([[row[0], row[m]] for row in terms]))
            if sums is not None:
                sources.append(StatisticsTiles(sums, m))
            yield m, sources[0] if len(sources) == 1 else BlendedTiles(sources[0], sources[1], balance)

    def _assigned_by_blocks(self, tie: Sequence[Space], current: Mapping[str, Match], balance: float) -> list[Match]:
        """The same match of spaces in blocks where similarities are too large to be held: a block's rows at a time."""
        blocks, others = tie[0].blocks, range(self.models - 1)
        scores = torch.zeros(self.models - 1, len(tie), blocks, blocks, dtype=torch.float64)
        inside: list[list[Tensor]] = []
        for k, space in enumerate(tie):
            inside.append([])
            for m, source in self._tiles(space, current, balance):
                made = match_block_rows(source.tile, space.width, blocks, space.within)
                inside[k].append(made[0])
                scores[m - 1, k] = made[1]
        between = assign(scores.sum(dim=1)).indices
        matches = []
        for k in range(len(tie)):
            pairs = [inside[k][m][torch.arange(blocks), between[m]] for m in others]
            indices = torch.stack([(between[m][:, None] * pairs[m].shape[1] + pairs[m]).reshape(-1) for m in others])
            value = float(scores[:, k].gather(2, between[:, :, None]).mean())
            matches.append(Match(_labels_of(indices), value))
        return matches

    def _zipped(self, space: Space, similarity: Tensor, pairing: Tensor | None) -> Match:
        width = self.widths[space.name]
        if self.method == "select":
            return self._selected(space, width, pairing)
        try:
            found = zip_units(
                similarity, self.models, width, self.attenuation, self.budget, space.blocks, block_indices=pairing
            )
        except ValueError as error:
            raise ValueError(f"space {space.name!r} (width {width}, budget {self.budget}): {error}") from error
        return Match(found.labels.cpu(), float(found.value))

    def _zipped_on_lists(self, space: Space, current: Mapping[str, Match], weights: Weights, room: int) -> Match:
        labels = {name: match.labels for name, match in current.items()}
        widths = {name: match.width for name, match in current.items()}
        source = UnitTiles(self.spec, space, weights, labels, widths, self.device)
        width, pairs = self.widths[space.name], max(1, room // PAIR_BYTES)
        try:
            found, _ = zip_tiled(source, self.models, width, self.attenuation, self.budget, pairs)
        except ValueError as error:
            raise ValueError(f"space {space.name!r} (width {width}, budget {self.budget}): {error}") from error
        return Match(found.labels, float(found.value))

    def _selected(self, space: Space, width: int, pairing: Tensor | None) -> Match:
        _, covariance = joint_covariance(self.activations[space.name])
        found = select_units(covariance, self.models, width, self.reads(space), space.blocks, pairing)
        return Match(found.labels, float(found.value), found.leaders)

    def _selected_blocks(self, tie: Sequence[Space], found: Sequence[Assignment]) -> list[Match]:
        """Every block of a tie from one model: the same one in all its spaces."""
        blocks, covariances, unions = tie[0].blocks, [], []
        for space, part in zip(tie, found, strict=True):
            matrix = joint_covariance(self.activations[space.name])[1].cpu()
            reads = self.reads(space)
            covariances.append(matrix if reads is None else matrix * torch.outer(reads, reads))
            pairing = None if part.block_indices is None else part.block_indices.cpu()
            if pairing is not None:
                pairing = torch.cat([torch.arange(blocks)[None], pairing])
            unions.append(unions_of(matrix, space.width, self.models, blocks, pairing))
        chosen, values = select_blocks(covariances, self.models, unions)
        matches = []
        for space, part, union, value in zip(tie, found, unions, values, strict=True):
            own = union.reshape(blocks, self.models, -1)
            if self._aligned(space):
                labels = _labels_of(part.indices)
                order = labels.argsort(1).reshape(self.models, blocks, -1)
                leaders = (order + torch.arange(self.models)[:, None, None] * space.width)[chosen, range(blocks)]
            else:
                leaders = own[range(blocks), chosen]
                labels = self._nearest(space, union, leaders)
            matches.append(Match(labels, value, leaders.reshape(-1)))
        return matches

    def _nearest(self, space: Space, unions: Tensor, leaders: Tensor) -> Tensor:
        """(models, width): every unit with the leader of its union that it correlates with most."""
        matrix = joint_covariance(self.activations[space.name])[1].cpu()
        deviation = matrix.diagonal().clamp(min=0).sqrt()
        alike = matrix / torch.outer(deviation, deviation).clamp(min=1e-300)
        labels = torch.empty(self.models * space.width, dtype=torch.int64)
        for k, (own, mine) in enumerate(zip(unions, leaders, strict=True)):
            labels[own] = alike[own][:, mine].argmax(1) + k * len(mine)
            labels[mine] = torch.arange(len(mine)) + k * len(mine)
        return labels.reshape(self.models, -1)

    def reads(self, space: Space) -> Tensor | None:
        """(models * width,): the norm of all the weights that consume each unit."""
        if self.weights is None:
            return None
        total = torch.zeros(self.models, space.width, dtype=torch.float64)
        for axis in space.axes:
            if axis.role == "in":
                for m in range(self.models):
                    view, dims = rows(self.weights.finite(m, axis.tensor), axis)
                    others = [d for d in range(view.dim()) if d not in dims]
                    squares = view.movedim(dims, tuple(range(len(dims)))).double().square()
                    total[m] += squares.reshape(space.width, -1).sum(1).cpu() if others else squares.reshape(-1).cpu()
        return total.sqrt().reshape(-1) if bool(total.any()) else None

    def _in_blocks(self, tie: Sequence[Space], similarities: Sequence[Tensor]) -> list[Match]:
        cross = [
            similarity if self._aligned(space) else cross_of(similarity, self.models)
            for space, similarity in zip(tie, similarities, strict=True)
        ]
        found = assign_blocks(cross, tie[0].blocks, [space.within for space in tie])
        if self.method == "select" and self.whole_blocks and all(self.widths[s.name] == s.width for s in tie):
            return self._selected_blocks(tie, found)
        matches = []
        for space, similarity, part in zip(tie, similarities, found, strict=True):
            blocks = part.block_indices
            if self._aligned(space) or blocks is None:
                matches.append(Match(_labels_of(part.indices), float(part.value.mean())))
            else:
                pairing = torch.cat([torch.arange(space.blocks, device=blocks.device)[None], blocks])
                matches.append(self._zipped(space, similarity, pairing))
        return matches


def _by_dims(values: Mapping[tuple[int, ...], Tensor]) -> dict[int | tuple[int, ...], Tensor]:
    return {dims[0] if len(dims) == 1 else dims: value for dims, value in values.items()}


def _labels_of(indices: Tensor) -> Tensor:
    """labels[m, indices[m - 1, i]] = i for models m >= 1, model 0 in its own order; on the CPU."""
    indices = indices.cpu()
    order = torch.arange(indices.shape[-1])
    labels = order.repeat(len(indices) + 1, 1)
    labels[1:].scatter_(1, indices, order.expand_as(indices))
    return labels


def cross_of(full: Tensor, models: int) -> Tensor:
    """The blocks (model 0, model m) of a full similarity: (models - 1, width, width), a view."""
    width = full.shape[0] // models
    return full.reshape(models, width, models, width)[0, :, 1:].transpose(0, 1)
