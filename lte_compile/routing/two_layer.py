"""A router with a hidden layer beside the paper's linear one.

    scores = sigmoid(W [x, relu(A x + a)] + b)

The linear part is kept, so that it starts as the fitted linear router and adds to it; two layers alone would have to
learn what the linear one gets in closed form, through R features. The features are the router's input beside x, so
`lte::route` and the kernels compute the scores as they do a linear router's.

Shapes: T any leading token dimensions, D model width, E experts, R features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.linear_fit import RouterFit
from lte_compile.routing.router import Router
from lte_compile.routing.two_layer_fit import TwoLayerFit, random_features

# Deja Vu's predictors (arXiv 2310.17157) have R = D / 12 at D = 12,288; models as small as those trained here need more
# (docs/training.md).
WIDTH_PER_RANK = 4


class TwoLayerRouter(Router):
    """`weight` is [E, D + R], its last R columns for the features; `feature_weight` [R, D], `feature_bias` [R].

    The features are computed in the model's dtype, as its other layers are, the scores from them in float32.
    """

    feature_weight: nn.Parameter
    feature_bias: nn.Parameter

    def __init__(self, site: FfnSite, config: TransformConfig, *, like: Tensor | None = None) -> None:
        """As `Router`; the rank is decided here, and with it what is saved and loaded."""
        rank = config.router_rank or max(1, site.width // WIDTH_PER_RANK)
        super().__init__(site, replace(config, router_rank=rank), like=like)
        self.feature_weight = nn.Parameter(self.weight.new_empty(rank, site.width))
        self.feature_bias = nn.Parameter(self.weight.new_zeros(rank))

    @property
    def rank(self) -> int:
        """Number of features, R."""
        assert self.config.router_rank is not None
        return self.config.router_rank

    @property
    def input_width(self) -> int:
        return self.site.width + self.rank

    def router_input(self, x_TD: Tensor) -> Tensor:
        """x and its features, [T, D + R]."""
        features_TR = F.relu(F.linear(x_TD, self.feature_weight, self.feature_bias))
        return torch.cat([x_TD, features_TR], -1)

    def initial_state(
        self,
        weight: Tensor,
        bias_E: Tensor,
        feature_weight_RD: Tensor | None = None,
        feature_bias_R: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Of a whole two-layer router, or of a linear one (`weight` [E, D]), beside which the features say nothing."""
        if feature_weight_RD is None or feature_bias_R is None:
            random = random_features(self.rank, self.site.width, self.config.seed)
            feature_weight_RD, feature_bias_R = random.weight_RD, random.bias_R
        silent_ER = weight.new_zeros(len(weight), self.input_width - weight.shape[1])
        return {
            **super().initial_state(torch.cat([weight, silent_ER], 1), bias_E),
            "feature_weight": feature_weight_RD,
            "feature_bias": feature_bias_R,
        }

    def new_fit(self, down_norms_F: Tensor, up_FD: Tensor, up_bias_F: Tensor | None) -> RouterFit:
        size, seed = self.config.expert_size, self.config.seed
        return TwoLayerFit(down_norms_F, size, up_FD=up_FD, up_bias_F=up_bias_F, rank=self.rank, seed=seed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, features={self.rank}"
