"""The match of all spaces by coordinate descent (docs/method.md rule 8)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast.arguments import (
    Width,
    check_activations,
    check_count,
    check_share,
    check_spec,
    check_start,
    merged_widths,
    two_or_more,
)
from mudsc_fast.covariance import Covariance
from mudsc_fast.distributed import World, hubs, levels, owners, world_of
from mudsc_fast.journal import Journal, digest
from mudsc_fast.network import network_of
from mudsc_fast.plan import METHODS, MergePlan
from mudsc_fast.progress import Bar, Progress, bar, wanted
from mudsc_fast.records import PathLike
from mudsc_fast.rematch import Match, Matcher
from mudsc_fast.scalars import check_seed
from mudsc_fast.weights import Weights
from mudsc_fast.workplan import TensorShape, plan_work
from mudsc_fast.zipping import check_attenuation

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec

# Results remembered per tie. After a sweep that did not help, the labels go back to the best ones, and the sweeps of a
# settling match revisit few states; each entry is only the labels of one tie.
_REMEMBERED = 4


def match(
    state_dicts: Sequence[Mapping[str, Tensor]] | None,
    spec: PermutationSpec,
    activations: Mapping[str, Covariance] | None = None,
    method: str = "align",
    balance: float = 0.5,
    width: Width | None = None,
    attenuation: float = 0.5,
    budget: float = 1.0,
    seed: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    start: MergePlan | None = None,
    progress: Progress = True,
    device: torch.device | str | None = None,
    max_memory: int | None = None,
    journal: PathLike | None = None,
    group: Any = None,
    split_hubs: bool = False,
    whole_blocks: bool = False,
) -> MergePlan:
    """Find the labels of every space: which units of the models belong together.

    state_dicts: one mapping from names to tensors a model, two or more; tensors are read when needed, so lazy mappings
        stay lazy. With balance 0 they are not looked at and may be None.
    spec: the spaces of the architecture.
    activations: what `calibrate` gave, {space: Covariance}; None: weights alone. A zip needs scope "full".
    method: "align" (one-to-one), "zip" (units also merge inside a model; `within="fixed"` spaces are aligned), or
        "select" (by activations alone: of all models' units those that best reconstruct what is read of the others;
        made for `decode` or `refit` afterwards; balance, attenuation and budget do not apply).
    balance: share of the weights in the similarity, 0 (activations alone, one visit a space) to 1.
    width: zip and select: merged units of a space, an int, a float share of its width, or {space: either}; None: its
        width. A share is rounded to whole units in every block.
    attenuation: zip only: factor on the similarities of a merged unit. budget: zip only: share, 0..1, of the merges
        that may happen inside one model.
    seed: of the order in which spaces are visited. max_sweeps, patience: limits of all sweeps, and of sweeps in a row
        without a better mean value L.
    start: a plan of the same spec and method whose labels the sweeps begin with, instead of the match by activations;
        balance 0 has no sweeps and does not use it.
    progress: True draws a bar on a terminal, "always" also elsewhere, False never.
    device: where weights are compared; None: where the statistics are, or else the tensors.
    max_memory: bytes that the process may hold on the CPU. Spaces whose tensors do not fit are compared one tensor at a
        time, with the same similarities up to rounding; where the similarity does not fit, weights alone can still be
        aligned, some rows at a time, and zipped on lists; ValueError, which names the minimum, if all is too much.
    journal: a folder in which every visit is recorded; a match with the same arguments and tensors that was interrupted
        goes on from there, to the same result. The tensors are not looked at for that: the caller answers for them.
    group: a torch.distributed process group, True for the default one: all its processes make this call with the same
        arguments, share the spaces among them, and get the same plan, which is that of a single process. With a
        journal, each process needs a folder of its own.
    split_hubs: spaces that most others read (a residual stream) can hardly be matched beside them; True has all
        processes add up a share of such a space's tensors. Sums in another order round differently, so that labels are
        those of one process only where no two matches are equally good within float32.
    whole_blocks: select only: True takes heads of attention and groups of a norm whole from one model, since what they
        attend to and normalise is no sum over their units; False, and where the width changes, chooses unit by unit
        inside each pair of blocks.

    Returns a MergePlan whose history holds L of every sweep run. Sweeps that cannot change anything are not run, so the
    history may be shorter than the plain algorithm's, which only repeats its last L. A space that was never matched (no
    tap at balance 0) keeps its order in every model.

    Raises ValueError or TypeError, naming the argument, model, tensor or space: fewer than two models, missing tensors,
    shapes that disagree, NaN or inf, tensors that are not floating, an impossible width or budget, statistics of
    another width, number of models or scope.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    check_spec(spec)
    balance = check_share("balance", balance)
    attenuation = check_attenuation(attenuation)
    budget = check_share("budget", budget, top=None)
    seed = check_seed(seed)
    max_sweeps = check_count("max_sweeps", max_sweeps, 0)
    patience = check_count("patience", patience, 1)
    wanted(progress)
    if not spec.spaces:
        raise ValueError("spec: expected at least one space, got none")
    if whole_blocks and method != "select":
        raise ValueError(f"whole_blocks: expected False unless the method is 'select', got True with {method!r}")
    if method == "select" and not activations:
        raise ValueError("activations: method 'select' chooses units by their activations, but none were given")
    selecting = method == "select" and state_dicts is not None
    weights = Weights(two_or_more(state_dicts), spec) if balance > 0 or selecting else None
    balance = 0.0 if method == "select" else balance
    if weights is None and not activations:
        raise ValueError("activations: balance 0 compares activations alone, but none were given")
    models = weights.models if weights is not None else len(state_dicts) if state_dicts else None
    if activations:
        models = check_activations(activations, spec, models, full=method != "align")
    if models is None:
        raise ValueError("state_dicts: expected two or more, got none")
    if start is not None:
        check_start(start, spec, models, method)
    widths = merged_widths(spec, method, width, models)
    where = torch.device(device) if device is not None else None
    if where is None and activations:
        where = getattr(activations, "device", None) or next(iter(activations.values())).device
    matcher = Matcher(spec, models, method, weights, activations or {}, balance, widths, attenuation, budget, where)
    matcher.whole_blocks = whole_blocks
    if max_memory is not None:
        layout = {} if weights is None else {n: TensorShape(*weights.info(0, n)) for n in weights.in_spec}
        share = balance if activations else 1.0  # without statistics, weights alone are compared
        matcher.work = plan_work(spec, layout, models, method, max_memory, share, merging=False)
    elif journal is None and method != "select" and (where is None or where.type == "cpu"):
        compared = None if weights is None else weights.state_dicts
        zipped = method == "zip"
        matcher.network = network_of(spec, compared, activations or {}, models, zipped, widths, attenuation, budget)
    record = None
    if journal is not None:
        asked = {"method": method, "balance": balance, "widths": widths, "attenuation": attenuation, "budget": budget}
        limits = {"seed": seed, "max_sweeps": max_sweeps, "patience": patience, "models": models}
        limits |= {"whole_blocks": whole_blocks} if method == "select" else {}
        ways = {} if matcher.work is None else {step.spaces[0]: step.way for step in matcher.work.steps}
        given = {"spec": digest(spec.to_json()), "activations": sorted(activations or ()), "start": start is not None}
        record = Journal(journal, {**asked, **limits, **given}, ways)
        if matcher.work is not None:
            matcher.work = matcher.work.with_ways(record.ways)
    descent = _Descent(matcher, record, world_of(group), split_hubs)
    if start is not None and balance > 0:
        descent.current = {name: Match(labels, start.values.get(name, 0.0)) for name, labels in start.labels.items()}
    elif activations:
        descent.by_activations(progress)
    history: list[float] = []
    if balance > 0:
        history = descent.sweeps(seed, max_sweeps, patience, progress)
    labels = {name: found.labels for name, found in descent.current.items()}
    values = {name: found.value for name, found in descent.current.items()}
    for space in spec.spaces:
        if space.name not in labels:
            labels[space.name] = matcher.unmatched(space, descent.current)
    leaders = {name: found.leaders for name, found in descent.current.items() if found.leaders is not None}
    return MergePlan(spec, labels, method, values, history, descent.by_sweep, leaders)


class _Descent:
    """The current matches, and how they change from visit to visit."""

    def __init__(
        self, matcher: Matcher, journal: Journal | None = None, world: World | None = None, split_hubs: bool = False
    ) -> None:
        self.matcher = matcher
        self.journal = journal
        self.world = world
        self.current: dict[str, Match] = {}
        self.by_sweep: dict[str, list[float]] = {}  # each space's value after every sweep
        self._tie_of = matcher.spec.tied
        self._owners: dict[tuple[str, ...], int] = {}
        if world is not None:
            costs = {_names(tie): float(sum(s.width**2 * len(s.axes) for s in tie)) for tie in self._tie_of.values()}
            near = self._near_ties()
            self._owners = owners(costs, near, world.size)
            if split_hubs:
                matcher.together = frozenset(name for tie in hubs(near) for name in tie)
                matcher.world = world
        self._remembered: dict[tuple[str, ...], OrderedDict[Any, list[Match]]] = {}
        self._digests: dict[str, tuple[Match, bytes]] = {}

    def by_activations(self, progress: Progress) -> None:
        """Match every space that has statistics on these alone."""
        seen = self.matcher.activations
        ties = list({_names(tie): tie for tie in self._tie_of.values()}.values())
        ties = [tie for tie in ties if any(space.name in seen for space in tie)]
        tapped = {_names(tie): tuple(space for space in tie if space.name in seen) for tie in ties}
        with bar("matching activations", len(ties), progress) as steps:
            if self.world is None:
                self._visits(list(tapped.values()), 0.0, lambda tie: self._rematch(tie, {}, 0.0), steps)
                return

            def match_one(tie: tuple[Space, ...]) -> list[Match]:
                steps.advance()
                return self._rematch(tapped[_names(tie)], {}, 0.0)

            for tie, matches in self._shared(self.world, ties, match_one):
                self._take(tapped[_names(tie)], matches)

    def sweeps(self, seed: int, max_sweeps: int, patience: int, progress: Progress) -> list[float]:
        """Sweep until the mean value stops rising; the best matches stay in `current`."""
        spaces = self.matcher.spec.spaces
        generator = torch.Generator().manual_seed(seed)
        history: list[float] = []
        best, best_value, worse = dict(self.current), -float("inf"), 0
        with bar("matching", None, progress) as steps:
            while len(history) < max_sweeps and worse < patience:
                changed = self._sweep(
                    [spaces[k] for k in torch.randperm(len(spaces), generator=generator).tolist()], steps
                )
                value = sum(self.current[space.name].value for space in spaces) / len(spaces)
                history.append(value)
                for space in spaces:
                    self.by_sweep.setdefault(space.name, []).append(self.current[space.name].value)
                if value > best_value:
                    best, best_value, worse = dict(self.current), value, 0
                else:
                    self.current, worse = dict(best), worse + 1
                steps.describe(f"matching, sweep {len(history)}, L {best_value:.4f}")
                if not changed:
                    # Every further sweep would find these labels and this L again, whatever its order.
                    break
        return history

    def _sweep(self, order: Sequence[Space], steps: Bar) -> bool:
        changed = False
        visits = [self._tie_of[space.name] for space in order]
        if self.world is None:
            return self._visits(visits, self.matcher.balance, self._visit, steps)
        # Among several processes, as many at once as give the same result.
        for level in levels([_names(tie) for tie in visits], self._near_ties()):
            at_once = [visits[k] for k in level]
            for tie, matches in self._shared(self.world, at_once, self._visit, self.matcher.together):
                changed |= self._take(tie, matches)
                steps.advance()
        return changed

    def _visits(
        self,
        ties: Sequence[tuple[Space, ...]],
        balance: float,
        one: Callable[[tuple[Space, ...]], list[Match]],
        steps: Bar,
    ) -> bool:
        """The ties matched one after another, many at a call, by `one` what that cannot do; whether labels changed."""
        changed = False
        while ties:
            made = self.matcher.rematch_many(ties, self.current, balance)
            for tie, matches in zip(ties, made, strict=False):
                changed |= self._take(tie, matches or one(tie))
                steps.advance()
            ties = ties[len(made) :]
        return changed

    def _take(self, tie: tuple[Space, ...], matches: Sequence[Match]) -> bool:
        """Makes these the current matches; whether labels changed."""
        changed = False
        for member, found in zip(tie, matches, strict=True):
            before = self.current.get(member.name)
            same = before is not None and (
                before.labels is found.labels or bool(torch.equal(before.labels, found.labels))
            )
            changed |= not same
            self.current[member.name] = found
        return changed

    def _shared(
        self,
        world: World,
        ties: Sequence[tuple[Space, ...]],
        work: Callable[[tuple[Space, ...]], list[Match]],
        together: frozenset[str] = frozenset(),
    ) -> list[tuple[tuple[Space, ...], list[Match]]]:
        """Each tie with its new matches; processes do their own ones and hear of the others'."""
        found: dict[int, list[Match]] = {}
        apart = [k for k, tie in enumerate(ties) if not together & set(_names(tie))]
        for k in sorted(set(range(len(ties))) - set(apart)):
            matches = work(ties[k])
            found[k] = world.first(lambda matches=matches: matches)  # type: ignore[misc]
        mine = [k for k in apart if self._owners[_names(ties[k])] == world.rank]
        if apart:
            for part in world.exchange(lambda: {k: work(ties[k]) for k in mine}):
                found.update(part)
        return [(tie, found[k]) for k, tie in enumerate(ties)]

    def _near_ties(self) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
        """Which ties are matched by each other's labels; symmetric."""
        found: dict[tuple[str, ...], set[tuple[str, ...]]] = {_names(tie): set() for tie in self._tie_of.values()}
        for tie in self._tie_of.values():
            for other in self._near(tie):
                a, b = _names(tie), _names(self._tie_of[other])
                found[a].add(b)
                found[b].add(a)
        return found

    def _near(self, tie: tuple[Space, ...]) -> list[str]:
        """The spaces whose labels a tie is matched by."""
        return sorted({near for space in tie for near in self.matcher.spec.neighbours(space.name)})

    def _visit(self, tie: tuple[Space, ...]) -> list[Match]:
        """The tie rematched; remembered where its neighbours have the labels of an earlier visit."""
        names = _names(tie)
        state = tuple(self._digest(near) for near in self._near(tie))
        seen = self._remembered.setdefault(names, OrderedDict())
        if state in seen:
            seen.move_to_end(state)
            return seen[state]
        found = self._rematch(tie, self.current, None)
        seen[state] = found
        if len(seen) > _REMEMBERED:
            seen.popitem(last=False)
        return found

    def _rematch(self, tie: Sequence[Space], current: Mapping[str, Match], balance: float | None) -> list[Match]:
        if self.journal is None:
            # Where no other process takes part, `_visits` has tried one call for it.
            return self.matcher.rematch(tie, current, balance, tried=self.world is None)
        names, journal = [space.name for space in tie], self.journal
        work: Callable[[], list[Match]] = lambda: self.matcher.rematch(tie, current, balance)  # noqa: E731
        if balance is not None or self.world is None or self.matcher.together.isdisjoint(names):
            return journal.visit(names, self.matcher.duals, work, make=Match)
        # All processes add up such a visit, or none: the first one's journal says which, and keeps it.
        if self.world.first(journal.holds_next):
            return self.world.first(lambda: journal.visit(names, self.matcher.duals, work, make=Match))
        found = work()
        if self.world.rank == 0:
            journal.visit(names, self.matcher.duals, lambda: found, make=Match)
        return found

    def _digest(self, name: str) -> bytes | None:
        """A short name of a space's current labels; None while it is unmatched."""
        now = self.current.get(name)
        if now is None:
            return None
        known = self._digests.get(name)
        if known is None or known[0] is not now:
            known = now, hashlib.blake2b(now.labels.numpy().tobytes(), digest_size=16).digest()
            self._digests[name] = known
        return known[1]


def _names(tie: Sequence[Space]) -> tuple[str, ...]:
    return tuple(space.name for space in tie)
