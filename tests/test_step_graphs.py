"""When steps are recorded as a CUDA graph, with a recorder that needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from lte_compile.training.losses import LossWeights, MicroBatch
from lte_compile.training.step_graphs import MOST, STEPS_BEFORE, StepGraph

WEIGHTS = LossWeights(efficiency=0.5, watched=True)


class Recorder:
    """In place of torch.cuda.CUDAGraph: counts how often it is played back."""

    def __init__(self) -> None:
        self.played = 0

    def replay(self) -> None:
        self.played += 1


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        assert other is not self


class Linear:
    """An objective whose gradient is the weight of the efficiency loss times the input."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 1, bias=False)
        self.calls: list[tuple[MicroBatch, LossWeights]] = []

    def __call__(self, part: MicroBatch, weights: LossWeights) -> Tensor:
        self.calls.append((part, weights))
        loss: Tensor = (weights.efficiency * self.model(part.inputs["x"])).sum()
        return loss

    def is_gradient_of(self, part: MicroBatch) -> bool:
        gradient = self.model.weight.grad
        return gradient is not None and torch.allclose(gradient, 0.5 * part.inputs["x"].sum(0, keepdim=True))


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    @contextmanager
    def recording(graph: Recorder, stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return recorder


def _part(rows: int = 2, *, padded: bool = False) -> MicroBatch:
    inputs = {"x": torch.randn(rows, 3), "attention_mask": torch.ones(rows, 3)}
    return MicroBatch(inputs=inputs, label_share=1.0, token_share=1.0, row_share=1.0, is_full=not padded)


def _steps(steps: StepGraph, *parts: MicroBatch) -> None:
    for part in parts:
        steps.backward(part, WEIGHTS)


def test_the_fourth_step_of_a_shape_is_recorded_and_played(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    assert STEPS_BEFORE == 3
    _steps(steps, _part(), _part(1), _part(), _part())
    assert recorder.played == 0
    assert len(objective.calls) == 4
    _steps(steps, _part(), _part())
    assert recorder.played == 2
    assert len(objective.calls) == 5


def test_a_step_before_the_recording_gives_loss_and_gradient() -> None:
    objective = Linear()
    steps, part = StepGraph(objective.model, objective), _part()
    loss = steps.backward(part, WEIGHTS)
    assert not loss.requires_grad
    assert torch.equal(loss, (0.5 * objective.model(part.inputs["x"])).sum())
    assert objective.is_gradient_of(part)


def test_a_recording_gets_each_steps_inputs_and_weights(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    _steps(steps, *[_part()] * (STEPS_BEFORE + 1))
    recorded, weights = objective.calls[-1]
    part = _part()
    objective.model.zero_grad()
    steps.backward(part, LossWeights(efficiency=0.25, watched=True))
    assert recorder.played == 2
    assert torch.equal(recorded.inputs["x"], part.inputs["x"])
    assert float(weights.efficiency) == 0.25
    assert objective.model.weight.grad is not None


def test_every_shape_has_a_recording_of_its_own(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    _steps(steps, *[_part(rows) for rows in (2, 3) for _ in range(STEPS_BEFORE)])
    assert recorder.played == 0
    _steps(steps, *[_part(rows) for rows in (2, 3, 2, 3, 2)])
    assert recorder.played == 5
    _steps(steps, _part(1))
    assert recorder.played == 5
    assert len(objective.calls) == 2 * (STEPS_BEFORE + 1) + 1


def test_no_more_recordings_than_there_is_room_for(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    _steps(steps, *[_part(rows) for _ in range(STEPS_BEFORE + 2) for rows in range(1, MOST + 3)])
    assert recorder.played == 2 * MOST
    recordings, launched_later = MOST, 2 * 2
    assert len(objective.calls) == (MOST + 2) * STEPS_BEFORE + recordings + launched_later


def test_one_recording_serves_all_masks_of_a_shape(recorder: Recorder) -> None:
    """A batch that happens to have no padding is one more mask; only where none has any are masks left out."""
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    _steps(steps, *[_part(padded=True)] * (STEPS_BEFORE + 1), _part(padded=False))
    assert recorder.played == 2
    assert not objective.calls[-1][0].is_full


def test_what_cannot_be_recorded_is_said_once(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    attempts: list[Recorder] = []

    @contextmanager
    def refusing(graph: Recorder, stream: Stream) -> Iterator[None]:
        attempts.append(graph)
        yield
        if len(attempts) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    _steps(steps, *[_part()] * STEPS_BEFORE)
    objective.model.zero_grad()
    part = _part()
    with pytest.warns(UserWarning, match=r"no CUDA graph \(operation not permitted"):
        steps.backward(part, WEIGHTS)
    assert objective.is_gradient_of(part)  # of one backward pass
    _steps(steps, _part())
    assert recorder.played == 0
    assert len(attempts) == 2  # the one that failed, and an empty one that puts the generator right
