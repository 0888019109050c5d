"""Mixtures of experts: experts are blocks, each expert's hidden units a space inside it, router rows move with them.

Pairs of experts are compared one at a time, so that the similarity of all units with all others is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.arguments import check_share
from mudsc_fast.assignment import assign
from mudsc_fast.averaging import check_weights
from mudsc_fast.covariance import Covariance
from mudsc_fast.experts import Experts
from mudsc_fast.progress import Progress, bar
from mudsc_fast.similarity import Term, dual_similarity, weight_similarity


@dataclass(frozen=True, eq=False)
class ExpertMatch:
    """Which experts belong together, and which hidden units inside them.

    labels: (models, experts) int64: expert i of model m belongs to merged expert labels[m, i].
    units: (models, experts, hidden) int64: unit u of that expert belongs to unit units[m, i, u] of the merged expert.
    scores: (models, experts) float64: mean similarity of its units with those of the expert that it was matched with;
        1 for that one itself.
    """

    labels: Tensor
    units: Tensor
    scores: Tensor

    @property
    def count(self) -> int:
        """Number of merged experts."""
        return int(self.labels.max()) + 1

    def align(self, experts: Experts, model: int = 1) -> Experts:
        """This model's own experts in model 0's order, units and router rows included: the same function.

        Raises ValueError for a match in which several experts of a model merge.
        """
        self._check(experts, model)
        labels = self.labels[model]
        if not torch.equal(labels.sort().values, torch.arange(len(labels))):
            raise ValueError("align: several experts of one model merge in this match; only a one-to-one match aligns")
        order = torch.argsort(labels)
        return experts.take(order.tolist(), torch.argsort(self.units[model], dim=-1)[order])

    def merge(self, experts: Sequence[Experts], weights: Sequence[float] | Tensor | None = None) -> Experts:
        """The merged experts: weighted means of their members in the matched unit order, router rows included.

        experts: one a model, as they were matched. weights: one share >= 0 a model, or (models, experts): one an expert
        (how often it is used). Sums are taken in float32 (float64 for float64), results have model 0's dtypes.
        """
        for m, given in enumerate(experts):
            self._check(given, m)
        if len(experts) != len(self.labels):
            raise ValueError(f"experts: expected {len(self.labels)}, one a model, got {len(experts)}")
        shares = _shares(weights, *self.labels.shape)
        order = torch.argsort(self.units, dim=-1)
        merged: list[tuple[Tensor, ...]] = []
        for k in range(self.count):
            members = (self.labels == k).nonzero().tolist()
            total, mean = 0.0, list[Tensor]()
            if sum(float(shares[m, i]) for m, i in members) <= 0:
                raise ValueError(f"weights: those of all members of merged expert {k} vanish")
            for m, i in members:
                share = float(shares[m, i])
                if share == 0:
                    continue
                total += share
                own = [_working(x) for x in experts[m].take([i], order[m, i : i + 1]).tensors[0]]
                # By differences, so that equal experts give back their own bits.
                mean = own if not mean else [a.lerp(b.to(a), share / total) for a, b in zip(mean, own, strict=True)]
            merged.append(tuple(x.to(like) for x, like in zip(mean, experts[0].tensors[0], strict=True)))
        return Experts(experts[0].fields, tuple(merged))

    def expand(self, merged: Experts, experts: Experts, model: int = 0) -> Experts:
        """As many experts as the model had, each in the place of its members, with the model's own router rows.

        For networks that keep their router: its choice of an expert then finds the one that it was merged into.
        """
        self._check(experts, model)
        rows = [
            tuple(
                theirs if field.router else ours
                for field, ours, theirs in zip(
                    experts.fields, merged.tensors[int(self.labels[model, i])], own, strict=True
                )
            )
            for i, own in enumerate(experts.tensors)
        ]
        return Experts(experts.fields, tuple(rows))

    def _check(self, experts: Experts, model: int) -> None:
        if not isinstance(experts, Experts):
            raise TypeError(f"experts: expected Experts, got {type(experts).__name__}")
        if not 0 <= model < len(self.labels):
            raise ValueError(f"model: expected 0..{len(self.labels) - 1}, got {model!r}")
        found, wanted = (len(experts), experts.hidden), tuple(self.units.shape[1:])
        if found != wanted:
            raise ValueError(f"experts: expected {wanted} (experts, hidden units), got {found}")


def align_experts(
    experts: Sequence[Experts],
    activations: Sequence[Tensor] | None = None,
    balance: float | None = None,
    pair: bool = True,
    progress: Progress = False,
) -> ExpertMatch:
    """Match the experts of one layer across models, one to one, and the hidden units inside each pair.

    experts: one a model, two or more, alike in their fields.
    activations: one a model, (experts, samples, hidden) floating: hidden units of every expert on the same samples (of
        all experts, also those that the router would not have chosen); None: weights alone.
    balance: share of the weights in the similarity of units, 0..1; None: 0.5 with activations, else 1.
    pair: False keeps expert i with expert i and matches units alone.

    A pair of experts scores the mean similarity of its matched units, plus that of the router's two rows where they are
    here; the experts are then assigned to each other. Model 0 keeps its order: `match.align(experts[1], 1)` has model
    1's function, expressed in model 0's order.

    Raises ValueError or TypeError, naming the argument, for experts or activations that do not fit each other.
    Source: docs/method.md rules 2, 3 and 6.
    """
    experts = _checked(experts, 2)
    compare = _comparison(experts, activations, balance)
    models, count, hidden = len(experts), len(experts[0]), experts[0].hidden
    labels = torch.arange(count).repeat(models, 1)
    units = torch.arange(hidden).repeat(models, count, 1)
    scores = torch.ones(models, count, dtype=torch.float64)
    with bar("matching experts", (models - 1) * (count**2 if pair else count), progress) as steps:
        for m in range(1, models):
            value = torch.full((count, count), -torch.inf, dtype=torch.float64)
            indices: dict[tuple[int, int], Tensor] = {}
            for i in range(count):
                for j in range(count) if pair else [i]:
                    found = assign(compare((0, i), (m, j))[0])
                    value[i, j], indices[i, j] = found.value, found.indices.cpu()
                    steps.advance()
            chosen = torch.arange(count)
            if pair:
                chosen = assign(value + _by_router(experts[0], experts[m])).indices
            for i, j in enumerate(chosen.tolist()):
                labels[m, j], scores[m, j] = i, value[i, j]
                units[m, j, indices[i, j]] = torch.arange(hidden)
    return ExpertMatch(labels, units, scores)


def merge_experts(
    experts: Experts | Sequence[Experts],
    count: int | None = None,
    groups: Sequence[int] | Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    activations: Sequence[Tensor] | None = None,
    balance: float | None = None,
    progress: Progress = False,
) -> tuple[Experts, ExpertMatch]:
    """Merge experts: of one layer into fewer, or the same layer's across models.

    experts: those of one layer, or one a model. All models' experts are pooled.
    count: merged experts; None with several models: one-to-one, as `align_experts` matches them.
    groups: (models * experts,) which merged expert, 0.., each belongs to, where that is known; instead of `count`.
    weights: as for `ExpertMatch.merge`. activations, balance: as for `align_experts` (a single tensor's sequence for a
        single layer).

    Into fewer: two experts are as similar as their units are on average, once matched; the two groups that are most
    similar on average are merged until `count` are left. Inside a group every expert's units are matched with those of
    the member of the largest weight (the first of these), and averaged. The router's rows are averaged too; a network
    that keeps its own router takes `match.expand(merged, experts)`.

    Returns the merged experts and the match. Raises ValueError or TypeError, naming the argument.
    """
    if isinstance(experts, Experts):
        experts = [experts]
    experts = _checked(experts, 1)
    if count is None and groups is None:
        if len(experts) == 1:
            raise ValueError("count: how many experts are to be left? Give count or groups")
        match = align_experts(experts, activations, balance, progress=progress)
        return match.merge(experts, weights), match
    compare = _comparison(experts, activations, balance)
    models, size = len(experts), len(experts[0])
    shares = _shares(weights, models, size).reshape(-1)
    where = [(m, i) for m in range(models) for i in range(size)]
    if groups is None:
        group = _grouped(_check_count(count, len(where)), where, compare, progress)
    else:
        if count is not None:
            raise ValueError("groups: give either count or groups, not both")
        group = _checked_groups(groups, len(where))
    units = torch.arange(experts[0].hidden).repeat(len(where), 1)
    scores = torch.ones(len(where), dtype=torch.float64)
    for k in range(int(group.max()) + 1):
        members = (group == k).nonzero().flatten().tolist()
        first = max(members, key=lambda p: (float(shares[p]), -p))
        for p in members:
            if p != first:
                found = assign(compare(where[first], where[p])[0])
                scores[p] = found.value
                units[p, found.indices.cpu()] = torch.arange(experts[0].hidden)
    match = ExpertMatch(group.reshape(models, size), units.reshape(models, size, -1), scores.reshape(models, size))
    return match.merge(experts, weights), match


Place = tuple[int, int]  # model, expert


def _comparison(
    experts: Sequence[Experts], activations: Sequence[Tensor] | None, balance: float | None
) -> Callable[[Place, Place], Tensor]:
    """The similarity of the units of two experts: (1, hidden, hidden)."""
    if balance is None:
        balance = 1.0 if activations is None else 0.5
    check_share("balance", balance)
    if activations is None and balance < 1:
        raise ValueError(f"activations: balance {balance} compares activations too, but none were given")
    if activations is not None:
        _check_activations(activations, experts)
    dims = [(f, field.dim) for f, field in enumerate(experts[0].fields) if field.dim is not None]

    def compare(a: Place, b: Place) -> Tensor:
        of_a, of_b = experts[a[0]].tensors[a[1]], experts[b[0]].tensors[b[1]]
        terms = [[Term(of_a[f].detach(), d), Term(of_b[f].detach(), d)] for f, d in dims] if balance > 0 else []
        seen = None
        if activations is not None and balance < 1:
            x, y = activations[a[0]][a[1]], activations[b[0]][b[1]]
            seen = Covariance(x.shape[-1], models=2, scope="cross", device=x.device)
            seen.update([x, y])
        return dual_similarity(terms, seen, balance)

    return compare


def _by_router(a: Experts, b: Experts) -> Tensor:
    """(experts, experts) float64: correlation of the router's rows; 0 where there are none to compare."""
    terms = []
    for f, field in enumerate(a.fields):
        if field.router:
            rows = [torch.stack([own[f].detach().reshape(-1) for own in x.tensors]) for x in (a, b)]
            terms.append([Term(row, 0) for row in rows])
    if not terms:
        return torch.zeros(len(a), len(a), dtype=torch.float64)
    return weight_similarity(terms)[0].double().cpu()


def _grouped(
    count: int, where: Sequence[Place], compare: Callable[[Place, Place], Tensor], progress: Progress
) -> Tensor:
    """Groups by average linkage, numbered by their first members: (experts,) int64."""
    n = len(where)
    value = torch.zeros(n, n, dtype=torch.float64)
    with bar("comparing experts", n * (n - 1) // 2 if count < n else 0, progress) as steps:
        for i in range(n if count < n else 0):
            for j in range(i + 1, n):
                value[i, j] = value[j, i] = assign(compare(where[i], where[j])[0]).value
                steps.advance()
    groups = [[i] for i in range(n)]
    for _ in range(n - count):
        sizes = torch.tensor([len(members) for members in groups], dtype=torch.float64)
        mean = (value / (sizes[:, None] * sizes)).fill_diagonal_(-torch.inf)
        a, b = sorted(divmod(int(mean.argmax()), len(groups)))
        groups[a] += groups.pop(b)
        value[a] += value[b]
        value[:, a] += value[:, b]
        rest = torch.arange(len(value)) != b
        value = value[rest][:, rest]
    labels = torch.empty(n, dtype=torch.int64)
    for k, members in enumerate(sorted(groups, key=min)):
        labels[members] = k
    return labels


def _working(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().to(torch.float32)


def _shares(weights: Sequence[float] | Tensor | None, models: int, experts: int) -> Tensor:
    """(models, experts) float64 shares, checked."""
    given = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if given is None:
        return torch.ones(models, experts, dtype=torch.float64)
    if given.shape == (models,):
        return torch.tensor(check_weights(given.tolist(), models), dtype=torch.float64)[:, None].expand(-1, experts)
    if given.shape == (models, experts) or (models == 1 and given.shape == (experts,)):
        check_weights(given.flatten().tolist(), models * experts)
        return given.reshape(models, experts)
    raise ValueError(f"weights: expected shape {(models,)} or {(models, experts)}, got {tuple(given.shape)}")


def _checked(experts: Sequence[Experts], least: int) -> list[Experts]:
    given = list(experts)
    if len(given) < least or not given:
        raise ValueError(f"experts: expected {'two or more models' if least > 1 else 'experts'}, got {len(given)}")
    for m, each in enumerate(given):
        if not isinstance(each, Experts):
            raise TypeError(f"experts: expected Experts, got {type(each).__name__} for model {m}")
        for f, field in enumerate(given[0].fields):
            mine = (len(each), len(each.fields), tuple(each.tensors[0][f].shape) if f < len(each.fields) else None)
            first = (len(given[0]), len(given[0].fields), tuple(given[0].tensors[0][f].shape))
            if mine != first or each.fields[f].dim != field.dim or each.fields[f].router != field.router:
                raise ValueError(f"experts: model {m} differs from model 0 at {field.name}: {each} and {given[0]}")
    return given


def _check_activations(activations: Sequence[Tensor], experts: Sequence[Experts]) -> None:
    if isinstance(activations, Tensor) or len(activations) != len(experts):
        raise ValueError(f"activations: expected one tensor a model ({len(experts)}), got {len(activations)}")
    samples = {x.shape[1] for x in activations if x.dim() == 3}
    for m, x in enumerate(activations):
        if x.dim() != 3 or (x.shape[0], x.shape[2]) != (len(experts[m]), experts[m].hidden) or len(samples) > 1:
            raise ValueError(
                f"activations: expected ({len(experts[m])} experts, samples, {experts[m].hidden} units), of as many "
                f"samples in all models, got {tuple(x.shape)} for model {m}"
            )


def _check_count(count: int | None, total: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= total:
        raise ValueError(f"count: expected 1..{total} merged experts, got {count!r}")
    return count


def _checked_groups(groups: Sequence[int] | Tensor, total: int) -> Tensor:
    given = torch.as_tensor(groups)
    if given.is_floating_point() or given.numel() != total:
        raise ValueError(f"groups: expected {total} integers, one an expert, got {tuple(given.shape)} {given.dtype}")
    flat = given.reshape(-1).to("cpu", torch.int64)
    if int(flat.min()) < 0 or not bool((torch.bincount(flat) > 0).all()):
        raise ValueError(f"groups: expected every number 0..{int(flat.max())} at least once, got {flat.tolist()}")
    return flat
