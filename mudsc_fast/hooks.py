"""Forward hooks that hand the activations of all models at one module port to a callback, and keep nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Port = tuple[str, str]  # module name, "input" or "output"


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or mapping, searched in order."""
    if isinstance(value, Tensor):
        return value
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


class Recorder:
    """Collects what the ports of several models see during one batch.

    The models run one after another (`running(m)` around each); when the last one reaches a port, `sink(port,
    activations)` is called with one tensor a model and all of them are dropped.
    """

    def __init__(
        self, models: Sequence[nn.Module], ports: Sequence[Port], sink: Callable[[Port, list[Tensor]], None]
    ) -> None:
        self._sink = sink
        self._models = len(models)
        self._current = -1
        self._waiting: dict[Port, list[deque[Tensor]]] = {
            port: [deque() for _ in range(self._models - 1)] for port in ports
        }
        self._places = [
            (m, port, _module(model, port, f"model {m}")) for m, model in enumerate(models) for port in ports
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in place inside, all removed afterwards, also after an error."""
        handles = []
        try:
            for m, port, module in self._places:
                handles.append(self._attach(m, port, module))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._drop()

    @contextmanager
    def running(self, model: int) -> Iterator[None]:
        # The same module object may stand for several models; only the running one is heard.
        self._current = model
        try:
            yield
        finally:
            self._current = -1

    def end_batch(self) -> None:
        """Raise ValueError if a port was reached more often in an earlier model than in the last."""
        for port, queues in self._waiting.items():
            if any(queues):
                self._drop()
                raise ValueError(_unpaired(port))

    def _attach(self, m: int, port: Port, module: nn.Module) -> Any:
        if port[1] == "input":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(m, port, (args, kwargs))

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._take(m, port, output)

        return module.register_forward_hook(after)

    def _take(self, m: int, port: Port, value: Any) -> None:
        if self._current != m:
            return
        x = first_tensor(value)
        if x is None or not x.is_floating_point():
            kind = "nothing" if x is None else str(x.dtype)
            raise TypeError(f"tap {port[0]!r} ({port[1]}): expected a floating tensor, got {kind}")
        if m < self._models - 1:
            # A copy: an in-place ReLU or residual addition later in the forward would change the original.
            self._waiting[port][m].append(x.detach().clone())
            return
        queues = self._waiting[port]
        if not all(queues):
            raise ValueError(_unpaired(port))
        with torch.no_grad():
            self._sink(port, [*(queue.popleft() for queue in queues), x.detach()])

    def _drop(self) -> None:
        for queues in self._waiting.values():
            for queue in queues:
                queue.clear()


def _unpaired(port: Port) -> str:
    return f"tap {port[0]!r} ({port[1]}): the models call this module a different number of times"


def _module(model: nn.Module, port: Port, who: str) -> nn.Module:
    try:
        return model.get_submodule(port[0])
    except AttributeError:
        raise ValueError(f"tap {port[0]!r}: {who} ({type(model).__name__}) has no such module") from None
