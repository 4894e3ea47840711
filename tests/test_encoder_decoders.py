"""Labels as models read them: encoder-decoders make their decoder's inputs of them, others compare them in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.evaluation.quality import evaluate
from lte_compile.huggingface.trainer import LteTrainer
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.labels import without_labels
from lte_compile.training.config import TrainConfig
from lte_compile.training.loop import train
from lte_compile.training.losses import LossWeights, micro_batches, weighted_loss
from lte_compile.transform import transform
from tests.zoo import HEADS, HIDDEN, VOCAB, WIDTH, build

FAMILIES = ("t5", "bart")


class Sequences:
    """Endless batches of padded sources and padded targets."""

    def __init__(self, seed: int) -> None:
        self.seed, self.index = seed, 0

    def next_batch(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.seed + self.index)
        self.index += 1
        mask, labels = torch.ones(4, 9, dtype=torch.long), torch.randint(3, VOCAB, (4, 9), generator=draw)
        mask[0, 5:], labels[1, 3:], labels[2, 7:] = 0, -100, -100
        return {"input_ids": torch.randint(3, VOCAB, (4, 9), generator=draw), "attention_mask": mask, "labels": labels}

    def state_dict(self) -> Mapping[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = state["index"]


def _weights() -> LossWeights:
    return LossWeights(distillation=0.5, layers=0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_train_on_what_collators_give(name: str) -> None:
    dense = build(name)[0]
    model = transform(copy.deepcopy(dense), TransformConfig(expert_size=8))
    config = TrainConfig(
        target_density=0.4, stage1_steps=6, stage2_steps=2, distillation=0.3, layer_distillation=0.1, hold_density=True
    )
    held_out = [Sequences(1).next_batch(), Sequences(2).next_batch()]
    train(model, Sequences(0), config, held_out=held_out, teacher=dense)
    set_stage(model, "hard")
    assert evaluate(model, held_out).density == pytest.approx(0.4, abs=0.02)
    assert all(router.score_quantiles for router in routers(model))


def test_transformers_trainer_fits_their_routers(tmp_path: Path) -> None:
    model = transform(build("t5")[0], TransformConfig(expert_size=8))
    config = TrainConfig(target_density=0.4, stage1_steps=1, stage2_steps=1)
    held_out = [Sequences(1).next_batch()]
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    LteTrainer(model=model, args=arguments, train_dataset=[], lte=config, held_out=held_out).fit_routers()
    set_stage(model, "hard")
    assert evaluate(model, held_out).density == pytest.approx(0.4, abs=0.05)  # measured on what was fitted


@pytest.mark.parametrize("name", FAMILIES)
def test_quality_is_that_of_the_models_own_loss(name: str) -> None:
    model, batch = build(name)[0], Sequences(0).next_batch()
    measured = evaluate(model, [batch])
    with torch.no_grad():
        out = model(**batch)
    counted = batch["labels"] != -100
    assert measured.loss == pytest.approx(float(out.loss), rel=1e-5)  # float32 sums
    right = (out.logits.argmax(-1) == batch["labels"])[counted]
    assert measured.accuracy == pytest.approx(float(right.double().mean()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_a_batch_sum_to_the_batch(name: str) -> None:
    model, batch = build(name, torch.float64)[0], Sequences(0).next_batch()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    [whole] = micro_batches(batch, 1, shifted=False)
    expected = weighted_loss(model, whole, _weights(), teacher)
    for part_of in (2, 4):
        parts = micro_batches(batch, part_of, shifted=False)
        total = sum(float(weighted_loss(model, part, _weights(), teacher).detach()) for part in parts)
        assert total == pytest.approx(float(expected.detach()), rel=1e-6)  # layers are compared in float32


@pytest.mark.parametrize("name", FAMILIES)
def test_distillation_leaves_the_decoders_padding_out(name: str) -> None:
    """Sources are as long as targets here, but other positions of theirs are padding."""
    model, batch = build(name, torch.float64)[0], Sequences(0).next_batch()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
        [part] = micro_batches(batch, 1, shifted=False)
        measured = weighted_loss(model, part, LossWeights(distillation=1.0), teacher)
        learned, taught = (m(**without_labels(m, batch)).logits.log_softmax(-1) for m in (model, teacher))
        kl_BT = (taught.exp() * (taught - learned)).sum(-1)
    assert float(measured) == pytest.approx(float(kl_BT[batch["labels"] != -100].mean()), rel=1e-9)


def _in_place(kind: type) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model: nn.Module = kind(tf.BertConfig(vocab_size=VOCAB, num_labels=VOCAB, **sizes)).eval()
    return model


@pytest.mark.parametrize("kind", [tf.BertForMaskedLM, tf.BertForTokenClassification])
def test_labels_of_every_position_are_not_shifted(kind: type) -> None:
    model, batch = _in_place(kind), Sequences(0).next_batch()
    with torch.no_grad():
        out = model(**batch)
    assert evaluate(model, [batch]).loss == pytest.approx(float(out.loss), rel=1e-5)  # float32 sums
