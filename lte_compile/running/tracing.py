"""Watching routers during forward passes: LTE's two losses and the measured density.

    with trace_routers(model) as trace:
        out = model(**batch)
    loss = out.loss + eta * trace.efficiency_loss() + lam * trace.separability_loss()

Padding is left out: the trace reads the attention mask the model was called with.
Shapes: T token positions (any leading dimensions), E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lte_compile.passes.ir import FfnSite
from lte_compile.routing.recomputation import as_leaf
from lte_compile.routing.router import Router, per_token, require_routers
from lte_compile.running.padding import PaddingMasks, PaddingReader, counted_tokens, drop_padding

# The paper's separability term 1 / (score - tau)^2 is singular at tau. With this eps one expert's term is at most 100
# and its gradient towards the score at most 650, so a single score at tau cannot outweigh the task loss in a batch; at
# a settled score (0 or 1) it changes the term from 4 to 3.85.
SEPARABILITY_EPS = 1e-2


class RouterRecord(NamedTuple):
    """One call of one router: the scores it gave, [T, E] with any leading dims, and what applied at that time."""

    router: Router
    scores_TE: Tensor
    masks: PaddingMasks
    rule: str
    threshold: float


class RouterTrace:
    """Scores of every router call inside `trace_routers`, and what follows from them.

    All means run over routed FFNs, experts and non-padding tokens alike, so a layer with more tokens (an encoder's
    beside a decoder's) weighs more. Losses are float32 (float64 for float64 models) and differentiable.
    """

    def __init__(self, names: dict[Router, str], padding: PaddingReader) -> None:
        self._names = names
        self._padding = padding
        self._records: list[RouterRecord] = []
        self._gradients = torch.is_grad_enabled()

    def record(self, router: Router, scores_TE: Tensor) -> None:
        """Called by a router while the trace is open."""
        masks = self._padding.current
        if self._gradients and not torch.is_grad_enabled() and router.weight.requires_grad:
            scores_TE = as_leaf(router, scores_TE)
        self._records.append(RouterRecord(router, scores_TE, masks, router.active_rule, router.threshold))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that ran, in the order they first ran."""
        return tuple(dict.fromkeys(self._names[record.router] for record in self._records))

    @property
    def num_scores(self) -> int:
        """How many scores (token, layer, expert) the losses average over; weighs micro-batches against each other."""
        return sum(record.scores_TE.numel() for record in self._counted(None))

    def efficiency_loss(self, site: str | None = None, *, weight_B: Tensor | None = None) -> Tensor:
        """L_eff: mean of scores squared (arXiv 2402.06126, section 4.2) over all sites, or over one.

        With `weight_B` the squares of row b count weight_B[b] times, and are divided by as many as without.
        Padding is multiplied away rather than left out: what is computed has the same shape for any mask, so a CUDA
        graph of it serves all batches of a length.
        """
        sums, counts = zip(*[self._squares(record, weight_B) for record in self._records_of(site)], strict=True)
        return torch.stack(sums).sum() / torch.stack(counts).sum().clamp(min=1)

    def _squares(self, record: RouterRecord, weight_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum of a record's squared scores over the tokens that count, and how many scores these are."""
        scores_TE, experts = record.scores_TE, record.scores_TE.shape[-1]
        counted_T = counted_tokens(scores_TE, self._padding.mask_of(record.router, record.masks))
        if counted_T is None and weight_B is None:
            return scores_TE.square().sum(), scores_TE.new_full((), scores_TE.numel())
        squares_T = scores_TE.square().sum(-1)
        if weight_B is not None:
            squares_T = squares_T * per_token(weight_B.to(squares_T.dtype), squares_T)
        if counted_T is None:
            return squares_T.sum(), scores_TE.new_full((), scores_TE.numel())
        weights_T = counted_T.to(scores_TE.dtype)
        return (squares_T.flatten() * weights_T).sum(), weights_T.sum() * experts

    def separability_loss(self, site: str | None = None, *, eps: float = SEPARABILITY_EPS) -> Tensor:
        """L_sep: mean of 1 / ((score - tau)^2 + eps), the paper's term (section 4.2) bounded by `eps`."""
        counted = self._counted(site)
        return _pooled_mean([torch.ops.lte.separability(r.scores_TE, r.threshold, eps) for r in counted], counted)

    @torch.no_grad()
    def neuron_counts(self, site: str | None = None) -> dict[str, tuple[int, int]]:
        """(active, all) neurons summed over non-padding tokens, per site or for one."""
        counts: dict[str, tuple[int, int]] = {}
        for router, scores_TE, _, rule, threshold in self._counted(site):
            name, sizes_E = self._names[router], router.expert_sizes.to(scores_TE.device)
            active, total = counts.get(name, (0, 0))
            selected_TE = torch.ops.lte.select(scores_TE, rule, threshold) != 0
            chosen = int((selected_TE.sum(0) * sizes_E).sum())
            counts[name] = (active + chosen, total + scores_TE.shape[0] * router.site.hidden)
        return counts

    def density(self, site: str | None = None) -> float:
        """Share of active neurons, over all sites or over one: 1.0 in the dense stage.

        In the soft stage every expert is computed; counted are the experts the hard stage would run.
        """
        active, total = map(sum, zip(*self.neuron_counts(site).values(), strict=True))
        return active / total if total else float("nan")

    def densities(self) -> dict[str, float]:
        """Density of every site that ran."""
        return {site: active / total for site, (active, total) in self.neuron_counts().items() if total}

    def scores(self, site: str) -> Tensor:
        """Scores [tokens, E] of one site over non-padding tokens, calls joined in order."""
        return torch.cat([record.scores_TE for record in self._counted(site)])

    def _records_of(self, site: str | None) -> list[RouterRecord]:
        """The records of all sites or of one."""
        if not self._records:
            raise RuntimeError("no router ran inside trace_routers: run the transformed model inside the with block")
        if site is not None and site not in self.sites:
            raise ValueError(f"no site named {site!r} ran; those that did: {', '.join(self.sites)}")
        return [record for record in self._records if site in (None, self._names[record.router])]

    def _counted(self, site: str | None) -> list[RouterRecord]:
        """The same, padding dropped: scores [tokens, E]."""
        chosen = self._records_of(site)
        masks = [self._padding.mask_of(record.router, record.masks) for record in chosen]
        return [r._replace(scores_TE=drop_padding(r.scores_TE, mask)) for r, mask in zip(chosen, masks, strict=True)]


def _pooled_mean(sums: Sequence[Tensor], records: Sequence[RouterRecord]) -> Tensor:
    """Over all scores of the records, given each record's sum."""
    count = sum(record.scores_TE.numel() for record in records)
    return torch.stack(list(sums)).sum() / max(count, 1)


@contextmanager
def trace_routers(model: nn.Module, *, mask: Tensor | None = None) -> Iterator[RouterTrace]:
    """Record the routers of `model` while the block runs, over one forward pass or several.

    Args:
        mask: [B, T], nonzero where a token counts, in every call of the block. By default the `attention_mask` (and
            `decoder_attention_mask`, or labels other than -100) the model is called with; without any, all count.

    Raises:
        ValueError: the model has no routers, or is being traced already.
    """
    found = require_routers(model)
    if any(router.sink is not None for router in found):
        raise ValueError("this model is being traced already; trace_routers blocks cannot be nested")
    model = unwrapped(model)
    reader = PaddingReader(model, mask)
    trace = RouterTrace(site_names(model), reader)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(reader, with_kwargs=True).remove)
        for router in found:
            router.sink = trace
            stack.callback(setattr, router, "sink", None)
        yield trace


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hide its signature and config: torch.compile's and those of data parallelism."""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def site_names(model: nn.Module) -> dict[Router, str]:
    """A unique name for each router's site: its module's, or its down-projection's where two share a module."""
    found = require_routers(model)
    return dict(zip(found, unique_names([router.site for router in found]), strict=True))


def unique_names(sites: Sequence[FfnSite]) -> tuple[str, ...]:
    """Each site's module, or its down-projection's where two share a module."""
    seen = Counter(site.name for site in sites)
    return tuple(site.name if site.name and seen[site.name] == 1 else site.down.rpartition(".")[0] for site in sites)
