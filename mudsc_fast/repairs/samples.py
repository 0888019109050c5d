"""What a layer reads, as rows of a matrix: tokens and features as they are, convolutions' patches (im2col)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mudsc_fast.repairs.lockstep import Layer
from mudsc_fast.repairs.walking import Call

# Products a layer's Gram matrix may take, and samples a variable that it gets at least: a feature map has far more
# positions than its few hundred patch entries need.
_PRODUCTS = 4e9
_SAMPLES = 48


def patches(call: Call, positions: Tensor | None) -> Tensor:
    """(samples, kernel * inputs): the patches of a convolution at some positions of its output, or at all.

    Channels are the innermost: a patch is copied in pieces of all channels of one pixel.
    """
    pad = call.padding or ()
    x = F.pad(call.x, [p for size in reversed(pad) for p in (size, size)]).movedim(1, -1).contiguous()
    sizes = x.shape[1:-1]
    pitch = [_product(sizes[d + 1 :]) for d in range(len(sizes))]
    starts, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for d, kernel in enumerate(call.kernel):
        places = (sizes[d] - call.dilation[d] * (kernel - 1) - 1) // call.stride[d] + 1
        starts = (starts[:, None] + torch.arange(places) * (call.stride[d] * pitch[d])).flatten()
        offsets = (offsets[:, None] + torch.arange(kernel) * (call.dilation[d] * pitch[d])).flatten()
    starts = starts.to(x.device)
    if positions is not None:
        starts = starts[positions]
    pixels = (starts[:, None] + offsets.to(x.device)).flatten()
    return x.flatten(1, -2).index_select(1, pixels).reshape(-1, len(offsets) * x.shape[-1])


def as_weight(slope: Tensor, weight: Tensor) -> Tensor:
    """Coefficients of the columns of `patches` or of plain inputs, (outputs, inputs), in the weight's shape."""
    if weight.dim() == 2:
        return slope
    return slope.reshape(len(slope), *weight.shape[2:], weight.shape[1]).movedim(-1, 1).contiguous()


def at(values: Tensor, call: Call, positions: Tensor | None) -> Tensor:
    """(samples, outputs): an output-shaped tensor of the layer at the same samples as `patches` or `rows`."""
    if not call.kernel:
        return values.reshape(-1, values.shape[-1])
    flat = values.flatten(2).transpose(1, 2)  # (batch, positions, outputs)
    if positions is not None:
        flat = flat[:, positions]
    return flat.reshape(-1, values.shape[1])


def samples(layer: Layer, wide: int, weight: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, what is missing) of every batch: rows of what the merged layer reads, and target minus its output.

    wide: variables of the Gram matrix. weight: how often the token counts that the model goes on with.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = max(_SAMPLES * wide, int(_PRODUCTS / wide**2))
    for call, target in layer.targets():
        residual = target - call.y
        if call.kernel:
            places = _product(residual.shape[2:])
            every = places * residual.shape[0] * len(layer.calls)
            positions = None
            if every > limit:
                take = max(1, round(places * limit / every))
                positions = torch.randperm(places, generator=generator)[:take].to(residual.device)
            yield patches(call, positions), at(residual, call, positions)
            continue
        x, r = call.x, residual
        yield _rows(x, layer, weight), _rows(r, layer, weight)


def _rows(values: Tensor, layer: Layer, weight: int) -> Tensor:
    if layer.token is not None and values.dim() == 3 and values.shape[1] > 1:
        token = slice(layer.token, layer.token + 1 or None)
        if layer.alone:
            values = values[:, token]
        elif weight > 1:
            values = torch.cat((values, values[:, token].expand(-1, weight - 1, -1)), 1)
    return values.reshape(-1, values.shape[-1])


def _product(sizes: tuple[int, ...] | torch.Size) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
