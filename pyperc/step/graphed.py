"""The step on a GPU: that of autograd, recorded as a CUDA graph once for each shape of its inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyperc.step.autograd import Autograd

# Ordinary steps of a shape before it is recorded: they make the optimizer's state and the libraries' workspaces.
WARM_UP = 3
_RECORDABLE = {"capturable": True, "fused": True, "foreach": False}


class Graphed(Autograd):
    """Replays what it recorded: kernels read the inputs and the learning rates from where the recording found them.

    Whatever else a recording depends on is part of its key; hooks and control flow in the model run as recorded. Not
    recorded are on_nan="raise", where the host decides between backward and update, and float64, as the optimizer's
    kernels take a learning rate that they read from memory in float32.
    """

    name = "cuda graph"

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.release()

    def release(self) -> None:
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, Callable[..., Tensor]] = {}
        self._rates: list[Tensor] = []

    def step(self, x: Any, y: Any, weight: Tensor | None, number: int) -> Tensor:
        inputs = (x, y, weight)
        double = any(p.dtype == torch.float64 for p in self.model.model.parameters())
        if self.raises or double or not all(isinstance(t, Tensor | None) for t in inputs):
            return super().step(x, y, weight, number)
        with self._recordable():
            key = self._key(inputs)
            if key not in self._recordings:
                self._seen[key] += 1
                if self._seen[key] <= WARM_UP:
                    return self._aside(lambda: super(Graphed, self).step(x, y, weight, number))
                self._recordings[key] = self._record(inputs, number)
            loss = self._recordings[key](*inputs)
        # A replay writes where autograd does not look.
        torch.autograd.graph.increment_version(self.trained())
        self.masters.written()
        return loss

    def _key(self, inputs: tuple[Tensor | None, ...]) -> Any:
        groups = self.optimizer.param_groups
        return (
            tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs),
            tuple((k, str(v)) for group in groups for k, v in group.items() if k not in ("params", "lr")),
            tuple((p.data_ptr(), p.requires_grad) for group in groups for p in group["params"]),
            tuple((p.data_ptr(), p.requires_grad) for p in self.model.model.parameters()),
            tuple(module.training for module in self.model.model.modules()),
            tuple(id(t) for state in self.optimizer.state.values() for t in state.values()),
        )

    @contextmanager
    def _recordable(self) -> Iterator[None]:
        """Within, the learning rates are tensors on the GPU, and the optimizer does nothing that waits for the GPU."""
        groups = self.optimizer.param_groups
        device = groups[0]["params"][0].device
        while len(self._rates) < len(groups):
            self._rates.append(torch.zeros((), device=device))
        own = [{name: group.get(name) for name in ("lr", *_RECORDABLE) if name in group} for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            rate.fill_(group["lr"])
            group.update({name: value for name, value in _RECORDABLE.items() if name in group}, lr=rate)
            for p in group["params"]:
                state = self.optimizer.state.get(p, {})
                if "step" in state:
                    state["step"] = state["step"].to(device)
        try:
            yield
        finally:
            for group, values in zip(groups, own, strict=True):
                group.update(values)

    def _record(self, inputs: tuple[Tensor | None, ...], number: int) -> Callable[..., Tensor]:
        kept = [None if t is None else t.detach().clone() for t in inputs]
        replay, loss = self._capture(lambda: super(Graphed, self).step(kept[0], kept[1], kept[2], number))

        def run(*inputs: Tensor | None) -> Tensor:
            for held, given in zip(kept, inputs, strict=True):
                if held is not None and given is not None:
                    held.copy_(given)
            replay()
            return loss.clone()

        return run

    @staticmethod
    def _aside(function: Callable[[], Tensor]) -> Tensor:
        """On a stream of its own, as the steps before a capture must run."""
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = function()
        current.wait_stream(stream)
        return result

    @staticmethod
    def _capture(function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result
