"""The loss of one micro-batch: task, distillation, efficiency and separability.

Shapes: B sequences, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.tracing import trace_routers

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """eta and lambda of the paper, and the distillation's share of the task loss; all 0 is plain training."""

    efficiency: float = 0.0
    separability: float = 0.0
    distillation: float = 0.0

    @property
    def needs_routers(self) -> bool:
        return self.efficiency != 0.0 or self.separability != 0.0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A slice of a batch, and its share of the batch's labels and tokens: weights that add up to 1."""

    inputs: dict[str, Tensor]
    label_share: float
    token_share: float


def micro_batches(batch: Batch, count: int) -> Iterator[MicroBatch]:
    """Cut a batch along its first axis; the weighted losses of the slices sum to the batch's."""
    size = next(iter(batch.values())).shape[0]
    slices = [{k: v[s] for k, v in batch.items()} for s in torch.arange(size).tensor_split(min(count, size))]
    labels, tokens = _num_labels(batch), _num_tokens(batch)
    for inputs in slices:
        yield MicroBatch(
            inputs=inputs, label_share=_num_labels(inputs) / labels, token_share=_num_tokens(inputs) / tokens
        )


def _num_labels(batch: Batch) -> int:
    """How many labels a transformers model averages its loss over."""
    labels = batch.get("labels")
    if labels is None:
        return next(iter(batch.values())).shape[0]
    shifted = labels[:, 1:] if labels.dim() == 2 and "decoder_input_ids" not in batch else labels
    return max(int((shifted != -100).sum()), 1)


def _num_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else next(iter(batch.values())).shape[0]


def weighted_loss(model: nn.Module, part: MicroBatch, weights: LossWeights, teacher: nn.Module | None) -> Tensor:
    """Loss of one micro-batch, weighted so that the parts of a batch sum to the batch's loss."""
    with trace_routers(model) if weights.needs_routers else nullcontext() as trace:
        out = model(**part.inputs)
    task = out.loss
    if weights.distillation and teacher is not None:
        task = (1 - weights.distillation) * task + weights.distillation * _distillation(
            out.logits, teacher, part.inputs
        )
    loss: Tensor = task * part.label_share
    if trace is None:
        return loss
    auxiliary = weights.efficiency * trace.efficiency_loss()
    if weights.separability:
        auxiliary = auxiliary + weights.separability * trace.separability_loss()
    return loss + auxiliary * part.token_share


def _distillation(logits: Tensor, teacher: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """KL(teacher || model) in nats, averaged over sequences, or over non-padding tokens for [B, T, C] logits."""
    with torch.no_grad():
        target = teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    kl = F.kl_div(logits.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True, reduction="none")
    per_position = kl.sum(-1)
    mask = inputs.get("attention_mask")
    if per_position.dim() == 2 and mask is not None and mask.shape == per_position.shape:
        per_position = per_position[mask.bool()]
    return per_position.mean()
