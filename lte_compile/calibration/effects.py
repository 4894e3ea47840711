"""Routers fitted to what experts do to the model's outputs, not only to those of their own FFN.

An expert may add much to a token that nothing reads any more: in a classifier's last layer only the token that is
classified by counts. Energies are therefore weighted, token by token, with the gradient of the model's outputs towards
the FFN's; and since the weighted ones compare between layers, one cut for all shares the budget out among them.

Shapes: T tokens, D model width, F neurons, N sampled tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.calibration.fitting import FIT_ROUNDS, fit_routers
from lte_compile.calibration.watching import SeeFfn, down_norms, watching
from lte_compile.config import FitTarget, Stage
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.hooks import is_convolution
from lte_compile.rewriting.naming import current_sites
from lte_compile.rewriting.permutation import up_projection
from lte_compile.routing.linear_fit import RouterFit, cut_at_density
from lte_compile.routing.router import require_routers
from lte_compile.running.inputs import Batch, at_least_one
from lte_compile.running.modes import arguments_of, eval_mode, in_stage
from lte_compile.running.outputs import logits_of
from lte_compile.running.padding import PaddingReader, drop_padding

# Bounds of a layer's share of its scores above the cut: a router that never or always fires could not be placed.
LEAST_SHARE, LARGEST_SHARE = 1e-3, 0.999


def fit_to(target: FitTarget, model: nn.Module, batches: Iterable[Batch], density: float) -> nn.Module:
    """`fit_routers` or `fit_routers_to_effects`."""
    fit = fit_routers_to_effects if target is FitTarget.EFFECT else fit_routers
    return fit(model, batches, density)


def fit_routers_to_effects(
    model: nn.Module, batches: Iterable[Batch], density: float, *, rounds: int = FIT_ROUNDS
) -> nn.Module:
    """`fit_routers`, with energies weighted by |d outputs / d FFN output| per token and one cut for all layers.

    The gradient is that of the logits summed with random signs (Hutchinson's estimate of the whole Jacobian's size).

    Raises:
        ValueError: as `fit_routers`, or an FFN whose down-projection is no module that is called.
    """
    found, batches = require_routers(model), list(at_least_one(batches))
    if missing := [r.site.name for r in found if r.bias is None]:
        raise ValueError(f"fitted routers need a bias; transform with router_bias=True (site {missing[0]} has none)")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    sites = current_sites(model)
    for number in range(rounds):
        fits = {r: r.new_fit(down_norms(model, sites[r]), *up_projection(model, sites[r])) for r in found}
        with in_stage(model, Stage.HARD if number else Stage.DENSE):
            watch_weighted(model, batches, {sites[r]: fits[r].update for r in found})
        shares = _shares(list(fits.values()), density)
        for (router, fit), share in zip(fits.items(), shares, strict=True):
            router.threshold = router.config.threshold
            router.load_initial(*fit.solve(share, threshold=router.threshold))
    return model


def _shares(fits: Sequence[RouterFit], density: float) -> list[float]:
    """Of each layer's predictions above the cut that passes `density` of all."""
    predicted = [fit.predicted() for fit in fits]
    cut = cut_at_density(torch.cat([values_NE.flatten() for values_NE in predicted]), density)
    shares = [float((values_NE > cut).double().mean()) for values_NE in predicted]
    return [min(max(share, LEAST_SHARE), LARGEST_SHARE) for share in shares]


def watch_weighted(model: nn.Module, batches: Iterable[Batch], watchers: Mapping[FfnSite, SeeFfn]) -> None:
    """As `watch_ffns`, with hidden values multiplied by their tokens' sensitivities over the first batch's mean."""
    device = next(model.parameters()).device
    scale, generator = 0.0, torch.Generator(device).manual_seed(0)
    for batch in batches:
        seen = {site: _Calls(site, PaddingReader(model)) for site in watchers}
        with eval_mode(model), torch.enable_grad(), ExitStack() as stack:
            for calls in seen.values():
                calls.follow(model, stack)
            stack.enter_context(watching(model, {site: calls.see for site, calls in seen.items()}))
            logits = logits_of(model(**arguments_of(model, batch)))
        outputs = [output for calls in seen.values() for output in calls.outputs]
        # a byte each: a language model has millions of logits
        signs = 1 - 2 * torch.randint(0, 2, logits.shape, generator=generator, device=device, dtype=torch.int8)
        # an output that logits do not depend on has gradients of zero
        gradients = iter(torch.autograd.grad((logits * signs).sum(), outputs, materialize_grads=True))
        sizes = {site: calls.sizes(gradients) for site, calls in seen.items()}
        scale = scale or float(torch.cat([size_T for found in sizes.values() for size_T in found]).mean())
        for site, see in watchers.items():
            for (x_TD, hidden_TF), size_T in zip(seen[site].values, sizes[site], strict=True):
                see(x_TD, hidden_TF * (size_T / scale)[:, None])


@dataclass
class _Calls:
    """What one FFN read, computed and gave in one pass, call by call."""

    site: FfnSite
    padding: PaddingReader
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def see(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        self.values.append((x_TD.detach(), hidden_TF.detach()))

    def follow(self, model: nn.Module, stack: ExitStack) -> None:
        """Keep the outputs of the down-projection, and read the padding."""
        stack.callback(model.register_forward_pre_hook(self.padding, with_kwargs=True).remove)
        for place in self.site.places:
            if place.down is None:
                raise ValueError(f"{self.site.name}: no module is called to project down; fit its router to energies")
            stack.callback(model.get_submodule(place.down).register_forward_hook(self._keep).remove)

    def _keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.outputs.append(output if output.requires_grad else output.requires_grad_())  # all weights are frozen
        self.modules.append(module)

    def sizes(self, gradients: Any) -> list[Tensor]:
        """Length of each call's gradient for every token that counts; takes as many as there are calls."""
        masks = [self.padding.mask_of(module, self.padding.current) for module in self.modules]
        widths_last = (next(gradients).movedim(1 if is_convolution(module) else -1, -1) for module in self.modules)
        return [drop_padding(each, mask).float().norm(dim=-1) for each, mask in zip(widths_last, masks, strict=True)]
