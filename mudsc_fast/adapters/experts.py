"""Expert alignment for MC-SMoE-like mergers: lists of expert weights in, permutations of their hidden units out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mudsc_fast.assignment import assign

# Products of at most this many float32 are held at once: a layer of 128 experts is done in a few goes.
_HELD = 256 * 2**20 // 4


def permutations(
    ups: Sequence[Tensor] | Tensor,
    downs: Sequence[Tensor] | Tensor,
    gates: Sequence[Tensor] | Tensor | None = None,
    reference: int = 0,
) -> Tensor:
    """(experts, hidden) int64: expert e's unit ``result[e, i]`` stands for unit i of the reference expert.

    ups, gates: (hidden, features) an expert, what makes the hidden units; downs: (features, hidden), what reads them.
    Lists or stacked tensors, any floating dtype; products are taken in float32, assignments of a layer solved in
    batches. reference: an expert's number.

    Each assignment maximises the inner products of the units' weights over all of up, gate and down: the smallest
    distance in weight space, which is what MC-SMoE aligns by. Raises ValueError for shapes that do not fit.
    """
    units = _units(ups, downs, gates)
    experts, hidden, _ = units.shape
    if not isinstance(reference, int) or not 0 <= reference < experts:
        raise ValueError(f"reference: expected an expert 0..{experts - 1}, got {reference!r}")
    result = torch.empty(experts, hidden, dtype=torch.int64)
    batch = max(1, _HELD // (hidden * hidden))
    for first in range(0, experts, batch):
        part = units[first : first + batch]
        products = torch.matmul(units[reference].float(), part.float().transpose(1, 2))
        result[first : first + batch] = assign(products).indices.cpu()
    result[reference] = torch.arange(hidden)
    return result.to(units.device)


def permute(
    indices: Tensor,
    ups: Sequence[Tensor] | Tensor,
    downs: Sequence[Tensor] | Tensor,
    gates: Sequence[Tensor] | Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """(ups, downs) or (ups, downs, gates), stacked, with every expert in the reference's unit order; same functions.

    indices: (experts, hidden), as ``permutations`` gives them; floats are accepted. Raises ValueError for an expert
    whose indices are no permutation, and for shapes that do not fit.
    """
    hidden = _units(ups, downs, gates).shape[1]
    up, down = _stacked("ups", ups), _stacked("downs", downs)
    indices = torch.as_tensor(indices)
    if indices.shape != up.shape[:2]:
        raise ValueError(f"indices: expected shape {tuple(up.shape[:2])}, got {tuple(indices.shape)}")
    wrong = (indices.double().cpu().sort(1).values != torch.arange(hidden)).any(1)
    if wrong.any():
        raise ValueError(f"indices: expected each of 0..{hidden - 1} once for expert {int(wrong.int().argmax())}")
    indices = indices.to(up.device, torch.int64)
    moved = up.gather(1, indices[:, :, None].expand_as(up)), down.gather(2, indices[:, None, :].expand_as(down))
    if gates is None:
        return moved
    gate = _stacked("gates", gates)
    return *moved, gate.gather(1, indices[:, :, None].expand_as(gate))


def _units(
    ups: Sequence[Tensor] | Tensor, downs: Sequence[Tensor] | Tensor, gates: Sequence[Tensor] | Tensor | None
) -> Tensor:
    """(experts, hidden, columns): what each hidden unit is compared by."""
    up, down = _stacked("ups", ups), _stacked("downs", downs)
    parts = [up, down.transpose(1, 2)]
    if gates is not None:
        parts.append(_stacked("gates", gates))
    if any(part.shape[:2] != up.shape[:2] for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"ups, downs, gates: expected one number of experts and hidden units, got {shapes}")
    return torch.cat(parts, dim=2)


def _stacked(name: str, given: Sequence[Tensor] | Tensor) -> Tensor:
    tensors = list(given)
    if not tensors or any(not isinstance(t, Tensor) or t.dim() != 2 or not t.is_floating_point() for t in tensors):
        odd = next((t for t in tensors if not isinstance(t, Tensor)), tensors[0] if tensors else None)
        got = f"{odd.dtype} {tuple(odd.shape)}" if isinstance(odd, Tensor) else type(odd).__name__
        raise ValueError(
            f"{name}: expected a floating matrix for each expert, a tensor, got {got if tensors else 'none'}"
        )
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"{name}: expected one shape, got {sorted({tuple(t.shape) for t in tensors})}")
    return given.detach() if isinstance(given, Tensor) else torch.stack([t.detach() for t in tensors])
