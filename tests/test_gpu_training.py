"""Training on a GPU with compile=True: steps played back from a CUDA graph give what eager steps give."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lte_compile.config import TransformConfig
from lte_compile.data.batches import Example, TextBatches
from lte_compile.routing.router import set_stage
from lte_compile.training import loop as training
from lte_compile.training.config import Phase, TrainConfig
from lte_compile.training.loop import StepEvent, train
from lte_compile.training.losses import weighted_loss
from lte_compile.training.step_graphs import StepGraph, _Recording
from lte_compile.transform import transform
from tests.test_layer_compilation import deep_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _windows() -> TextBatches:
    """Nine windows, four a batch: the third batch of an epoch is smaller and runs outside of the graph."""
    generator = torch.Generator().manual_seed(0)
    examples = [Example(tuple(torch.randint(64, (32,), generator=generator).tolist())) for _ in range(9)]
    return TextBatches(examples, batch_size=4, pad_token_id=0, seed=0, by_length=False)


def _train(*, compile: bool, **changes: Any) -> tuple[nn.Module, tuple[StepEvent, ...]]:
    model, inputs = deep_llama()
    teacher = set_stage(copy.deepcopy(model), "dense").cuda()
    config = TrainConfig(
        target_density=0.4,
        stage1_steps=16,
        stage2_steps=14,
        distillation=0.5,
        measure_every=5,
        compile=compile,
        **changes,
    )
    return model, train(model.cuda(), _windows(), config, held_out=[inputs], teacher=teacher)


def _distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    gaps = [(p.detach().cpu() - q.detach().cpu()).norm() for p, q in pairs]
    return float(torch.stack(gaps).norm())


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every step so far, whether a recording was played back."""
    steps: list[bool] = []
    backward, play = StepGraph.backward, _Recording.play

    def counted(*arguments: Any) -> Any:
        steps.append(False)
        return backward(*arguments)

    def marked(*arguments: Any) -> Any:
        steps[-1] = True
        return play(*arguments)

    monkeypatch.setattr(StepGraph, "backward", counted)
    monkeypatch.setattr(_Recording, "play", marked)
    return steps


@pytest.mark.parametrize("changes", [{}, {"budget_range": (0.2, 0.6), "budget_weight": 1.5}], ids=["one", "range"])
def test_played_back_steps_give_the_same_training(played: list[bool], changes: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model, events = _train(compile=True, **changes)
    assert not [warning for warning in seen if "CUDA graph" in str(warning.message)]
    assert sum(played) > 8  # of about 20 whole batches, three in each stage come before
    expected, expected_events = _train(compile=False, **changes)
    # Thirty steps of float32 rounding, in another order; a score near tau may fall on its other side.
    assert [e.loss for e in events] == pytest.approx([e.loss for e in expected_events], rel=1e-3)
    start, _ = deep_llama()
    assert _distance(model, expected) < 0.1 * _distance(start, expected)


def test_padded_texts_of_a_few_lengths_are_played_back(played: list[bool]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        losses, densities = _train_classifier(step_graphs=True)
    assert not [warning for warning in seen if "CUDA graph" in str(warning.message)]
    assert (
        sum(played) > 30
    )  # of 60 steps; three of each of four shapes come before, and epochs' last batches are smaller
    expected, expected_densities = _train_classifier(step_graphs=False)
    assert losses == pytest.approx(expected, rel=1e-2)  # float32 sums in another order, over sixty steps
    assert densities == pytest.approx(expected_densities, abs=0.02)


def test_a_training_leaves_no_memory_of_its_recordings_behind(played: list[bool]) -> None:
    _train_classifier(step_graphs=True)
    assert any(played)
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    assert {tuple(segment["segment_pool_id"]) for segment in segments} <= {(0, 0)}


@pytest.mark.parametrize("routed", [False, True])
def test_steps_with_dropout_are_played_back(played: list[bool], *, routed: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        phases = None if routed else [Phase(name="dense", steps=40)]
        losses, _ = _train_classifier(step_graphs=True, dropout=0.1, phases=phases)
    assert not [w for w in seen if "CUDA graph" in str(w.message) or "AccumulateGrad" in str(w.message)]
    assert sum(played) > 20
    assert all(map(math.isfinite, losses))


def test_training_goes_on_where_recording_fails(monkeypatch: pytest.MonkeyPatch, played: list[bool]) -> None:
    """With dropout too: the random generator must not be left in the recording."""

    def waiting(*arguments: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # which no recording can
        return weighted_loss(*arguments)

    monkeypatch.setattr(training, "weighted_loss", waiting)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        losses, _ = _train_classifier(step_graphs=True, dropout=0.1)
    assert not any(played)
    assert all(map(math.isfinite, losses))


def _train_classifier(
    *, step_graphs: bool, dropout: float = 0.0, phases: list[Phase] | None = None
) -> tuple[list[float], list[float]]:
    """Texts of 5 to 32 tokens, in both runs padded to two lengths."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **shape)
    )
    teacher = copy.deepcopy(model).cuda()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 33, (66,), generator=generator).tolist()
    examples = [Example(tuple(torch.randint(64, (n,), generator=generator).tolist()), n % 2) for n in lengths]
    options: dict[str, Any] = {"batch_size": 8, "pad_token_id": 0, "seed": 0, "by_length": True, "length_multiple": 16}
    config = TrainConfig(
        target_density=0.3,
        stage1_steps=40,
        stage2_steps=20,
        distillation=0.5,
        layer_distillation=0.1,
        hold_density=True,
        measure_every=10,
        step_graphs=step_graphs,
    )
    held_out = [TextBatches(examples, **options).next_batch() for _ in range(2)]
    transform(model.cuda(), TransformConfig(expert_size=8))
    events = train(model, TextBatches(examples, **options), config, held_out=held_out, teacher=teacher, phases=phases)
    return [event.loss for event in events], [event.density for event in events if event.density is not None]
