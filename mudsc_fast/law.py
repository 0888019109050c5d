"""The law of a spec: a model regrouped by a random permutation of its spaces computes the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order of range(count), (count,) int64; not the identity, which would test nothing."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def shuffle(space: Space, block: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of a space, (width,) int64, whose new block b is old block block[b]."""
    each = space.width // space.blocks
    inner = torch.arange(each).repeat(space.blocks, 1)
    if space.within == "free":
        inner = torch.stack([shuffled(each, generator) for _ in range(space.blocks)])
    return (block[:, None] * each + inner).reshape(-1)


def changes(
    spec: PermutationSpec,
    model: nn.Module,
    inputs: Any,
    seed: int,
    select: Callable[[Any], Any] | None,
    each: bool = True,
) -> dict[str, float]:
    """The largest relative change of the outputs in each trial (see PermutationSpec.verify_each), or of all alone."""
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    spec.check(state, [name for name, _ in model.named_modules()])
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            before = outputs(model, state, inputs, select)
            return {
                name: change(before, outputs(model, spec.permute(state, p), inputs, select))
                for name, p in (_trials(spec, seed) if each else {"all": spec.random_permutation(seed)}).items()
            }
    finally:
        for module, training in modes.items():
            module.training = training


def _trials(spec: PermutationSpec, seed: int) -> dict[str, dict[str, Tensor]]:
    full = spec.random_permutation(seed)
    trials: dict[str, dict[str, Tensor]] = {}
    for space in spec:
        if space.tie is None:
            trials[space.name] = {space.name: full[space.name]}
        else:
            generator = torch.Generator().manual_seed(seed)
            trials[space.name] = {space.name: shuffle(space, torch.arange(space.blocks), generator)}
    for tie, names in spec.ties.items():
        trials[f"tie {tie}"] = {n: full[n] for n in names}
    trials["all"] = full
    return trials


def outputs(
    model: nn.Module, state: dict[str, Tensor], inputs: Any, select: Callable[[Any], Any] | None
) -> list[Tensor]:
    """The floating tensors that a model with this state gives; the model itself is left as it is."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    # Names that share one tensor are given one each: a spec has to move them alike by itself.
    output = torch.func.functional_call(model, state, args, kwargs, tie_weights=False)
    found = list(floats((select or primary)(output)))
    if not found:
        raise ValueError("verify: the model returned no floating tensor")
    return found


def primary(output: Any) -> Any:
    """What a model is for: of an output with logits only these (not its hidden states or caches), else all of it."""
    if isinstance(output, Mapping):
        logits = {key: value for key, value in output.items() if str(key).startswith("logits")}
        return logits or output
    return output


def floats(output: Any) -> Iterator[Tensor]:
    """The floating tensors in a tensor, or in sequences and mappings of them."""
    if isinstance(output, Tensor):
        if output.dtype.is_floating_point:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from floats(value)


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative change of outputs; infinity for NaN or another shape."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            scale = a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)
            relative = float((a - b).abs().max() / scale)
            worst = max(worst, relative) if relative == relative else float("inf")
    return worst
