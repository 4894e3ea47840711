"""Batches joined into larger ones, for predictors that learn from a model's inner values rather than train the model.

Shapes: B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.training.losses import Batch

# Token positions of a joined batch: those of 16 windows of 512 tokens, which keep a GPU busy. Thousands of steps of
# 32 short texts take longer than the trainings that are compared with.
TOKENS = 8_192


def joined(batches: Iterable[Batch], tokens: int = TOKENS) -> Iterator[Batch]:
    """The same texts in the same order, as many batches at once as have `tokens` positions, padded to equal lengths.

    Batches of labels, or of anything but [B, L] tensors beside an attention mask, are left as they are.
    """
    waiting: list[Batch] = []
    for batch in batches:
        if not _can_be_joined(batch):
            yield from _flush(waiting)
            yield batch
            continue
        if waiting and _positions([*waiting, batch]) > tokens:
            yield from _flush(waiting)
        waiting.append(batch)
    yield from _flush(waiting)


def _can_be_joined(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or "labels" in batch:
        return False
    return all(value.shape == mask.shape for value in batch.values())


def _positions(batches: Sequence[Batch]) -> int:
    masks = [batch["attention_mask"] for batch in batches]
    return sum(map(len, masks)) * max(mask.shape[1] for mask in masks)


def _flush(waiting: list[Batch]) -> Iterator[Batch]:
    if waiting:
        yield _join(waiting)
        waiting.clear()


def _join(batches: Sequence[Mapping[str, Tensor]]) -> Batch:
    length = max(batch["attention_mask"].shape[1] for batch in batches)
    return {
        name: torch.cat([F.pad(batch[name], (0, length - batch[name].shape[1])) for batch in batches])
        for name in batches[0]
    }
