"""What a model's FFNs see and compute on data: inputs and hidden values, padding left out.

Shapes: T tokens, N of all batches together, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lte_compile.passes.ir import FfnSite, WeightLayout
from lte_compile.rewriting.attach import follow_ffn
from lte_compile.rewriting.places import locate
from lte_compile.running.inputs import Batch, at_least_one
from lte_compile.running.modes import arguments_of, eval_mode, for_layers
from lte_compile.running.padding import PaddingReader, drop_padding

SeeFfn = Callable[[Tensor, Tensor], None]

# Tokens kept per site for co-activation grouping: ten per neuron of the 1,536 of a small model (docs/grouping.md).
MAX_ACTIVATION_TOKENS = 16_384


def collect_activations(
    model: nn.Module, sites: Iterable[FfnSite], batches: Iterable[Batch], *, max_tokens: int = MAX_ACTIVATION_TOKENS
) -> dict[str, Tensor]:
    """Hidden activations [N, F] per site over non-padding tokens, for transform's grouping="coactivation".

    `sites` come from `lte_compile.inspect(model).ffn_sites`. The first `max_tokens` tokens are kept, on the CPU.
    """
    first, batches = _peek(batches)
    located = locate_sites(model, tuple(sites), first)
    kept: dict[FfnSite, list[Tensor]] = {site: [] for site in located}

    def keeper(parts: list[Tensor]) -> SeeFfn:
        def keep(x_TD: Tensor, hidden_TF: Tensor) -> None:
            room = max_tokens - sum(map(len, parts))
            parts.append(hidden_TF[: max(room, 0)].cpu().clone())

        return keep

    watch_ffns(model, batches, {site: keeper(parts) for site, parts in kept.items()})
    return {site.name: torch.cat(parts) for site, parts in kept.items()}


def locate_sites(model: nn.Module, sites: Sequence[FfnSite], batch: Batch) -> tuple[FfnSite, ...]:
    """The sites with the places where the model runs them on this batch."""
    return locate(model, sites, lambda: _call(model, batch))


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them."""
    remaining = iter(at_least_one(batches))
    first = next(remaining)
    return first, chain([first], remaining)


def _call(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), eval_mode(model):
        model(**arguments_of(model, batch))


def down_norms(model: nn.Module, site: FfnSite) -> Tensor:
    """Length of each neuron's down-projection vector, float32 [F]."""
    weight = model.get_parameter(site.down).detach()
    weight = weight.flatten(1) if site.down_layout is WeightLayout.OUT_IN else weight.t()
    norms_F: Tensor = weight[:, site.down_start : site.down_start + site.hidden].float().norm(dim=0)
    return norms_F


@torch.no_grad()
def watch_ffns(model: nn.Module, batches: Iterable[Batch], watchers: Mapping[FfnSite, SeeFfn]) -> None:
    """Run the model in eval mode, showing each watcher its FFN's inputs [T, D] and ungated hidden values [T, F].

    Padding is left out, and there are no gradients. Sites need places (`locate_sites`, or a transformed model's).
    """
    with eval_mode(model), watching(model, watchers):
        for batch in at_least_one(batches):
            model(**for_layers(model, batch))


@contextmanager
def watching(model: nn.Module, watchers: Mapping[FfnSite, SeeFfn]) -> Iterator[None]:
    """Show each watcher its FFN's inputs and hidden values while the model runs inside the block."""
    padding = PaddingReader(model)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(padding, with_kwargs=True).remove)
        for site, see in watchers.items():
            watch = _WatchFfn(site, padding, see)
            stack.callback(follow_ffn(model, site, watch.see_input, watch.see_hidden))
        yield


class _WatchFfn:
    """Brings an FFN's input and hidden value of the same call together."""

    def __init__(self, site: FfnSite, padding: PaddingReader, see: SeeFfn) -> None:
        self.site = site
        self.padding = padding
        self.see = see
        self.x_TD = torch.empty(0)

    def see_input(self, module: nn.Module, x_TD: Tensor) -> None:
        self.x_TD = self._counted(module, x_TD)

    def see_hidden(self, module: nn.Module, input_TF: Tensor) -> None:
        hidden_TF = input_TF[..., self.site.down_start : self.site.down_start + self.site.hidden]
        self.see(self.x_TD, self._counted(module, hidden_TF))

    def _counted(self, module: nn.Module, values: Tensor) -> Tensor:
        return drop_padding(values, self.padding.mask_of(module, self.padding.current))
