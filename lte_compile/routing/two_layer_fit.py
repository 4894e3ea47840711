"""Two-layer routers to start training from, in closed form: ridge regression on the input and on features of it.

Shapes: T tokens, D model width, F neurons, E experts, R features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.routing.linear_fit import RidgeRouterFit


class Features:
    """relu(A x + a) for `weight` [R, D] and `bias` [R]."""

    def __init__(self, weight_RD: Tensor, bias_R: Tensor) -> None:
        self.weight_RD = weight_RD
        self.bias_R = bias_R

    def beside(self, x_TD: Tensor) -> Tensor:
        """x and its features, [T, D + R]."""
        return torch.cat([x_TD, F.relu(F.linear(x_TD, self.weight_RD, self.bias_R))], -1)


def random_features(rank: int, width: int, seed: int) -> Features:
    """Features of unit variance of inputs of unit variance, before the relu."""
    generator = torch.Generator().manual_seed(seed)
    weight_RD = torch.randn(rank, width, generator=generator) / width**0.5
    return Features(weight_RD, weight_RD.new_zeros(rank))


class TwoLayerFit:
    """Ridge regression of each expert's log energy on x and R features of it, streamed over batches.

    Takes and gives what `RidgeRouterFit` does; the solution has the features' weight [R, D] and bias [R] as well.
    Features are rows of the up-projection: those of the neurons that contribute the most to the first batch. What a
    linear router cannot tell is the magnitude of a value of either sign, and these values decide about the most.
    (Random directions and principal components told nothing, and training the features by Adam added nothing to that:
    docs/training.md.)

    Args:
        up_FD, up_bias_F: the up-projection, in expert order.
        rank: R; those beyond F are random directions.
    """

    def __init__(
        self,
        down_norms_F: Tensor,
        expert_size: int,
        *,
        up_FD: Tensor,
        up_bias_F: Tensor | None = None,
        rank: int,
        seed: int = 0,
    ) -> None:
        self._ridge = RidgeRouterFit(down_norms_F, expert_size, width=up_FD.shape[1] + rank, seed=seed)
        self._down_norms_F = down_norms_F.detach()
        self._up_FD = up_FD.detach().float()
        self._up_bias_F = torch.zeros_like(self._up_FD[:, 0]) if up_bias_F is None else up_bias_F.detach().float()
        self._rank, self._seed = rank, seed
        self._features: Features | None = None

    @torch.no_grad()
    def update(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """As `RidgeRouterFit.update`."""
        neurons, width = self._up_FD.shape
        if x_TD.ndim != 2 or x_TD.shape[1] != width or hidden_TF.shape != (len(x_TD), neurons):
            raise ValueError(
                f"expected inputs [T, {width}] and hidden activations [T, {neurons}]; "
                f"got {list(x_TD.shape)} and {list(hidden_TF.shape)}"
            )
        if len(x_TD) == 0:
            return
        x_TD = x_TD.to(self._up_FD)
        self._features = self._features or self._choose(x_TD, hidden_TF)
        self._ridge.update(self._features.beside(x_TD), hidden_TF)

    def solve(self, target_density: float, *, threshold: float = 0.5) -> tuple[Tensor, ...]:
        """As `RidgeRouterFit.solve`: weight [E, D + R], bias [E], and the features' weight [R, D] and bias [R]."""
        weight, bias_E = self._ridge.solve(target_density, threshold=threshold)
        assert self._features is not None  # the ridge has seen a token
        return weight, bias_E, self._features.weight_RD, self._features.bias_R

    def predicted(self) -> Tensor:
        """As `RidgeRouterFit.predicted`."""
        return self._ridge.predicted()

    def _choose(self, x_TD: Tensor, hidden_TF: Tensor) -> Features:
        """Scaled to the spread of x, so that one ridge penalty suits both."""
        energy_F = (hidden_TF.to(self._up_FD) * self._down_norms_F).square().mean(0)
        strongest = energy_F.argsort(descending=True, stable=True)[: self._rank]
        missing = random_features(self._rank - len(strongest), x_TD.shape[1], self._seed)
        weight_RD = torch.cat([self._up_FD[strongest], missing.weight_RD.to(x_TD)])
        bias_R = torch.cat([self._up_bias_F[strongest], missing.bias_R.to(x_TD)])
        spread_R = F.linear(x_TD, weight_RD, bias_R).std(0, correction=0)
        gain_R = x_TD.std(0, correction=0).mean() / spread_R.clamp_min(torch.finfo(x_TD.dtype).tiny)
        gain_R = gain_R.where(spread_R > 0, 1.0)
        return Features(gain_R[:, None] * weight_RD, gain_R * bias_R)
