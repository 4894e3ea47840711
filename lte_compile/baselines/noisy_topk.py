"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, section 2.1), trained end to end with the model.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.baselines.predicted import RULE, at_share, routed_by, set_share, start_with_experts
from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.config import Stage, TransformConfig
from lte_compile.kernels.selection import top_share
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router
from lte_compile.training.config import Phase

# LTE's authors train routers from scratch at this rate; the default rate here is for fitted ones (docs/training.md).
LEARNING_RATE = 1e-2


class NoisyTopKRouter(Router):
    """Gates are a softmax over the k best of x W_g + normal noise * softplus(x W_n); noise in training only.

    The softmax is times k: a pretrained FFN expects its experts' sum, gates of 1, not their mean.
    """

    def __init__(self, site: FfnSite, config: TransformConfig, like: Tensor) -> None:
        super().__init__(site, config, like=like.float())
        nn.init.zeros_(self.weight)  # as in the paper: all experts alike, noise picks
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    @property
    def weights_read(self) -> int:
        return self.weight.numel()

    def scores(self, x_TD: Tensor) -> Tensor:
        return self._logits(x_TD).softmax(-1)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.stage is Stage.DENSE:
            return super().forward(x_TD)
        logits_TE = self._logits(x_TD)
        if self.sink is not None:
            self.sink.record(self, logits_TE.softmax(-1))
        dropped_TE = top_share(logits_TE.detach(), self.threshold) == 0
        gates_TE = logits_TE.masked_fill(dropped_TE, float("-inf")).softmax(-1)
        return gates_TE * (~dropped_TE).sum(-1, keepdim=True)

    def _logits(self, x_TD: Tensor) -> Tensor:
        wide_TD = x_TD.float()
        with torch.autocast(x_TD.device.type, enabled=False):  # in float32, as LTE's
            logits_TE = F.linear(wide_TD, self.weight)
            if not self.training:
                return logits_TE
            return logits_TE + torch.randn_like(logits_TE) * F.softplus(F.linear(wide_TD, self.noise_weight))


@method("noisy-topk", title="Noisy top-k", granularity=Granularity.EXPERT, needs=Needs.TRAINING, fits_each_density=True)
def noisy_topk(bench: Workbench) -> AtDensity:
    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        model = start_with_experts(bench, bench.transform)
        routed_by(model, NoisyTopKRouter, bench.config.seed)
        set_share(model, density)
        phase = Phase(name=f"noisy top-k at {density:g}", steps=bench.steps, stage=Stage.SOFT, selection=RULE)
        name = f"noisy-topk-{density:g}"
        bench.train(model, name, [phase], router_learning_rate=LEARNING_RATE)
        with at_share(model, density):
            yield model
        bench.forget(name)

    return at
