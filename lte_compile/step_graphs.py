"""A training step's forward and backward pass as one CUDA graph.

A small model's kernels take a few microseconds each, less than the host needs to launch them one by one. Steps of one
shape are the same kernels on the same memory, so after a few of them the next one is recorded, and from then on played
back: inputs and loss weights are copied to where the recording reads them, gradients appear where it wrote them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.losses import LossWeights, MicroBatch

Objective: TypeAlias = Callable[[MicroBatch, LossWeights], Tensor]
# Steps of one shape before recording: one runs eagerly, one compiles, one meets all that is set up on first use.
STEPS_BEFORE = 3


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    part: MicroBatch
    weights: LossWeights
    loss: Tensor
    gradients: tuple[tuple[nn.Parameter, Tensor], ...]

    def play(self, part: MicroBatch, weights: LossWeights) -> Tensor:
        for name, value in part.inputs.items():
            self.part.inputs[name].copy_(value, non_blocking=True)
        for fixed, wanted in zip(_changing(self.weights), _changing(weights), strict=True):
            if isinstance(fixed, Tensor):
                fixed.fill_(wanted)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()  # the next step overwrites it


class StepGraph:
    """Plays steps back once there were enough of one shape; `backward` gives None for those that it does not."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._objective = objective
        self._seen: Counter[Hashable] = Counter()
        self._recorded: Hashable = None
        self._recording: _Recording | None = None

    def backward(self, part: MicroBatch, weights: LossWeights) -> Tensor | None:
        """The loss, after its backward pass. Gradients must be None before it, and are only good until the next."""
        shape = _shape_of(part)
        self._seen[shape] += 1
        if self._recorded is None and self._seen[shape] > STEPS_BEFORE and part.is_unpadded:
            self._recorded = shape
            self._recording = self._record(part, weights)
        if self._recording is None or shape != self._recorded:
            return None
        return self._recording.play(part, weights)

    def _record(self, part: MicroBatch, weights: LossWeights) -> _Recording | None:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device, copy=True) for name, value in part.inputs.items()}
        fixed = replace(part, inputs=inputs), _on_device(weights, device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self._objective(*fixed)
                loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self._model.zero_grad(set_to_none=True)
            warnings.warn(
                f"steps are launched kernel by kernel, which is slower: no CUDA graph ({error})", stacklevel=2
            )
            return None
        gradients = tuple((p, p.grad) for p in self._model.parameters() if p.grad is not None)
        return _Recording(graph, *fixed, loss.detach(), gradients)


def _shape_of(part: MicroBatch) -> Hashable:
    """What a recording has in it and cannot change."""
    shapes = tuple((name, value.shape) for name, value in part.inputs.items())
    return shapes, part.label_share, part.token_share, part.row_share, part.is_full


def _changing(weights: LossWeights) -> tuple[float | Tensor, float | Tensor]:
    """Those that the controller or a ramp changes from step to step."""
    return weights.efficiency, weights.separability


def _on_device(weights: LossWeights, device: torch.device) -> LossWeights:
    """Changing weights where a recording reads them; a weight of zero stays out of it unless routers are watched."""
    if not weights.needs_routers:
        return weights
    efficiency, separability = (torch.tensor(float(weight), device=device) for weight in _changing(weights))
    return replace(weights, efficiency=efficiency, separability=separability if weights.separability else 0.0)
