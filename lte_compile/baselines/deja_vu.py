"""Deja Vu's neuron predictor (Liu et al. 2023, arXiv 2310.17157, section 4.1): two low-rank layers per FFN.

Shapes: T tokens, D model width, F neurons, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.baselines.predicted import at_share, dense_with_experts, learn_from_traces, routed_by
from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.config import Grouping, TransformConfig
from lte_compile.kernels.selection import top_share
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router

LEARNING_RATE = 1e-3  # Adam, the authors' code
TOKENS = 1024  # a step, the authors' code
# R = D / 8: the authors' 1,024 at D = 12,288 is D / 12, which on models as small as ours leaves ranks of 32.
WIDTH_PER_RANK = 8


class LowRankRouter(Router):
    """A logit per neuron, B A x with a bias; A is [R, D] and B [F, R]. Experts are single neurons."""

    def __init__(self, site: FfnSite, config: TransformConfig, like: Tensor) -> None:
        super().__init__(site, config, like=like.float())
        rank = max(1, site.width // WIDTH_PER_RANK)
        self.weight = nn.Parameter(nn.Linear(site.width, rank, device=like.device).weight.detach())
        self.second = nn.Linear(rank, site.hidden, device=like.device)

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TF: Tensor = self.second(F.linear(x_TD.float(), self.weight))
        return logits_TF

    def scores(self, x_TD: Tensor) -> Tensor:
        return self.logits(x_TD).sigmoid()


@method("deja-vu", title="Deja Vu", granularity=Granularity.NEURON, needs=Needs.TEXT, fits_each_density=True)
def deja_vu(bench: Workbench) -> AtDensity:
    config = replace(bench.transform, expert_size=1, grouping=Grouping.CONTIGUOUS, router_bias=False)

    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        model = dense_with_experts(bench, config)
        routers = routed_by(model, LowRankRouter, bench.config.seed)

        def loss(router: LowRankRouter, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(router.logits(x_TD), top_share(hidden_TF.abs(), density))

        learn_from_traces(bench, model, loss, routers, LEARNING_RATE, TOKENS)
        with at_share(model, density):
            yield model

    return at
