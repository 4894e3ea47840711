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
    """A slice of a batch, and its share of the batch's labels, tokens and rows: weights that add up to 1."""

    inputs: dict[str, Tensor]
    label_share: float
    token_share: float
    row_share: float


def micro_batches(batch: Batch, count: int, *, rank: int = 0, processes: int = 1) -> Iterator[MicroBatch]:
    """Cut a batch along its first axis; the weighted losses of all processes' slices sum to the batch's.

    Yields the slices of process `rank`. All processes get as many slices; one that has no rows left for a slice gets
    a row of the batch that weighs nothing.
    """
    shares = torch.arange(_num_rows(batch)).tensor_split(processes)
    labels, tokens, rows = max(_num_labels(batch), 1), max(_num_tokens(batch), 1), _num_rows(batch)
    for piece in shares[rank].tensor_split(min(count, len(shares[0]))):
        if not len(piece):
            idle = {name: value[:1] for name, value in batch.items()}
            yield MicroBatch(inputs=idle, label_share=0.0, token_share=0.0, row_share=0.0)
            continue
        inputs = {name: value[piece] for name, value in batch.items()}
        yield MicroBatch(
            inputs=inputs,
            label_share=_num_labels(inputs) / labels,
            token_share=_num_tokens(inputs) / tokens,
            row_share=len(piece) / rows,
        )


def _num_rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _num_labels(batch: Batch) -> int:
    """How many labels a transformers model averages its loss over."""
    labels = batch.get("labels")
    if labels is None:
        return _num_rows(batch)
    shifted = labels[:, 1:] if labels.dim() == 2 and "decoder_input_ids" not in batch else labels
    return int((shifted != -100).sum())


def _num_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else _num_rows(batch)


def weighted_loss(model: nn.Module, part: MicroBatch, weights: LossWeights, teacher: nn.Module | None) -> Tensor:
    """Loss of one micro-batch, weighted so that the parts of a batch sum to the batch's loss."""
    with trace_routers(model) if weights.needs_routers else nullcontext() as trace:
        out = model(**part.inputs)
    loss = _task_loss(out, part)
    if weights.distillation and teacher is not None:
        loss = (1 - weights.distillation) * loss + weights.distillation * _distillation(out.logits, teacher, part)
    if trace is None:
        return loss
    auxiliary = weights.efficiency * trace.efficiency_loss()
    if weights.separability:
        auxiliary = auxiliary + weights.separability * trace.separability_loss()
    return loss + auxiliary * part.token_share


def _task_loss(out: Any, part: MicroBatch) -> Tensor:
    """The slice's share of the model's own loss. Without a label that would be 0 / 0; here it is 0, with a gradient."""
    loss: Tensor = out.loss * part.label_share if part.label_share else 0.0 * out.logits.flatten()[0]
    return loss


def _distillation(logits: Tensor, teacher: nn.Module, part: MicroBatch) -> Tensor:
    """The slice's share of KL(teacher || model) in nats, a mean over sequences, or over tokens for [B, T, C] logits."""
    with torch.no_grad():
        target = teacher(**{k: v for k, v in part.inputs.items() if k != "labels"}).logits
    precise = torch.promote_types(logits.dtype, torch.float32)
    learned, taught = logits.to(precise).log_softmax(-1), target.to(precise).log_softmax(-1)
    kl = F.kl_div(learned, taught, log_target=True, reduction="none")
    per_position = kl.sum(-1)
    mask = part.inputs.get("attention_mask")
    if per_position.dim() == 2 and mask is not None and mask.shape == per_position.shape:
        return per_position[mask.bool()].mean() * part.token_share
    return per_position.mean() * part.row_share
