"""git-re-basin's functions, by the names and arguments of its PyTorch forks; JAX arrays go in and come out too.

A permutation says where new units come from: ``B_aligned = index_select(B, axis, perm)``. Permutations may be floats,
as the forks give them; results are int64.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mudsc_fast.assignment import assign
from mudsc_fast.covariance import Covariance
from mudsc_fast.regrouping import regroup

Axes = tuple[str | None, ...]

# The forks stop when no assignment gains more than this.
_PROGRESS = 1e-12
_OTHER_NAMES = {"fixed": "params_a", "to_permute": "params_b"}


class PermutationSpec(NamedTuple):
    """perm_to_axes: {permutation: [(tensor, axis)]}. axes_to_perm: {tensor: its permutation, or None, of each axis}."""

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, Axes]


def permutation_spec_from_axes_to_perm(axes_to_perm: dict[str, Axes]) -> PermutationSpec:
    """The whole spec from its tensor-wise half."""
    perm_to_axes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, permutations in axes_to_perm.items():
        for axis, permutation in enumerate(permutations):
            if permutation is not None:
                perm_to_axes[permutation].append((name, axis))
    return PermutationSpec(dict(perm_to_axes), axes_to_perm)


def mlp_permutation_spec(num_hidden_layers: int) -> PermutationSpec:
    """Linear layers layer0, layer1, ... with one permutation P_i a hidden layer."""
    if num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers: expected 1 or more, got {num_hidden_layers}")
    ends: list[str | None] = [None, *(f"P_{i}" for i in range(num_hidden_layers)), None]
    axes: dict[str, Axes] = {}
    for i in range(num_hidden_layers + 1):
        axes[f"layer{i}.weight"] = (ends[i + 1], ends[i])
        axes[f"layer{i}.bias"] = (ends[i + 1],)
    return permutation_spec_from_axes_to_perm(axes)


def get_permuted_param(
    ps: PermutationSpec, perm: Mapping[str, Any], k: str, params: Mapping[str, Any], except_axis: int | None = None
) -> Any:
    """Tensor k of params with all its axes but except_axis permuted.

    Raises ValueError, naming the permutation, for one that does not have each unit of the axis once.
    """
    back, w = _taken(params[k])
    found = {}
    for axis, p in enumerate(_axes(ps, k)):
        if p is not None and axis != except_axis:
            if axis >= w.dim():
                raise ValueError(f"ps: {k} has no axis {axis} for {p!r}, its shape is {tuple(w.shape)}")
            found[p] = _indices(p, perm, w.shape[axis])
    return back(_permuted(ps, found, k, w, except_axis))


def apply_permutation(ps: PermutationSpec, perm: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """All of params, permuted: B's own function in A's unit order.

    Raises ValueError for a tensor that the spec does not name: left as it is, it could be wrong.
    """
    return {k: get_permuted_param(ps, perm, k, params) for k in params}


def weight_matching(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """``weight_matching(ps, params_a, params_b, max_iter=100, init_perm=None)``: {P: permutation of params_b}.

    Coordinate descent on the inner products of weights (git-re-basin section 3.2), in the order of the global random
    generator as in the forks. A random key or ``torch.Generator`` in front of ps, or ``rng=``, gives an order of its
    own, as in the JAX code. ``silent`` is accepted, and so are ccmm's ``fixed`` and ``to_permute``; nothing is printed.

    params: mappings of tensors or JAX arrays, on one device. init_perm is not changed. int64 comes back (JAX arrays for
    JAX arrays). Raises ValueError, naming the tensor, for missing tensors and sizes that disagree.
    """
    if args and not hasattr(args[0], "perm_to_axes"):
        kwargs["rng"], *rest = args
        args = tuple(rest)
    for theirs, ours in _OTHER_NAMES.items():
        if theirs in kwargs:
            kwargs[ours] = kwargs.pop(theirs)
    return _weight_matching(*args, **kwargs)


def _weight_matching(
    ps: PermutationSpec,
    params_a: Mapping[str, Any],
    params_b: Mapping[str, Any],
    max_iter: int = 100,
    init_perm: Mapping[str, Any] | None = None,
    rng: Any = None,
    silent: bool = True,
) -> dict[str, Any]:
    if not hasattr(ps, "perm_to_axes") or not hasattr(ps, "axes_to_perm"):
        raise TypeError(f"ps: expected a PermutationSpec, got {type(ps).__name__}")
    for argument, params in (("params_a", params_a), ("params_b", params_b)):
        if not isinstance(params, Mapping):
            raise TypeError(f"{argument}: expected a mapping of tensors or arrays, got {type(params).__name__}")
    if not isinstance(max_iter, SupportsIndex) or operator.index(max_iter) < 0:
        raise ValueError(f"max_iter: expected a number of iterations, got {max_iter!r}")
    search = _Search(ps, params_a, params_b, init_perm)
    generator = _generator(rng)
    names = list(search.perm)
    for _ in range(max_iter):
        progress = False
        for k in torch.randperm(len(names), generator=generator):
            progress = search.visit(names[int(k)]) or progress
        if not progress:
            break
    return {name: search.back(indices) for name, indices in search.perm.items()}


# What help() and editors show: the arguments by their names.
weight_matching.__signature__ = inspect.signature(_weight_matching)  # type: ignore[attr-defined]


class _Search:
    """The permutations as they stand, and one visit of coordinate descent."""

    def __init__(
        self,
        ps: PermutationSpec,
        params_a: Mapping[str, Any],
        params_b: Mapping[str, Any],
        init_perm: Mapping[str, Any] | None,
    ) -> None:
        self.ps = ps
        names = {name for axes in ps.perm_to_axes.values() for name, _ in axes}
        self.a, self.b = ({name: _given(params, name) for name in names} for params in (params_a, params_b))
        self.back: Callable[[Tensor], Any] = _taken(params_a[next(iter(names))])[0] if names else _same
        sizes: dict[str, int] = {}
        for p, axes in ps.perm_to_axes.items():
            for name, axis in axes:
                for params in (self.a, self.b):
                    shape = params[name].shape
                    if axis >= len(shape) or shape[axis] != sizes.setdefault(p, shape[axis]):
                        raise ValueError(f"{name}: expected {sizes.get(p)} units on axis {axis}, got {tuple(shape)}")
        if init_perm is None:
            self.perm = {p: torch.arange(n) for p, n in sizes.items()}
        else:
            self.perm = {p: _indices(p, init_perm, n, "init_perm") for p, n in sizes.items()}
        self._near = {p: self._neighbours(p) for p in sizes}
        self._seen: dict[str, list[Tensor]] = {}

    def _neighbours(self, p: str) -> list[str]:
        return sorted({q for name, _ in self.ps.perm_to_axes[p] for q in _permutations(self.ps, name)} - {p})

    def visit(self, p: str) -> bool:
        """Rematch one permutation; True if that gained something."""
        near = [self.perm[q] for q in self._near[p]]
        seen = self._seen.get(p)
        # With its neighbours as they were, the same products and the same answer come out again.
        if seen is not None and all(x is y for x, y in zip(seen, near, strict=True)):
            return False
        self._seen[p] = near
        products = self._products(p)
        if not bool(products.isfinite().all()):
            raise ValueError(f"params: {self._not_finite(p)} holds NaN or infinity, or values whose products overflow")
        found = assign(products).indices.cpu()
        rows = torch.arange(len(found))
        products = products.to("cpu", torch.float64)
        old, new = products[rows, self.perm[p]].sum(), products[rows, found].sum()
        if not torch.equal(found, self.perm[p]):
            self.perm[p] = found
        return bool(new > old + _PROGRESS)

    def _not_finite(self, p: str) -> str:
        names = [name for name, _ in self.ps.perm_to_axes[p]]
        return next((n for n in names for params in (self.a, self.b) if not params[n].isfinite().all()), names[0])

    def _products(self, p: str) -> Tensor:
        total: Tensor | None = None
        for name, axis in self.ps.perm_to_axes[p]:
            w_a = self.a[name].movedim(axis, 0).flatten(1) if self.a[name].dim() > 1 else self.a[name][:, None]
            permuted = _permuted(self.ps, self.perm, name, self.b[name], axis)
            w_b = permuted.movedim(axis, 0).flatten(1) if permuted.dim() > 1 else permuted[:, None]
            dtype = torch.float64 if w_a.dtype == torch.float64 else torch.float32
            w_a, w_b = w_a.to(dtype), w_b.to(dtype)
            total = w_a @ w_b.T if total is None else total.addmm_(w_a, w_b.T)
        if total is None:
            raise ValueError(f"ps: {p!r} has no axes")
        return total


def activation_matching(
    ps: PermutationSpec,
    acts_a: Mapping[str, Any],
    acts_b: Mapping[str, Any],
    dim: int = -1,
) -> dict[str, Any]:
    """{P: permutation of model B} by the correlation of activations (git-re-basin section 3.1), one assignment a P.

    acts: {P: (samples, units)}, or a sequence of batches of it, both models on the same samples. dim: the units' axis.
    Raises ValueError for a P without activations. ps may be None: then all that acts_a holds.
    """
    result = {}
    for p in acts_a if ps is None else ps.perm_to_axes:
        if p not in acts_a or p not in acts_b:
            raise ValueError(f"acts: no activations of {p!r}")
        batches = [_batches(acts[p]) for acts in (acts_a, acts_b)]
        if len(batches[0]) != len(batches[1]) or not batches[0]:
            raise ValueError(f"acts[{p!r}]: expected as many batches of both models, got {[len(b) for b in batches]}")
        back, first = _taken(batches[0][0])
        covariance = Covariance(first.shape[dim], scope="cross", device=first.device)
        for a, b in zip(*batches, strict=True):
            covariance.update([_taken(a)[1], _taken(b)[1]], dim=dim)
        result[p] = back(assign(covariance.correlation()[0]).indices.cpu())
    return result


def _batches(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def _axes(ps: PermutationSpec, name: str) -> Axes:
    if name not in ps.axes_to_perm:
        raise ValueError(f"ps: axes_to_perm has no tensor {name!r}; name it with None for axes that stay")
    return ps.axes_to_perm[name]


def _permutations(ps: PermutationSpec, name: str) -> Iterable[str]:
    return [p for p in _axes(ps, name) if p is not None]


def _permuted(ps: PermutationSpec, perm: Mapping[str, Tensor], name: str, w: Tensor, except_axis: int | None) -> Tensor:
    for axis, p in enumerate(ps.axes_to_perm[name]):
        if p is None or axis == except_axis:
            continue
        indices = perm[p]
        if not torch.equal(indices, torch.arange(len(indices))):
            labels = torch.empty_like(indices)
            labels[indices] = torch.arange(len(indices))
            w = regroup(w, labels.to(w.device), axis, len(indices))
    return w


def _indices(p: str, perm: Mapping[str, Any], size: int, argument: str = "perm") -> Tensor:
    """A permutation as int64 on the CPU, from floats, ints or an array of another kind."""
    if p not in perm:
        raise ValueError(f"{argument}: no permutation {p!r}; there are {', '.join(map(str, perm))}")
    given = _taken(torch.as_tensor(perm[p]) if isinstance(perm[p], list | tuple) else perm[p])[1].cpu()
    if given.dim() != 1 or not torch.equal(given.to(torch.float64).sort().values, torch.arange(size).double()):
        raise ValueError(f"{argument}[{p!r}]: expected each of 0..{size - 1} once, got {_shown(given)}")
    return given.to(torch.int64)


def _shown(given: Tensor) -> str:
    return f"shape {tuple(given.shape)}" if given.dim() != 1 or len(given) > 8 else str(given.tolist())


def _given(params: Mapping[str, Any], name: str) -> Tensor:
    if name not in params:
        raise ValueError(f"params: no tensor {name!r}, which the spec names")
    return _taken(params[name])[1]


def _same(x: Tensor) -> Tensor:
    return x


def _taken(x: Any) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The array as a tensor through DLPack, and the function that takes results back to its kind."""
    if isinstance(x, Tensor):
        return _same, x.detach()
    if type(x).__module__.split(".")[0] in ("jax", "jaxlib"):
        return importlib.import_module("jax.numpy").from_dlpack, _from_dlpack(x)
    if hasattr(x, "__array_interface__"):
        return Tensor.numpy, torch.from_numpy(np.array(x))
    if hasattr(x, "__dlpack__"):
        return _same, _from_dlpack(x)
    raise TypeError(f"params: expected tensors or arrays, got {type(x).__name__}")


def _generator(rng: Any) -> torch.Generator | None:
    """None: torch's global generator. A torch.Generator itself; a number or JAX key seeds one."""
    if rng is None or isinstance(rng, torch.Generator):
        return rng
    if isinstance(rng, int):
        return torch.Generator().manual_seed(rng)
    key: Any = importlib.import_module("jax.random").key_data(rng)
    return torch.Generator().manual_seed(sum(int(word) for word in key))


def _from_dlpack(x: Any) -> Tensor:
    exchange: Any = torch
    tensor: Tensor = exchange.from_dlpack(x)
    return tensor
