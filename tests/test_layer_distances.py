"""Layer distillation: zero for equal layers, relative to the teacher's outputs, and a training that follows it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lte_compile.training.layer_distances import layer_distance, layer_outputs
from lte_compile.training.losses import LossWeights, micro_batches, weighted_loss
from tests.zoo import VOCAB, build


def _llama() -> Any:
    torch.manual_seed(0)
    return build("llama")[0]


def _batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def test_every_layer_is_seen_once_and_only_inside_the_block() -> None:
    model, batch = _llama(), _batch()
    with layer_outputs(model) as seen:
        model(**batch)
    model(**batch)
    assert len(seen) == model.config.num_hidden_layers
    assert all(output.shape == (3, 9, model.config.hidden_size) for output in seen)


def test_distance_is_relative_per_token_and_leaves_padding_out() -> None:
    taught = torch.randn(2, 5, 8, dtype=torch.float64) * torch.tensor([1.0, 300.0, 1.0, 1.0, 1.0])[:, None]
    learned, counted = 1.1 * taught, torch.ones(2, 5)
    learned[:, 4], counted[:, 4] = 7.0, 0
    assert float(layer_distance([learned], [taught], counted)) == pytest.approx(0.01, rel=1e-5)  # float32 inside
    assert float(layer_distance([taught, taught], [taught, taught], None)) == 0.0


def test_other_layers_are_refused() -> None:
    one, two = [torch.ones(1, 2, 3)], [torch.ones(1, 2, 3)] * 2
    with pytest.raises(ValueError, match="the same shape"):
        layer_distance(one, two, None)


def test_the_parts_of_a_batch_sum_to_the_batch() -> None:
    model, batch = _llama().eval(), _batch()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    weights = LossWeights(distillation=1.0, layers=2.0)
    [whole] = micro_batches(batch, 1)
    expected = weighted_loss(model, whole, weights, teacher)
    parts = sum(weighted_loss(model, part, weights, teacher) for part in micro_batches(batch, 3))
    # 3 layers' outputs in float32
    assert float(parts) == pytest.approx(float(expected), rel=1e-5)
    without = weighted_loss(model, whole, LossWeights(distillation=1.0), teacher)
    assert float(expected) > float(without)


def test_following_the_layers_brings_a_model_back_to_its_teacher() -> None:
    model, batch = _llama(), _batch()
    teacher = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    [part] = micro_batches(batch, 1)
    losses = []
    for _ in range(40):
        loss = weighted_loss(model, part, LossWeights(distillation=1.0, layers=1.0), teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
