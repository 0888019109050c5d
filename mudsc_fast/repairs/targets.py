"""What the merged net's own outputs are solved for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mudsc_fast.repairs.lockstep import Layer
from mudsc_fast.repairs.units import Rows

OUTPUTS = ("mean", "unit", "heads")
_CUTOFF = 1e-3  # of the largest singular value: heads that nearly repeat each other are not told apart


@dataclass(frozen=True)
class Target:
    """output: one of OUTPUTS. heads: float64 matrices, for "heads"."""

    output: str
    heads: tuple[Tensor, ...] = ()

    def applied(self, layer: Layer) -> Layer:
        """The layer, with the parents' outputs combined as wanted."""
        return layer if self.output == "mean" else replace(layer, rows=_Combined(self, layer.rows))

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """outputs: (..., features), one a model."""
        if self.output == "unit":
            lengths = [z.norm(dim=-1, keepdim=True) for z in outputs]
            level = torch.stack(lengths).mean(0)
            units = [z / n.clamp(min=1e-12) for z, n in zip(outputs, lengths, strict=True)]
            return torch.stack(units).mean(0) * level
        features = outputs[0].shape[-1]
        if len(self.heads) != len(outputs) or any(h.shape[1] != features for h in self.heads):
            shapes = [tuple(h.shape) for h in self.heads]
            raise ValueError(
                f"heads: expected one (classes, {features}) matrix for each of {len(outputs)} models, got {shapes}"
            )
        # z with heads[m] z = heads[m] z_m for all m. Where the heads' spans are orthogonal this is the sum of the
        # parents' outputs, each projected on the span of its own head.
        inverse = torch.linalg.pinv(torch.cat(self.heads), rtol=_CUTOFF)
        result, first = torch.zeros_like(outputs[0]), 0
        for z, head in zip(outputs, self.heads, strict=True):
            through = inverse[:, first : first + len(head)] @ head
            result += (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)) @ through.T.to(z)
            first += len(head)
        return result


class _Combined(Rows):
    """Rows of a model's own outputs that are not simply averaged."""

    def __init__(self, target: Target, rows: Rows) -> None:
        super().__init__(rows.labels, rows.scale, rows.size, rows.free)
        object.__setattr__(self, "_target", target)

    def expected(self, outputs: Sequence[Tensor], dim: int) -> Tensor:
        target: Target = self.__dict__["_target"]
        return target.combine([z.movedim(dim, -1) for z in outputs]).movedim(-1, dim)


def last_target(output: str, heads: Sequence[Tensor] | None, models: int) -> Target:
    """The checked Target."""
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    return (
        Target(output, tuple(h.double() for h in check_heads(heads, models))) if output == "heads" else Target(output)
    )


def check_heads(heads: Sequence[Tensor] | None, models: int) -> list[Tensor]:
    """The heads on the CPU: a finite floating (classes, features) matrix for each model, or ValueError."""
    given = list(heads or ())
    if len(given) != models:
        raise ValueError(
            f"heads: expected one (classes, features) matrix for each of {models} models, got {len(given)}"
        )
    for m, head in enumerate(given):
        if not isinstance(head, Tensor) or head.dim() != 2 or not head.is_floating_point() or not head.numel():
            what = f"shape {tuple(head.shape)}" if isinstance(head, Tensor) else type(head).__name__
            raise ValueError(f"heads: expected a floating (classes, features) matrix for model {m}, got {what}")
        if not bool(torch.isfinite(head).all()):
            raise ValueError(f"heads: NaN or inf in the matrix of model {m}")
    return [h.detach().cpu() for h in given]
