"""When steps are recorded as a CUDA graph, with a recorder that needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lte_compile.losses import LossWeights, MicroBatch
from lte_compile.step_graphs import MOST, STEPS_BEFORE, StepGraph

WEIGHTS = LossWeights(efficiency=0.5, watched=True)


class Recorder:
    """In place of torch.cuda.CUDAGraph: counts how often it is played back."""

    def __init__(self) -> None:
        self.played = 0

    def replay(self) -> None:
        self.played += 1


class Linear:
    """An objective whose gradient is the weight of the efficiency loss times the input."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 1, bias=False)
        self.calls: list[tuple[MicroBatch, LossWeights]] = []

    def __call__(self, part: MicroBatch, weights: LossWeights) -> Tensor:
        self.calls.append((part, weights))
        loss: Tensor = (weights.efficiency * self.model(part.inputs["x"])).sum()
        return loss


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    @contextmanager
    def recording(graph: Recorder) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return recorder


def _part(rows: int = 2, *, padded: bool = False) -> MicroBatch:
    inputs = {"x": torch.randn(rows, 3), "attention_mask": torch.ones(rows, 3)}
    return MicroBatch(inputs=inputs, label_share=1.0, token_share=1.0, row_share=1.0, is_full=not padded)


def test_the_fourth_step_of_a_shape_is_recorded_and_played(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    assert STEPS_BEFORE == 3
    assert [steps.backward(part, WEIGHTS) for part in (_part(), _part(1), _part(), _part())] == [None] * 4
    assert steps.backward(_part(), WEIGHTS) is not None
    assert len(objective.calls) == 1
    assert recorder.played == 1


def test_a_recording_gets_each_steps_inputs_and_weights() -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    for _ in range(STEPS_BEFORE + 1):
        steps.backward(_part(), WEIGHTS)
    [(recorded, weights)] = objective.calls
    part = _part()
    objective.model.zero_grad()
    assert steps.backward(part, LossWeights(efficiency=0.25, watched=True)) is not None
    assert torch.equal(recorded.inputs["x"], part.inputs["x"])
    assert float(weights.efficiency) == 0.25
    assert objective.model.weight.grad is not None


def test_every_shape_has_a_recording_of_its_own(recorder: Recorder) -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    for rows in (2, 3):
        for _ in range(STEPS_BEFORE):
            assert steps.backward(_part(rows), WEIGHTS) is None
        assert steps.backward(_part(rows), WEIGHTS) is not None
    assert len(objective.calls) == 2
    played = recorder.played
    assert all(steps.backward(_part(rows), WEIGHTS) is not None for rows in (2, 3, 2))
    assert recorder.played == played + 3
    assert steps.backward(_part(1), WEIGHTS) is None


def test_no_more_recordings_than_there_is_room_for() -> None:
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    results = [steps.backward(_part(rows), WEIGHTS) for _ in range(STEPS_BEFORE + 2) for rows in range(1, MOST + 3)]
    assert len(objective.calls) == MOST
    assert sum(result is not None for result in results) == 2 * MOST


def test_one_recording_serves_all_masks_of_a_shape() -> None:
    """A batch that happens to have no padding is one more mask; only where none has any are masks left out."""
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    for _ in range(STEPS_BEFORE + 1):
        steps.backward(_part(padded=True), WEIGHTS)
    assert steps.backward(_part(padded=False), WEIGHTS) is not None
    [(recorded, _)] = objective.calls
    assert not recorded.is_full


def test_what_cannot_be_recorded_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refusing(graph: Recorder) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    objective = Linear()
    steps = StepGraph(objective.model, objective)
    for _ in range(STEPS_BEFORE):
        steps.backward(_part(), WEIGHTS)
    with pytest.warns(UserWarning, match=r"no CUDA graph \(operation not permitted"):
        assert steps.backward(_part(), WEIGHTS) is None
    assert objective.model.weight.grad is None
    assert steps.backward(_part(), WEIGHTS) is None
    assert len(objective.calls) == 1
