"""Streaming covariance of the units of several models over the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mudsc_fast import backends
from mudsc_fast.backends.cpu_covariance import CpuCovariance
from mudsc_fast.scalars import check_dim, integer

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCOPES = ("full", "cross")
_MOST_DIMS = 12  # of a tensor that is read as it is


class Accumulators(Protocol):
    """What a backend keeps: see ``backends.cpu_covariance.CpuCovariance``."""

    block: int
    dtype: torch.dtype
    gram: Tensor
    vectors: Tensor
    positions: Tensor

    @property
    def count(self) -> int: ...
    def update(self, features: list[Tensor], dim: int) -> None: ...
    def flush(self) -> None: ...
    def widen(self) -> None: ...
    def merge(self, other: Any) -> None: ...
    def rebase(self, shift: Tensor, scale: Tensor) -> None: ...
    def load(self, gram: Tensor, vectors: Tensor, count: int, dtype: torch.dtype) -> None: ...
    def correlation(self, cross: bool) -> Tensor: ...


class Covariance:
    """Population covariance of all units of several models, sample by paired sample, in one pass without a copy.

    Samples are multiplied in float32 (float64 once a batch was float64) about a shift near each unit's mean, and added
    up in float64: correlations stay within 1e-5 of float64 at mean/deviation of 1000, for any splitting into batches.

    Args:
        width: units a model.
        models: number of models, at least 2.
        scope: "full" for all pairs of models, "cross" for model 0 with each other model (less work and memory; enough
            for alignment, not for zip).
        device: where the sums live and the batches come from.
        backend: "auto" or a name of ``mudsc_fast.backends``.

    Raises:
        ValueError: unknown scope or backend, width < 1, models < 2.

    Source: docs/method.md rule 1.
    """

    def __init__(
        self,
        width: int,
        models: int = 2,
        scope: str = "full",
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        if scope not in _SCOPES:
            raise ValueError(f'scope: expected "full" or "cross", got {scope!r}')
        units, parts = integer(width), integer(models)
        if units is None or units < 1:
            raise ValueError(f"width: expected an integer of at least 1, got {width!r}")
        if parts is None or parts < 2:
            raise ValueError(f"models: expected an integer of at least 2, got {models!r}")
        width, models = units, parts
        self.width, self.models, self.scope = width, models, scope
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        chosen = backends.pick("covariance", self.device, backend)
        self.backend = chosen.name
        self._sums: Accumulators = chosen.module.covariance(width, models, scope == "cross", self.device)

    def update(self, features: Sequence[Tensor], dim: int = -1) -> None:
        """Add one batch: one tensor a model, read in place through its strides.

        Args:
            features: one tensor a model, any floating dtype and strides (they may differ between models), with
                ``width`` entries along ``dim``; all other axes are samples, paired by position in row-major order.
                Entries that are not finite count as 0. A tensor that requires grad is detached.
            dim: the unit axis: -1 for (samples, width) and (B, T, width), 1 for (B, C, H, W).

        Raises:
            TypeError: not tensors, or not floating.
            ValueError: another number of tensors, a wrong width or device, no samples, sample counts that differ.
        """
        sums = self._sums
        one_step = type(dim) is int and abs(dim) <= _MOST_DIMS
        if one_step and type(sums) is CpuCovariance and sums.update_plain(features, dim):
            return
        if isinstance(features, Tensor) or not isinstance(features, Sequence):
            raise TypeError(f"features: expected a sequence of one tensor a model, got {type(features).__name__}")
        if len(features) != self.models:
            raise ValueError(f"features: expected one tensor a model ({self.models}), got {len(features)}")
        dim = check_dim("dim", dim)
        checked = [self._checked(x, m, dim) for m, x in enumerate(features)]
        counts = [x.numel() // self.width for x in checked]
        if len(set(counts)) != 1:
            raise ValueError(f"features: expected as many samples from every model, got {counts}")
        if counts[0] == 0:
            raise ValueError(f"features: expected at least one sample, got shape {tuple(checked[0].shape)}")
        axes = {dim % x.dim() for x in checked}
        if len(axes) > 1 or any(x.dim() > _MOST_DIMS for x in checked):
            checked = [x.movedim(dim, -1).reshape(-1, self.width) for x in checked]
            axes = {1}
        if any(x.dtype == torch.float64 for x in checked):
            self._sums.widen()
        self._sums.update(checked, axes.pop())

    def _checked(self, x: Tensor, m: int, dim: int) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"features[{m}]: expected a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point() or x.layout != torch.strided:
            raise TypeError(f"features[{m}]: expected a dense floating tensor, got {x.dtype}, {x.layout}")
        if x.device != self.device:
            raise ValueError(f"features[{m}]: expected a tensor on {self.device}, got one on {x.device}")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: expected an axis of features[{m}] with shape {tuple(x.shape)}, got {dim}")
        if x.shape[dim] != self.width:
            raise ValueError(f"features[{m}]: expected {self.width} units along dim {dim}, got shape {tuple(x.shape)}")
        x = x.detach().resolve_neg()
        return x if x.dtype in _FLOATS else x.to(torch.float32)

    def merge(self, other: Covariance) -> None:
        """Add the samples that another Covariance has seen; ``other`` keeps its own.

        Raises:
            TypeError: not a Covariance.
            ValueError: width, models, scope or device differ.
        """
        if not isinstance(other, Covariance):
            raise TypeError(f"other: expected a Covariance, got {type(other).__name__}")
        for name in ("width", "models", "scope", "device", "backend"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name} {mine!r}, got {theirs!r}")
        if other.count == 0:
            return
        if other is self or other._sums.dtype != self._sums.dtype or self.backend != "cpu":
            other = Covariance.from_state_dict(other.state_dict(), self.device, self.backend)
        if other._sums.dtype == torch.float64:
            self._sums.widen()
        elif self._sums.dtype == torch.float64:
            other._sums.widen()
        self._sums.flush()
        other._sums.flush()
        if self.count < other.count:
            # The shift of the larger share is the one near the common mean.
            self._sums.rebase(other._sums.vectors[0], other._sums.vectors[1])
        self._sums.merge(other._sums)

    def all_reduce(self, group: Any = None) -> None:
        """Pool the samples of all processes of a ``torch.distributed`` group; every process gets the same result.

        Args:
            group: the process group; None for the default one.

        Raises:
            ValueError: width, models or scope differ between processes.
        """
        import torch.distributed as dist

        sums = self._sums
        sums.flush()
        wide = int(sums.dtype == torch.float64)
        mine = torch.tensor([self.width, self.models, self.scope == "cross", wide, self.count], device=self.device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        ranks = torch.stack(gathered).cpu()
        if not bool((ranks[:, :3] == ranks[0, :3]).all()):
            raise ValueError(f"all_reduce: processes differ in (width, models, cross): {ranks[:, :3].tolist()}")
        if bool(ranks[:, 3].any()):
            sums.widen()
        largest = int(ranks[:, 4].argmax())
        source = dist.get_global_rank(group, largest) if group is not None else largest
        base = sums.vectors[:2].clone()
        dist.broadcast(base, source, group=group)
        sums.rebase(base[0], base[1])
        totals = sums.vectors[2:].clone()
        dist.all_reduce(sums.gram, group=group)
        dist.all_reduce(totals, group=group)
        sums.load(sums.gram, torch.cat((base, totals)), int(ranks[:, 4].sum()), sums.dtype)

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._sums.count

    @property
    def mean(self) -> Tensor:
        """Means: (models, width), float32, or float64 if an input was.

        Raises:
            ValueError: no samples were seen.
        """
        shift, scale, sums, _ = self._moments("mean")
        mean: Tensor = shift + sums / scale
        return mean.to(self._sums.dtype)

    @property
    def variance(self) -> Tensor:
        """Population variances: (models, width), float32, or float64 if an input was.

        Raises:
            ValueError: no samples were seen.
        """
        _, scale, sums, squares = self._moments("variance")
        variance: Tensor = (squares - sums.square()).clamp(min=0.0) / scale.square()
        return variance.to(self._sums.dtype)

    def _moments(self, name: str) -> Tensor:
        """Shift, scale and mean first and second moments about the shift: (4, models, width)."""
        self._require_samples(name)
        moments = self._sums.vectors[:, self._sums.positions.to(self.device)].clone()
        moments[2:] /= self.count
        return moments

    def _require_samples(self, name: str) -> None:
        if self.count == 0:
            raise ValueError(f"{name}: expected at least one sample, got none; call update first")

    def correlation(self) -> Tensor:
        """Correlations of the units; calling it twice gives the same result.

        Returns:
            float32 (float64 if an input was); "full": (models*width, models*width), rows model-major, exactly
            symmetric; "cross": (models-1, width, width), [m-1, i, j] belonging to unit i of model 0 and unit j of
            model m. A dead unit (deviation <= 1e-7 of its root mean square) has 0 with all others and 1 with itself.

        Raises:
            ValueError: no samples were seen.
        """
        return self.correlation_blocks(self.scope)

    def correlation_blocks(self, scope: str) -> Tensor:
        """``correlation`` in either scope; a "cross" Covariance has no "full" one."""
        self._require_samples("correlation")
        if scope == "full" and self.scope == "cross":
            raise ValueError('scope: a "cross" Covariance cannot give "full" correlations')
        return self._sums.correlation(scope == "cross")

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """Everything ``from_state_dict`` needs: integers, and copies of tensors, or with ``copy=False`` themselves."""
        sums = self._sums
        sums.flush()
        return {
            "width": self.width,
            "models": self.models,
            "cross": int(self.scope == "cross"),
            "block": sums.block,
            "count": self.count,
            "wide": int(sums.dtype == torch.float64),
            "gram": sums.gram.clone() if copy else sums.gram,
            "vectors": sums.vectors.clone() if copy else sums.vectors,
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], device: torch.device | str | None = None, backend: str = "auto"
    ) -> Covariance:
        """Build the Covariance that ``state_dict`` described.

        Args:
            state: what ``state_dict`` returned; integers may be 0-dimensional tensors.
            device: where to put it; None: where the state's tensors are.
            backend: as in the constructor; a state of another backend is converted.

        Raises:
            TypeError: not a mapping, or an entry of a wrong type.
            ValueError: an entry is missing or has a wrong shape.
        """
        integers = ("width", "models", "cross", "block", "count", "wide")
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, as state_dict() gives one, got {type(state).__name__}")
        missing = [key for key in (*integers, "gram", "vectors") if key not in state]
        if missing:
            raise ValueError(f"state: expected the entries of Covariance.state_dict(), missing {missing}")
        for key in integers:
            if not isinstance(state[key], int | Tensor) or (isinstance(state[key], Tensor) and state[key].numel() != 1):
                raise TypeError(f"state: expected an integer as {key!r}, got {state[key]!r}")
        width, models, cross, block, count, wide = (int(state[key]) for key in integers)
        gram, vectors = state["gram"], state["vectors"]
        for key, value in (("gram", gram), ("vectors", vectors)):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"state: expected a floating tensor as {key!r}, got {got}")
        made = cls(width, models, _SCOPES[bool(cross)], gram.device if device is None else device, backend)
        if block != made._sums.block:
            gram, vectors = relayout(gram, vectors, width, models, bool(cross), block, made._sums.block)
        if gram.shape != made._sums.gram.shape or vectors.shape != made._sums.vectors.shape or count < 0:
            raise ValueError(
                f"state: expected gram of shape {tuple(made._sums.gram.shape)} and vectors of shape "
                f"{tuple(made._sums.vectors.shape)}, got {tuple(gram.shape)} and {tuple(vectors.shape)}"
            )
        made._sums.load(gram, vectors, count, torch.float64 if wide else torch.float32)
        return made

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Covariance.from_state_dict, (self.state_dict(), self.device, self.backend)

    def __repr__(self) -> str:
        kind = f"width={self.width}, models={self.models}, scope={self.scope!r}, backend={self.backend!r}"
        return f"Covariance({kind}, count={self.count})"


def relayout(
    gram: Tensor, vectors: Tensor, width: int, models: int, cross: bool, block: int, to_block: int
) -> tuple[Tensor, Tensor]:
    """Bring accumulators from blocks (block > 0) to a dense matrix (block 0) or back."""
    from mudsc_fast.backends.cpu_covariance import unit_positions

    size = max(block, to_block)
    positions = unit_positions(width, models, cross, size).flatten().to(vectors.device)
    units, rows = models * width, width if cross else models * width
    columns = units - width if cross else units
    down, across = -(-rows // size), -(-columns // size)
    dense = gram.new_zeros(down * size, across * size)
    if block:
        at = 0
        for i in range(down):
            first = 0 if cross else i
            band = gram[at : at + across - first]
            dense[i * size : (i + 1) * size, first * size :] = band.permute(1, 0, 2).reshape(size, -1)
            at += across - first
        return dense[:rows, :columns].contiguous(), vectors[:, positions]
    dense[:rows, :columns] = gram
    bands = [dense[i * size : (i + 1) * size, (0 if cross else i * size) :] for i in range(down)]
    blocks = torch.cat([band.reshape(size, -1, size).permute(1, 0, 2) for band in bands])
    padded = vectors.new_zeros(4, (down + across if cross else down) * size)
    padded[1] = 1.0
    padded[:, positions] = vectors
    return blocks.contiguous(), padded
