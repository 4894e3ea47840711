"""What a model's routers and selectors chose while it ran, counted in one pass: density, cost, load, union.

    with measuring(model) as meter:
        for batch in batches:
            model(**batch)
    print(meter.report().weight_share)

Only non-padding tokens count. Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.evaluation.costs import Reads, ffn_weights, ffn_weights_read
from lte_compile.evaluation.selectors import Selector, selectors
from lte_compile.routing.router import Router, routers
from lte_compile.running.padding import PaddingReader, drop_padding
from lte_compile.running.tracing import unique_names, unwrapped

Source: TypeAlias = Router | Selector
# Numbers of consecutive tokens whose choices are joined: what a batch of that size has to read.
SPANS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One FFN. Densities are shares per token; `load_*` are over experts: the share of tokens that chose an expert.

    Args:
        union_densities: by number of consecutive tokens: share of neurons that at least one of them needs. A number of
            which the batches never held as many tokens is left out.
        dead_experts: those that no token chose.
    """

    neuron_density: float
    expert_density: float
    input_density: float
    experts: int
    dead_experts: int
    load_min: float
    load_median: float
    load_max: float
    union_densities: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """A whole model: densities are pooled over FFNs and tokens, costs are of all FFNs, routers included.

    Args:
        tokens: non-padding tokens seen.
        input_density: share of the input channels that gate and up projections read; 1 but for input thresholds.
        weight_share: weight bytes a token reads, over those of the dense FFNs. The measure common to all methods.
        flops_per_token: two operations per weight read.
    """

    tokens: int
    neuron_density: float
    expert_density: float
    input_density: float
    weight_share: float
    weight_bytes_per_token: float
    flops_per_token: float
    experts: int
    dead_experts: int
    union_densities: dict[int, float]
    sites: dict[str, SiteReport]


class _Tally:
    """Sums over the tokens that one source has seen, kept on their device."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.sizes_E = source.expert_sizes.to(device)
        self.tokens = self.calls = 0
        self.active_E = torch.zeros_like(self.sizes_E)
        self.inputs = torch.zeros((), dtype=torch.int64, device=device)
        self.own_weights = 0
        self.union = {span: torch.zeros_like(self.inputs) for span in SPANS}
        self.chunks = dict.fromkeys(SPANS, 0)

    def add(self, gates_TE: Tensor) -> None:
        chosen_TE = gates_TE != 0
        self.tokens += len(chosen_TE)
        self.calls += 1
        self.active_E += chosen_TE.sum(0)
        self.own_weights += len(chosen_TE) * _own_weights(self.source)
        for span in SPANS:  # each is made of pairs of the one before; what does not fill a pair is left out
            pairs = len(chosen_TE) // 2
            chosen_TE = chosen_TE[: 2 * pairs].view(pairs, 2, -1).any(1) if pairs else chosen_TE[:0]
            self.union[span] += (chosen_TE.sum(0) * self.sizes_E).sum()
            self.chunks[span] += pairs

    @property
    def neurons(self) -> int:
        return int((self.active_E * self.sizes_E).sum())

    @property
    def input_count(self) -> int:
        dropped = isinstance(self.source, Selector) and self.source.drops_inputs
        return int(self.inputs) if dropped else self.tokens * self.source.site.width

    def weights_read(self) -> float:
        """Of all tokens together."""
        reads = self.source.reads if isinstance(self.source, Selector) else Reads.NEURONS
        tokens = max(self.tokens, 1)
        of_one = ffn_weights_read(self.source.site, reads, self.neurons / tokens, self.input_count / tokens)
        return of_one * self.tokens + self.own_weights

    def report(self) -> SiteReport:
        site, tokens = self.source.site, max(self.tokens, 1)
        load_E = self.active_E.double() / tokens
        return SiteReport(
            neuron_density=self.neurons / (tokens * site.hidden),
            expert_density=float(load_E.mean()),
            input_density=self.input_count / (tokens * site.width),
            experts=len(load_E),
            dead_experts=int((self.active_E == 0).sum()),
            load_min=float(load_E.min()),
            load_median=float(load_E.median()),
            load_max=float(load_E.max()),
            union_densities=_union_densities([self]),
        )


class SelectionMeter:
    """Counts every call; `report` says what it comes to."""

    def __init__(self, model: nn.Module, padding: PaddingReader) -> None:
        self._padding = padding
        self._tallies: dict[Source, _Tally] = {}
        self._model_calls = 0
        self._itemsize = next((p.element_size() for p in model.parameters()), 4)

    def see_model(self, model: nn.Module, arguments: Any) -> None:
        """The model begins a call."""
        self._model_calls += 1

    def see_gates(self, source: Source, module: nn.Module, gates_TE: Tensor) -> None:
        """One call's gates, [T, E] with any leading dimensions."""
        self._tally(source, gates_TE.device).add(self._counted(module, gates_TE))

    def see_inputs(self, source: Source, module: nn.Module, kept_TD: Tensor) -> None:
        """One call's inputs that are read, bool [T, D]."""
        self._tally(source, kept_TD.device).inputs += self._counted(module, kept_TD).sum()

    def loads(self) -> dict[str, Tensor]:
        """Share of the tokens that chose each expert, float64 [E] per FFN."""
        return {name: tally.active_E.double() / max(tally.tokens, 1) for name, tally in self._named().items()}

    def report(self) -> SelectionReport | None:
        """What was counted; None for a model without routers and selectors."""
        named = self._named()
        if not named:
            return None
        tallies = tuple(named.values())
        sites = {name: tally.report() for name, tally in named.items()}
        read = sum(tally.weights_read() for tally in tallies)
        dense = sum(tally.tokens * ffn_weights(tally.source.site) for tally in tallies)
        tokens = self._model_tokens(tallies)
        per_token = read / max(tokens, 1)
        return SelectionReport(
            tokens=tokens,
            neuron_density=_share(tallies, lambda t: t.neurons, lambda t: t.tokens * t.source.site.hidden),
            expert_density=_share(tallies, lambda t: int(t.active_E.sum()), lambda t: t.tokens * len(t.sizes_E)),
            input_density=_share(tallies, lambda t: t.input_count, lambda t: t.tokens * t.source.site.width),
            weight_share=read / max(dense, 1),
            weight_bytes_per_token=per_token * self._itemsize,
            flops_per_token=2 * per_token,
            experts=sum(site.experts for site in sites.values()),
            dead_experts=sum(site.dead_experts for site in sites.values()),
            union_densities=_union_densities(tallies),
            sites=sites,
        )

    def _model_tokens(self, tallies: Sequence[_Tally]) -> int:
        """Tokens that the model read: an FFN's that runs once a call, or, where layers share one, those of a run."""
        once = [tally.tokens for tally in tallies if tally.calls == self._model_calls]
        return max(once or [tally.tokens * self._model_calls // max(tally.calls, 1) for tally in tallies])

    def _tally(self, source: Source, device: torch.device) -> _Tally:
        if source not in self._tallies:
            self._tallies[source] = _Tally(source, device)
        return self._tallies[source]

    def _named(self) -> dict[str, _Tally]:
        names = unique_names([source.site for source in self._tallies])
        return dict(zip(names, self._tallies.values(), strict=True))

    def _counted(self, module: nn.Module, values: Tensor) -> Tensor:
        return drop_padding(values, self._padding.mask_of(module, self._padding.current))


@contextmanager
def measuring(model: nn.Module) -> Iterator[SelectionMeter]:
    """Count what routers and installed selectors choose inside the block, in whatever stage the model is."""
    model = unwrapped(model)
    padding = PaddingReader(model)
    meter = SelectionMeter(model, padding)

    def see(router: nn.Module, args: tuple[Any, ...], gates_TE: Tensor) -> None:
        assert isinstance(router, Router)
        meter.see_gates(router, router, gates_TE.detach())

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(padding, with_kwargs=True).remove)
        stack.callback(model.register_forward_pre_hook(meter.see_model).remove)
        for router in routers(model):
            stack.callback(router.register_forward_hook(see).remove)
        for selector in selectors(model):
            selector.sink = meter
            stack.callback(setattr, selector, "sink", None)
        yield meter


def _own_weights(source: Source) -> int:
    """In the dense stage nothing is chosen, so a router costs nothing."""
    return 0 if isinstance(source, Router) and source.rule == "dense" else source.weights_read


def _share(tallies: Sequence[_Tally], part: Any, whole: Any) -> float:
    total: int = sum(map(whole, tallies))
    return float(sum(map(part, tallies)) / max(total, 1))


def _union_densities(tallies: Sequence[_Tally]) -> dict[int, float]:
    densities = {}
    for span in SPANS:
        neurons = sum(tally.chunks[span] * tally.source.site.hidden for tally in tallies)
        if neurons:
            densities[span] = sum(int(tally.union[span]) for tally in tallies) / neurons
    return densities
