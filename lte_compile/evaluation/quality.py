"""Quality, density and cost of a model on held-out batches.

Shapes: B sequences, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lte_compile.evaluation.meter import SelectionReport, measuring
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import require_routers, routers
from lte_compile.running.inputs import Batch, at_least_one
from lte_compile.running.labels import are_next_tokens, without_labels
from lte_compile.running.modes import eval_mode, on_device
from lte_compile.running.outputs import logits_of
from lte_compile.running.tracing import trace_routers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """accuracy: share of labels predicted right, loss in nats: of sequences (classification), of next tokens (language
    models), or of every position that has one (encoder-decoders, masked language models, token classifiers).

    density is the share of neurons active over non-padding tokens: 1.0 for a model without routers. `selection` has
    costs, load and more of what routers or selectors chose in the stage the model is in; None without any. `rouge_l` is
    of generated text, for tasks that ask for it (lte_compile.evaluation.tasks).
    """

    accuracy: float
    loss: float
    density: float
    densities: dict[str, float]
    selection: SelectionReport | None = None
    rouge_l: float | None = None

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:  # from a loss of 710 on
            return math.inf


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Run every batch in eval mode, in the model's current stage. Batches carry `labels`; -100 is left out."""
    right = total = loss = 0.0
    per_site: dict[str, list[float]] = {}
    with eval_mode(model), measuring(model) as meter:
        for batch in at_least_one(batches):
            logits_NC, labels_N = _predictions(model, on_device(model, batch), per_site)
            right += float((logits_NC.argmax(-1) == labels_N).sum())
            loss += float(nn.functional.cross_entropy(logits_NC.float(), labels_N, reduction="sum"))
            total += len(labels_N)
    if not total:
        raise ValueError("nothing to evaluate: all labels are -100")
    selection = meter.report()
    if selection and not per_site:  # selectors: nothing was traced
        densities, density = {n: s.neuron_density for n, s in selection.sites.items()}, selection.neuron_density
    else:
        densities, density = _pooled(per_site)
    return Evaluation(
        accuracy=right / total, loss=loss / total, density=density, densities=densities, selection=selection
    )


def _pooled(per_site: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float]:
    """Density of each site and of all, from their [active, all] neurons."""
    active, neurons = map(sum, zip(*per_site.values(), strict=True)) if per_site else (1.0, 1.0)
    return {site: a / n for site, (a, n) in per_site.items()}, active / neurons


def _predictions(model: nn.Module, batch: dict[str, Tensor], per_site: dict[str, list[float]]) -> tuple[Tensor, Tensor]:
    """Logits and labels of the positions that count; adds the batch's [active, all] neurons to `per_site`."""
    if "labels" not in batch:
        raise ValueError(f"nothing to evaluate: a batch has no labels, only {', '.join(batch)}")
    inputs, labels = without_labels(model, batch), batch["labels"]
    if any(routers(model)):
        with trace_routers(model) as trace:
            logits = logits_of(model(**inputs))
        for site, counts in trace.neuron_counts().items():
            sums = per_site.setdefault(site, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + counts[0], sums[1] + counts[1]
    else:
        logits = logits_of(model(**inputs))
    if are_next_tokens(model, labels):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    return logits[counted], labels[counted]


def ffn_flops_per_token(sites: Sequence[FfnSite], density: float = 1.0, num_experts: Sequence[int] = ()) -> float:
    """Multiply-adds counted as two operations: projections of the active neurons, plus the routers' E x D each."""
    matrices = (2 * site.width * site.hidden * (3 if site.gated else 2) for site in sites)
    routing = (2 * site.width * experts for site, experts in zip(sites, num_experts, strict=bool(num_experts)))
    return density * sum(matrices) + sum(routing)


def router_parameters(model: nn.Module) -> int:
    """How many parameters the routers add."""
    return sum(p.numel() for router in require_routers(model) for p in router.parameters())


def num_experts(model: nn.Module) -> tuple[int, ...]:
    return tuple(router.num_experts for router in require_routers(model))


def sites_of(model: nn.Module) -> tuple[FfnSite, ...]:
    """The FFN sites of a transformed model."""
    return tuple(router.site for router in require_routers(model))


def score_histogram(scores_TE: Tensor, bins: int = 40) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of one router's scores over [0, 1]."""
    counts = torch.histc(scores_TE.detach().float(), bins=bins, min=0.0, max=1.0)
    edges = torch.linspace(0, 1, bins + 1)
    return tuple(edges.tolist()), tuple(int(c) for c in counts.tolist())
