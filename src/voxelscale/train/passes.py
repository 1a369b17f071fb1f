"""A worker's forward and backward pass, operation by operation or as one CUDA graph.

A network of a few hundred operations keeps the host busy for several milliseconds a step. Where a GPU is
done with them sooner, it waits. A CUDA graph is recorded once and started with one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from voxelscale.console import notice
from voxelscale.device import TRAINING_PRIORITY, autocast, other_stream

Work = Callable[[], object]

ALIKE = 1e-2
"""Relative L2 difference of a graph's gradients from those of single operations; bfloat16 and the order of
sums give less."""


def record(work: Work) -> Work:
    """Record what a function does on the GPU; gives what replays it."""
    graph = torch.cuda.CUDAGraph()
    # Replayed kernels have the priority of the stream that they were recorded on.
    stream = torch.cuda.Stream(priority=TRAINING_PRIORITY)  # type: ignore[no-untyped-call]
    # Other threads (validation, input) may allocate memory meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


class TrainingPass:
    """Forward pass, loss and backward pass of micro-batches; gradients are added to the parameters'.

    Args:
        model: as it is trained, wrapped by DistributedDataParallel or not.
        loss: output and target to a scalar, or to the scalar and a second figure.
        precision: float32 or bfloat16.
        device: where the model is.
        graph: whether to replay the pass as a CUDA graph. It is recorded when a second micro-batch has
            the shapes of the first; those of other shapes go operation by operation. So do all, after a
            notice, if it cannot be recorded or its gradients are not the same.
        recorder: records a function; of CUDA graphs, but in tests.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]],
        precision: torch.dtype,
        device: torch.device,
        graph: bool = False,
        recorder: Callable[[Work], Work] = record,
    ) -> None:
        self._model, self._loss, self._precision, self._device = model, loss, precision, device
        self._graph, self._recorder = graph, recorder
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._shapes: object = None
        self._replay: Work | None = None

    @property
    def recorded(self) -> bool:
        """Whether a graph has been recorded, and is replayed for micro-batches of its shapes."""
        return self._replay is not None

    def clear_gradients(self) -> None:
        """Before an update. A graph adds to the memory that it has been recorded with."""
        if self._replay is None:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            self._zero()

    def __call__(self, inputs: Any, target: Any, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """One micro-batch.

        Args:
            inputs: of the network, on its device.
            target: of the loss.
            weight: of its loss in the update.

        Returns:
            the loss and the figure beside it (NaN where the loss has none), scalars.
        """
        if self._graph and isinstance(inputs, Tensor) and isinstance(target, Tensor):
            shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (inputs, target)]
            if self._replay is None and self._shapes == shapes:
                self._record(inputs, target)
            if self._replay is not None and self._shapes == shapes:
                return self._replayed(inputs, target, weight)
            self._shapes = shapes if self._replay is None else self._shapes
        return self._eager(inputs, target, weight)

    def _eager(self, inputs: Any, target: Any, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self._device, self._precision):
            output = self._model(inputs)
        value = self._loss(output, target)
        loss, figure = value if isinstance(value, tuple) else (value, torch.full_like(value, math.nan))
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), figure.detach().mean()

    def _replayed(self, inputs: Tensor, target: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        assert self._replay is not None  # noqa: S101
        self._inputs.copy_(inputs)
        self._target.copy_(target)
        self._weight.fill_(weight)
        self._replay()
        loss, figure = self._figures.clone()  # the next replay writes over them
        return loss, figure

    def _record(self, inputs: Tensor, target: Tensor) -> None:
        """Record the pass and compare it with single operations; leaves weights and gradients alone."""
        self._inputs, self._target = inputs.clone(), target.clone()
        self._weight = torch.ones((), device=self._device)
        self._figures = torch.zeros(2, device=self._device)

        def work() -> None:
            self._figures.copy_(torch.stack(self._eager(self._inputs, self._target, self._weight)))

        try:
            with self._untouched():
                right = self._warmed_up(work)
                replay = self._recorder(work)
                self._zero()
                replay()
                alike = _alike(self._gradients(), right)
        except Exception as error:  # whatever a loss or a kernel raises, single operations remain
            reason = " ".join(str(error).split())[:200]
            notice(f"train: no CUDA graph, the pass goes operation by operation ({reason})")
            self._graph = False
        else:
            if not alike:
                notice("train: no CUDA graph: its gradients differ from those of single operations")
            self._graph, self._replay = alike, replay if alike else None

    def _warmed_up(self, work: Work) -> list[Tensor]:
        """Gradients by single operations, on a side stream, as libraries choose algorithms at first use."""
        with other_stream(self._device):
            for _ in range(3):
                self._zero()
                work()
        return [gradient.clone() for gradient in self._gradients()]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _zero(self) -> None:
        if gradients := self._gradients():
            torch._foreach_zero_(gradients)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Afterwards gradients and running statistics are as they were before."""
        buffers = list(self._model.buffers())
        before = [buffer.clone() for buffer in buffers]
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(torch.zeros_like(parameter) if gradient is None else gradient)


def _alike(found: list[Tensor], right: list[Tensor]) -> bool:
    """Whether gradients are the same but for rounding, all together and none of them NaN."""
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(found, right))).norm()
    size = torch.stack(torch._foreach_norm(right)).norm()
    return bool(apart <= ALIKE * size)
