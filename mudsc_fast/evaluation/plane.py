"""The plane through three networks, and the networks that lie on it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Closer to one line than this, as the sine of the angle at the first network, and the plane is made of rounding errors.
_FLAT = 1e-4


class Plane:
    """Coordinates on the plane through three state dicts: the first is the origin, the second lies on the x axis.

    state_dicts: three mappings of tensors with the same names and shapes. Coordinates are Euclidean distances in weight
        space, over all floating tensors. (Garipov et al., arXiv 1802.10026, appendix.)

    Raises ValueError or TypeError where names, shapes or dtypes disagree, a tensor is not finite, or the three lie on
    one line, as two aligned parents and their average do.
    """

    def __init__(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
        first, second, third = (_plain(state, k) for k, state in enumerate(state_dicts))
        check_alike([first, second, third])
        self._origin = first
        self.moving = [name for name, tensor in first.items() if tensor.is_floating_point()]
        x = {name: _wide(second[name]) - _wide(first[name]) for name in self.moving}
        length = _norm(x)
        if length == 0:
            raise ValueError("state_dicts: the first two networks are the same, so there is no plane through the three")
        self._x = {name: tensor / length for name, tensor in x.items()}
        away = {name: _wide(third[name]) - _wide(first[name]) for name in self.moving}
        along = sum(float((away[name] * self._x[name]).sum()) for name in self.moving)
        y = {name: away[name] - along * self._x[name] for name in self.moving}
        height = _norm(y)
        if height <= _FLAT * max(math.hypot(along, height), length):
            raise ValueError(
                "state_dicts: the three networks lie on one line, so there is no plane through them (an average lies "
                "between parents that are aligned with each other; give the parents as they were before aligning)"
            )
        self._y = {name: tensor / height for name, tensor in y.items()}
        self.corners = ((0.0, 0.0), (length, 0.0), (along, height))

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The state dict at a point, in the first network's dtypes; integer tensors are the first network's."""
        found = dict(self._origin)
        for name in self.moving:
            moved = _wide(self._origin[name]) + x * self._x[name] + y * self._y[name]
            found[name] = moved.to(self._origin[name].dtype)
        return found


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) of the first network and share of the second; integer tensors are the first's."""
    return {
        name: torch.lerp(_wide(tensor), _wide(second[name]), share).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def check_alike(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    """ValueError, naming the tensor, unless all have the same names and shapes and finite values."""
    first = state_dicts[0]
    for k, state in enumerate(state_dicts):
        odd = sorted(set(first) ^ set(state))
        if odd:
            raise ValueError(f"state_dicts: tensor {odd[0]!r} is not in both network 0 and network {k}")
        for name, tensor in state.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"state_dicts: {name!r} has shape {tuple(tensor.shape)} in network {k} and "
                    f"{tuple(first[name].shape)} in network 0; a plane needs networks of one width"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"state_dicts: {name!r} of network {k} holds NaN or inf")


def fingerprint(state_dicts: Sequence[Mapping[str, Tensor]]) -> str:
    """A digest of all names, shapes, dtypes and values, in whatever order the names come."""
    digest = hashlib.blake2b(digest_size=16)
    for state in state_dicts:
        for name in sorted(state):
            plain = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(state: Mapping[str, Tensor], which: int) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dicts: expected mappings of tensors, got {type(state).__name__} for network {which}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dicts: {name!r} of network {which} is no tensor but {type(tensor).__name__}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
