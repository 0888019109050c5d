"""Models run step by step: a forward pass that stops at every layer's output, for as long as somebody works on it.

Each pass runs in a thread of its own, of which only one moves at a time. Inside, a torch function mode sees every call:
the layers are found by the parameters they are called with, so nothing has to be known about the modules around them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mudsc_fast.batches import feed
from mudsc_fast.repairs.resting import Rest, tensors_in

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2}
_NORMS = {F.group_norm: 1, F.layer_norm: -1}  # with the dim of their units
# Questions about a tensor, which read none of its numbers.
_METADATA = {
    "size", "dim", "numel", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size",
    "get_device", "__len__", "__hash__", "shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "requires_grad",
    "layout",
    "is_sparse", "is_nested", "is_quantized", "is_meta", "names", "grad_fn", "is_leaf", "_is_view", "is_mps", "is_xpu",
}  # fmt: skip
# Where these give their input back, nothing has happened to it.
_PASSING = {F.dropout, F.dropout2d, torch.dropout, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.type}


@dataclass
class Call:
    """A layer's call in one forward pass.

    weight, bias: the names of its parameters. apply(x, weight, bias): the same operation with other parameters.
    kernel: sizes of a convolution's kernel, () for a linear layer; stride, padding, dilation, groups: its own.
    x: its input. y: its output, after the batch norm that follows it. norm: this batch norm's module name, or None.
    skip: what y is about to be added to, if that is the next thing that happens to it.
    """

    weight: str
    bias: str | None
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    y: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | None = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    norm: str | None = None
    skip: Tensor | None = None
    attended: int = 0  # attention calls before this one
    # The dim of the units, where the layer only multiplies and shifts each unit by itself: a norm's own parameters.
    each: int | None = None

    @property
    def dim(self) -> int:
        """The dim of y that holds the layer's units."""
        return self.each if self.each is not None else 1 if self.kernel else -1


class _Stop(BaseException):
    """Ends a pass that nobody wants to finish."""


class Walk:
    """One forward pass of a model on one batch, stopped at its layers.

    `step()` runs to the next layer and gives its Call, or None at the end. What is written into `call.y` in place
    before the next `step()` is what the rest of the pass sees. With `rest`, what the pass holds lies in its file
    between two steps; the Call's tensors too, for which `rest.present` is there.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        device: torch.device,
        layers: Mapping[int, str],
        norms: Mapping[int, str],
        rest: Rest | None = None,
    ) -> None:
        self._mode = _Watch(layers, norms, self._pause, rest)
        self._rest = rest
        self._model, self._batch, self._device = model, batch, device
        self._go, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        self._event: Call | None = None
        self._error: BaseException | None = None
        self._stopping = self.done = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> Call | None:
        """The next layer's Call, or None when the pass has ended; errors of the model come out here."""
        self._event = None
        self._go.release()
        self._ready.acquire()
        if self._error is not None:
            raise self._error
        if self._rest is not None:
            leave = self._rest.finished if self._event is None else self._rest.put_away
            leave(id(self._mode))
        return self._event

    def close(self) -> None:
        """Give up the rest of the pass."""
        if self._thread.is_alive() and not self.done:
            self._stopping = True
            self._go.release()
            self._thread.join()

    @property
    def token(self) -> int | None:
        """The one position of a sequence that the model went on with, such as the class token's; None without one."""
        return self._mode.token

    @property
    def attention(self) -> int:
        """Number of attention calls so far."""
        return self._mode.attended

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopping:
                with torch.no_grad(), self._mode:
                    feed(self._model, self._batch, self._device)
                self._mode.settle_all()
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked for the step
            self._error = error
        self.done = True
        self._ready.release()

    def _pause(self, call: Call) -> None:
        self._event = call
        self._ready.release()
        self._go.acquire()
        if self._stopping:
            raise _Stop


class _Watch(TorchFunctionMode):
    """Finds layers, follows their outputs to whoever reads them first, and pauses there."""

    def __init__(
        self, layers: Mapping[int, str], norms: Mapping[int, str], pause: Callable[[Call], None], rest: Rest | None
    ) -> None:
        super().__init__()
        self._layers, self._norms, self._pause, self._rest = layers, norms, pause, rest
        self._pending: dict[int, Call] = {}
        self.token: int | None = None
        self.attended = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in _METADATA:
            return func(*args, **kwargs)
        if func in _PASSING and args and id(args[0]) in self._pending:
            result = self._run(func, args, kwargs)
            if result is args[0]:
                return result
        if self._pending:
            norm = self._norms.get(id(args[1])) if func is F.batch_norm and len(args) > 1 else None
            if norm is not None and id(args[0]) in self._pending and self._pending[id(args[0])].norm is None:
                call = self._pending.pop(id(args[0]))
                call.norm = norm
                return self._wait(call, self._run(func, args, kwargs))
            self._settle(func, args, kwargs)
        if func is F.scaled_dot_product_attention or func in (torch.softmax, F.softmax, Tensor.softmax):
            self.attended += 1
        if func is Tensor.__getitem__:
            self._note_token(*args)
        result = self._run(func, args, kwargs)
        found = self._layer(func, args, kwargs, result)
        return result if found is None else self._wait(found, result)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._rest is None:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        self._rest.before(given)
        result = func(*args, **kwargs)
        self._rest.after(id(self), given, tensors_in(result))
        return result

    def _wait(self, call: Call, y: Tensor) -> Tensor:
        call.y = y
        self._pending[id(y)] = call
        return y

    def _settle(self, func: Any, args: Any, kwargs: Any) -> None:
        """Pause for the layers whose outputs this call reads."""
        read = [call for x in tensors_in((args, kwargs)) if (call := self._pending.get(id(x))) is not None]
        if not read:
            return
        pair = [x for x in args[:2] if isinstance(x, Tensor)]
        if (
            func in _ADDS
            and len(pair) == 2
            and pair[0].shape == pair[1].shape
            and not kwargs
            and pair[0] is not pair[1]
        ):
            # Where both sides are layers (a shortcut's convolution), the one called later is settled by itself.
            order = list(self._pending.values())
            read.sort(key=order.index, reverse=True)
            for call in read[:-1]:
                self._finish(call)
            last = read[-1]
            last.skip = pair[1] if pair[0] is last.y else pair[0]
            self._finish(last)
            return
        for call in read:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        if self._pending.pop(id(call.y), None) is not None:
            self._pause(call)

    def settle_all(self) -> None:
        """Pause for the layers whose outputs nobody read: the model's own outputs."""
        for call in list(self._pending.values()):
            self._finish(call)

    def _note_token(self, x: Any, index: Any) -> None:
        if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point() and isinstance(index, tuple):
            whole = isinstance(index[0], slice) and index[0] == slice(None)
            if len(index) in (2, 3) and whole and isinstance(index[1], int):
                self.token = index[1]

    def _layer(self, func: Any, args: Any, kwargs: Any, result: Any) -> Call | None:
        if func is F.linear:
            given = _named(("input", "weight", "bias"), args, kwargs)
            weight = self._layers.get(id(given["weight"]))
            if weight is None:
                return None
            bias = self._layers.get(id(given.get("bias")))
            return Call(weight, bias, F.linear, given["input"], result, attended=self.attended)
        if func in _NORMS:
            given = _named(("input", "by", "weight", "bias"), args, kwargs)
            weight = self._layers.get(id(given.get("weight")))
            bias = self._layers.get(id(given.get("bias")))
            if weight is None or bias is None or given["weight"].dim() != 1:
                return None
            return Call(weight, bias, F.linear, given["input"], result, attended=self.attended, each=_NORMS[func])
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = _named(names, args, kwargs)
            weight = self._layers.get(id(given["weight"]))
            if weight is None:
                return None
            dims = _CONVOLUTIONS[func]
            options = [
                given.get(key, default)
                for key, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
            ]

            def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                y: Tensor = func(x, w, b, *options)
                return y

            padding = options[1]
            return Call(
                weight, self._layers.get(id(given.get("bias"))), apply, given["input"], result,
                tuple(given["weight"].shape[2:]), _pair(options[0], dims),
                None if isinstance(padding, str) else _pair(padding, dims), _pair(options[2], dims), options[3],
                attended=self.attended,
            )  # fmt: skip
        return None


def _pair(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _named(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}
