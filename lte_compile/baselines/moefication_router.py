"""MoEfication with its trained router (Zhang et al. 2022, arXiv 2110.01786, section 3.3): a small MLP per FFN.

Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.baselines.moefication import activation_mass
from lte_compile.baselines.predicted import at_share, dense_with_experts, learn_from_traces, routed_by
from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.config import Grouping, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router

LEARNING_RATE = 0.01  # Adam, the authors' code
TOKENS = 512  # a step, the authors' code


class MlpRouter(Router):
    """logits = W2 tanh(W1 x / |x|), both with biases; W1 is [E, D] and W2 [E, E]."""

    def __init__(self, site: FfnSite, config: TransformConfig, like: Tensor) -> None:
        super().__init__(site, config, like=like.float())
        first = nn.Linear(site.width, self.num_experts, device=like.device)
        self.load_initial(first.weight, first.bias)
        self.second = nn.Linear(self.num_experts, self.num_experts, device=like.device)

    def logits(self, x_TD: Tensor) -> Tensor:
        normalized_TD = F.normalize(x_TD.float(), dim=-1)
        logits_TE: Tensor = self.second(torch.tanh(F.linear(normalized_TD, self.weight, self.bias)))
        return logits_TE

    def scores(self, x_TD: Tensor) -> Tensor:
        return self.logits(x_TD).sigmoid()


@method("moefication", title="MoEfication, router", granularity=Granularity.EXPERT, needs=Needs.TEXT)
def moefication(bench: Workbench) -> AtDensity:
    model = dense_with_experts(bench, replace(bench.transform, grouping=Grouping.BALANCED_KMEANS))
    routers = routed_by(model, MlpRouter, bench.config.seed)
    learn_from_traces(bench, model, _loss, routers, LEARNING_RATE, TOKENS)

    def at(density: float) -> AbstractContextManager[nn.Module]:
        return at_share(model, density)

    return at


def _loss(router: MlpRouter, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
    """Binary cross entropy with each expert's activation mass over the batch's largest as its target."""
    mass_TE = activation_mass(hidden_TF, router.config.expert_size)
    target_TE = mass_TE / mass_TE.max().clamp(min=torch.finfo(mass_TE.dtype).tiny)
    return F.binary_cross_entropy_with_logits(router.logits(x_TD), target_TE)
