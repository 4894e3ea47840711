"""A training step's forward and backward pass as one CUDA graph.

A small model's kernels take a few microseconds each, less than the host needs to launch them one by one. Steps of one
shape are the same kernels on the same memory, so after a few of them the next one is recorded, and from then on played
back: inputs and loss weights are copied to where the recording reads them, gradients appear where it wrote them.
Texts come in many lengths; padded to a few of them (`length_multiple` of lte_compile.data.batches) there is a recording
for each, which computes with any mask.

Steps before and between recordings run on the stream that records. Autograd's nodes that add up a parameter's
gradient belong to the stream they were made on; where something keeps an earlier step's graph alive they are met again,
and one of the default stream would break the recording.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.running.memory import release_unused_memory
from lte_compile.training.losses import LossWeights, MicroBatch

Objective: TypeAlias = Callable[[MicroBatch, LossWeights], Tensor]
# Steps of one shape before recording: one runs eagerly, one compiles, one meets all that is set up on first use.
STEPS_BEFORE = 3
# Recordings at most; each holds a step's memory of its own. Texts of up to 128 tokens have eight lengths.
MOST = 8


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
        if self.part.rows is not None and part.rows is not None:
            self.part.rows.fill(part.rows)
        for fixed, wanted in zip(_changing(self.weights), _changing(weights), strict=True):
            if isinstance(fixed, Tensor):
                fixed.copy_(wanted) if isinstance(wanted, Tensor) else fixed.fill_(wanted)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        if self.part.rows is not None and part.rows is not None:
            part.rows.shift_B.grad = self.part.rows.shift_B.grad
        return self.loss.clone()  # the next step overwrites it


class StepGraph:
    """Runs a step's forward and backward pass; plays it back once there were enough of its shape."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._objective = objective
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._failed: torch.cuda.CUDAGraph | None = None  # kept: the allocator goes on asking it what it records
        self._has_padding = False

    def backward(self, part: MicroBatch, weights: LossWeights) -> Tensor:
        """The loss, after its backward pass. Gradients must be None before it, and are only good until the next."""
        part = self._like_the_padded(part)
        shape = _shape_of(part)
        self._seen[shape] += 1
        is_due = shape not in self._recordings and self._seen[shape] > STEPS_BEFORE
        if is_due and self._failed is None and len(self._recordings) < MOST:
            self._record(shape, part, weights)
        recording = self._recordings.get(shape)
        return self._launch(part, weights) if recording is None else recording.play(part, weights)

    def release(self) -> None:
        """Drop the recordings, and hand back their memory, which nothing else could use."""
        self._recordings.clear()
        release_unused_memory()

    def _launch(self, part: MicroBatch, weights: LossWeights) -> Tensor:
        """Kernel by kernel."""
        stream = _recording_stream(next(self._model.parameters()).device)
        before = torch.cuda.current_stream(stream.device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            loss = self._objective(part, weights)
            loss.backward()  # type: ignore[no-untyped-call]
        before.wait_stream(stream)
        return loss.detach()

    def _like_the_padded(self, part: MicroBatch) -> MicroBatch:
        """Where some batches have padding, those that happen to have none need no recording of their own."""
        self._has_padding |= not part.is_unpadded
        return replace(part, is_full=False) if self._has_padding else part

    def _record(self, shape: Hashable, part: MicroBatch, weights: LossWeights) -> None:
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device, copy=True) for name, value in part.inputs.items()}
        rows = None if part.rows is None else part.rows.copied_to(device)
        fixed = replace(part, inputs=inputs, rows=rows), _on_device(weights, device)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # graphs of earlier steps in reference cycles
        try:
            with _capturing(graph, device):
                loss = self._objective(*fixed)
                loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self._model.zero_grad(set_to_none=True)
            self._failed = graph
            _leave_recording(device)
            warnings.warn(
                f"steps are launched kernel by kernel, which is slower: no CUDA graph ({error})", stacklevel=2
            )
            return
        gradients = tuple((p, p.grad) for p in self._model.parameters() if p.grad is not None)
        self._recordings[shape] = _Recording(graph, *fixed, loss.detach(), gradients)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """As torch.cuda.graph, which does not leave its stream where the recording fails."""
    before = torch.cuda.current_stream(device)
    with torch.cuda.stream(before), torch.cuda.graph(graph, stream=_recording_stream(device)):
        yield


def _leave_recording(device: torch.device) -> None:
    """After one that failed the random generator still counts for a recording; the end of the next one stops that."""
    with _capturing(torch.cuda.CUDAGraph(), device):
        torch.zeros(1, device=device)


def _shape_of(part: MicroBatch) -> Hashable:
    """What a recording has in it and cannot change."""
    shapes = tuple((name, value.shape) for name, value in part.inputs.items())
    return shapes, part.label_share, part.token_share, part.row_share, part.is_full, part.rows is None


def _changing(weights: LossWeights) -> tuple[float | Tensor, float | Tensor]:
    """Those that the controller or a ramp changes from step to step."""
    return weights.efficiency, weights.separability


def _on_device(weights: LossWeights, device: torch.device) -> LossWeights:
    """Changing weights where a recording reads them; a weight of zero stays out of it unless routers are watched."""
    if not weights.needs_routers:
        return weights
    efficiency, separability = (
        torch.as_tensor(weight, dtype=torch.float32).to(device, copy=True) for weight in _changing(weights)
    )
    return replace(weights, efficiency=efficiency, separability=separability if weights.separability else 0.0)
