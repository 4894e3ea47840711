"""The loss of one micro-batch: task, distillation, efficiency and separability.

Shapes: B sequences, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.running.labels import is_encoder_decoder, without_labels
from lte_compile.running.modes import on_device
from lte_compile.running.padding import decoder_modules
from lte_compile.running.tracing import RouterTrace, trace_routers, unwrapped
from lte_compile.training.layer_compilation import repeated_layers
from lte_compile.training.layer_distances import layer_distance, layer_outputs
from lte_compile.training.rows import Rows
from lte_compile.training.token_losses import NextTokens, deferred_loss, token_losses

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """eta and lambda of the paper, the distillation's share of the task loss, and the weight of the layers' distances.

    eta may be a price for each of the densities that rows run at, [N]. All 0 is plain training. `temperature` softens
    teacher and model before they are compared (Hinton et al. 2015, arXiv 1503.02531). `watched` keeps weights of 0 in
    the computation, which then is the same for all weights.
    """

    efficiency: float | Tensor = 0.0
    separability: float | Tensor = 0.0
    distillation: float = 0.0
    layers: float = 0.0
    temperature: float = 1.0
    watched: bool = False

    @property
    def needs_teacher(self) -> bool:
        return self.distillation != 0.0 or self.layers != 0.0

    @property
    def needs_routers(self) -> bool:
        return self.watched or _is_on(self.efficiency) or _is_on(self.separability)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A slice of a batch, and its share of the batch's labels, tokens and rows: weights that add up to 1.

    `is_full`: its attention mask, if it has one, masks nothing. `rows`: where each has a density of its own.
    """

    inputs: dict[str, Tensor]
    label_share: float
    token_share: float
    row_share: float
    is_full: bool = False
    rows: Rows | None = None

    @property
    def is_unpadded(self) -> bool:
        """Whether what is computed does not depend on where padding is."""
        return self.is_full or "attention_mask" not in self.inputs

    def moved_to(self, model: nn.Module) -> MicroBatch:
        """The same on the model's device."""
        rows = None if self.rows is None else self.rows.moved_to(model)
        return replace(self, rows=rows, inputs=on_device(model, self.inputs))


def micro_batches(
    batch: Batch,
    count: int,
    *,
    rank: int = 0,
    processes: int = 1,
    rows: Rows | None = None,
    shifted: bool = True,
) -> Iterator[MicroBatch]:
    """Cut a batch along its first axis; the weighted losses of all processes' slices sum to the batch's.

    Yields the slices of process `rank`. All processes get as many slices; one that has no rows left for a slice gets
    a row of the batch that weighs nothing. `shifted`: labels [B, T] are next tokens, so the first ones are not learned.
    """
    shares = torch.arange(_num_rows(batch)).tensor_split(processes)
    labels, tokens = max(_num_labels(batch, shifted), 1), max(_num_tokens(batch), 1)
    for piece in shares[rank].tensor_split(min(count, len(shares[0]))):
        if not len(piece):
            idle = {name: value[:1] for name, value in batch.items()}
            first = None if rows is None else rows[:1]
            yield MicroBatch(inputs=idle, label_share=0.0, token_share=0.0, row_share=0.0, rows=first)
            continue
        inputs = {name: value[piece] for name, value in batch.items()}
        mask = inputs.get("attention_mask")
        tokens_here = _num_tokens(inputs)
        yield MicroBatch(
            inputs=inputs,
            label_share=_num_labels(inputs, shifted) / labels,
            token_share=tokens_here / tokens,
            row_share=len(piece) / _num_rows(batch),
            is_full=mask is not None and tokens_here == mask.numel(),
            rows=None if rows is None else rows[piece],
        )


def _num_rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _num_labels(batch: Batch, shifted: bool) -> int:
    """How many labels a transformers model averages its loss over."""
    labels = batch.get("labels")
    if labels is None:
        return _num_rows(batch)
    learned = labels[:, 1:] if labels.dim() == 2 and shifted else labels
    return int((learned != -100).sum())


def _num_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else _num_rows(batch)


def weighted_loss(model: nn.Module, part: MicroBatch, weights: LossWeights, teacher: nn.Module | None) -> Tensor:
    """Loss of one micro-batch, weighted so that the parts of a batch sum to the batch's loss."""
    taught = _teach(teacher, part, weights) if weights.needs_teacher and teacher is not None else None
    with (
        layer_outputs(model, enabled=taught is not None and weights.layers != 0.0) as layers,
        trace_routers(model) if weights.needs_routers else nullcontext() as trace,
        deferred_loss(model) as deferred,
    ):
        out = model(**_arguments(model, part))
    if part.rows is not None:
        part.rows.weigh(out.logits)
    target = None if taught is None else taught.logits
    if deferred.logits_BTC is None:
        task = _task_loss(out, part)
        distance = None if target is None else _distillation(out.logits, target, model, part, weights.temperature)
    else:
        task, distance = _next_token_losses(deferred, target, part, weights.temperature)
    loss = task
    if distance is not None:
        loss = (1 - weights.distillation) * task + weights.distillation * distance
    if taught is not None and layers:
        loss = loss + weights.layers * _layer_loss(model, layers, taught.layers, part)
    if trace is None:
        return loss
    auxiliary = _efficiency(trace, part, weights)
    if _is_on(weights.separability):
        auxiliary = auxiliary + weights.separability * trace.separability_loss()
    return loss + auxiliary * part.token_share


def _efficiency(trace: RouterTrace, part: MicroBatch, weights: LossWeights) -> Tensor:
    """The efficiency loss at its price, or at every row's own."""
    price = weights.efficiency
    if part.rows is None or not isinstance(price, Tensor) or not price.dim():
        return price * trace.efficiency_loss()
    return trace.efficiency_loss(weight_B=part.rows.prices(price))


def _arguments(model: nn.Module, part: MicroBatch) -> dict[str, Any]:
    """What a transformers model is called with: no mask that masks nothing, which forbids the fastest attention and
    has to be looked at on its device, and no cache of keys and values."""
    known = inspect.signature(unwrapped(model).forward).parameters if hasattr(model, "config") else {}
    given: dict[str, Any] = dict(part.inputs)
    if part.is_full and "attention_mask" in known and known["attention_mask"].default is None:
        del given["attention_mask"]
    if "use_cache" in known:
        given["use_cache"] = False
    return given


@dataclass(frozen=True)
class _Taught:
    """A teacher's logits, and its layers' outputs if they are wanted."""

    logits: Tensor
    layers: list[Tensor]


def _teach(teacher: nn.Module, part: MicroBatch, weights: LossWeights) -> _Taught:
    inputs = _arguments(teacher, part)
    with torch.no_grad(), layer_outputs(teacher, enabled=weights.layers != 0.0) as layers:
        logits = teacher(**without_labels(teacher, inputs)).logits
    return _Taught(logits, layers)


def _next_token_losses(
    found: NextTokens, taught: Tensor | None, part: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """The slice's share of the task loss, and of the distance to the teacher."""
    assert found.logits_BTC is not None
    assert found.labels_BT is not None
    mask = part.inputs.get("attention_mask")
    counted = None if part.is_full else mask
    if taught is None or temperature == 1.0:
        entropy, distance = token_losses(found.logits_BTC, found.labels_BT, taught, counted)
    else:
        entropy, _ = token_losses(found.logits_BTC, found.labels_BT, None, counted)
        softened = found.logits_BTC / temperature, found.labels_BT, taught / temperature, counted
        distance = token_losses(*softened)[1] * temperature**2
    share = part.row_share if mask is None else part.token_share
    return entropy * part.label_share, None if taught is None else distance * share


def _is_on(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0  # to look into a tensor is to wait for its device


def _task_loss(out: Any, part: MicroBatch) -> Tensor:
    """The slice's share of the model's own loss. Without a label that would be 0 / 0; here it is 0, with a gradient."""
    if getattr(out, "loss", None) is None:
        raise ValueError('the model returned no loss; give batches "labels", and a model that computes one from them')
    loss: Tensor = out.loss * part.label_share if part.label_share else 0.0 * out.logits.flatten()[0]
    return loss


def _counted_positions(model: nn.Module, part: MicroBatch) -> tuple[Tensor | None, float]:
    """Where logits [B, T, C] count, nonzero in [B, T] (None: everywhere), and the slice's share of all such positions.

    An encoder-decoder's are its decoder's, which the attention mask says nothing about.
    """
    if is_encoder_decoder(model):
        labels = part.inputs.get("labels")
        return (None, part.row_share) if labels is None else (labels != -100, part.label_share)
    mask = part.inputs.get("attention_mask")
    return (mask, part.row_share if mask is None else part.token_share)


def _distillation(logits: Tensor, target: Tensor, model: nn.Module, part: MicroBatch, temperature: float) -> Tensor:
    """The slice's share of KL(teacher || model) in nats, a mean over sequences, or over tokens for [B, T, C] logits.

    Of softened distributions times the temperature squared, so that gradients keep their size.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    learned, taught = ((z.to(precise) / temperature).log_softmax(-1) for z in (logits, target))
    kl = F.kl_div(learned, taught, log_target=True, reduction="none")
    per_position = kl.sum(-1) * temperature**2
    counted_BT, share = _counted_positions(model, part)
    if counted_BT is None or counted_BT.shape != per_position.shape:
        return per_position.mean() * part.row_share
    if part.is_full and not is_encoder_decoder(model):
        return per_position.mean() * share
    return per_position[counted_BT.bool()].sum() / counted_BT.sum().clamp(min=1) * share


def _layer_loss(model: nn.Module, learned: list[Tensor], taught: list[Tensor], part: MicroBatch) -> Tensor:
    """The slice's share of the layers' distances. Encoders run before decoders, which have other tokens."""
    mask = None if part.is_full else part.inputs.get("attention_mask")
    decoder, layers = decoder_modules(unwrapped(model)), repeated_layers(model)
    first = sum(layer not in decoder for layer in layers)
    if not decoder or len(learned) != len(layers):
        return part.token_share * layer_distance(learned, taught, mask)
    counted_BT, share = _counted_positions(model, part)
    encoded = part.token_share * layer_distance(learned[:first], taught[:first], mask)
    decoded = share * layer_distance(learned[first:], taught[first:], counted_BT)
    return (first * encoded + (len(learned) - first) * decoded) / len(learned)
