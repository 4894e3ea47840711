"""Router weights to start training from. Tensor math only: no model is touched here.

The paper leaves the initialisation open, and all zeros will not do: every score would be 0.5, the singularity of its
separability loss. Two answers: `centroid_router` needs weights only; `RidgeRouterFit` needs a few batches and starts
far closer to a useful router (figures in docs/grouping.md).

Both return (w_router_ED, bias_E) in float32 for scores = sigmoid(x W^T + b), and expect neurons in expert order, that
is after the permutation of `lte_compile.grouping.group_neurons`; the last expert may be smaller.

Shapes: T tokens, D model width, F neurons, S expert size, E = ceil(F / S) experts, N sampled tokens.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

# Standard deviation of the logits over (token, expert) pairs. 2 spreads one deviation of the pairs over scores of
# 0.12 to 0.88: clear of the threshold, and the sigmoid still passes a tenth of its input's gradient there.
LOGIT_STD = 2.0
# Share of the mean energy that is added before the log. SmolLM2-135M at half its neurons, routers fitted, no training:
# loss 4.03 with 1e-4 and 3.97 with .1 (dense 3.32); within a layer .1 and .3 keep the most energy, 1 and 3 less.
ENERGY_FLOOR = 0.1


class RouterFit(Protocol):
    """Learns a router's weights from what one FFN reads and computes, batch by batch."""

    def update(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """Add a batch: the FFN's inputs and the hidden activations they gave, ungated."""

    def solve(self, target_density: float, *, threshold: float = 0.5) -> tuple[Tensor, ...]:
        """Weights, for `Router.load_initial`, with `target_density` of the scores seen above `threshold`."""

    def predicted(self) -> Tensor:
        """What the fit says of sampled tokens, [N, E]: log energies."""


def centroid_router(
    weights_FD: Tensor,
    expert_size: int,
    *,
    density: float = 0.75,
    threshold: float = 0.5,
    logit_std: float = LOGIT_STD,
) -> tuple[Tensor, Tensor]:
    """Route by similarity to an expert's mean neuron; needs no data.

    Row e is the mean of expert e's L2-normalised weight rows, rescaled to length `logit_std`, so that inputs with
    independent components of unit variance (what a norm layer gives) have logits of that deviation. One bias for all
    experts lifts the share of scores above the threshold to `density` under the same assumption. It is 0 only at
    density 0.5 and threshold 0.5. An expert whose rows cancel out gets a zero row: its bias alone decides.

    Args:
        weights_FD: up projection (gate projection for gated FFNs), rows in expert order.

    Raises:
        ValueError: weights that are no matrix, or a size, density, threshold or deviation out of range.
    """
    if weights_FD.ndim != 2:
        raise ValueError(f"weights must be [neurons, width]; got {list(weights_FD.shape)}")
    _check_expert_size(expert_size, weights_FD.shape[0])
    _check_scale(density, threshold, logit_std)
    normalize = torch.nn.functional.normalize
    experts = torch.split(weights_FD.detach(), expert_size)  # one at a time in float32
    means_ED = torch.stack([normalize(rows_SD.float(), dim=1).mean(0) for rows_SD in experts])
    w_router_ED = logit_std * normalize(means_ED, dim=1)
    bias = logit_of(threshold) + logit_std * NormalDist().inv_cdf(density)
    return w_router_ED, torch.full_like(w_router_ED[:, 0], bias)


def group_energy(hidden_TF: Tensor, down_norms_F: Tensor, expert_size: int) -> Tensor:
    """energy[t, e] = sum over expert e's neurons j of h_tj^2 |w_down_j|^2, in the dtype of `hidden_TF`.

    It bounds what the expert adds to the output from above, up to a factor S, and equals it where down rows are
    orthogonal. `down_norms_F`: length of each neuron's down-projection row, `w_down_DF.norm(dim=0)`.
    """
    energy_TF = (hidden_TF * down_norms_F).square()
    experts = -(-energy_TF.shape[1] // expert_size)
    padding = experts * expert_size - energy_TF.shape[1]
    return torch.nn.functional.pad(energy_TF, (0, padding)).view(-1, experts, expert_size).sum(-1)


class RidgeRouterFit:
    """Ridge regression of each expert's log energy on the FFN's input, streamed over batches.

    fit = RidgeRouterFit(down_norms_F, expert_size, width=D); fit.update(x_TD, hidden_TF) for every batch;
    w_router_ED, bias_E = fit.solve(target_density). Moments are float64; memory is D^2 doubles plus
    `sample_tokens` x D floats (a uniform sample of the inputs, on which `solve` places the threshold).

    Args:
        down_norms_F: length of each neuron's down-projection row, in expert order; its device is used throughout.
        width: D of the inputs.
        ridge: penalty, relative to the mean variance of the inputs' components.
        energy_floor: added to the energy before the log, relative to the first batch's mean energy. It keeps
            differences below what an output notices from being fitted, and silent ReLU groups finite.
        sample_tokens: with fewer tokens than this, the threshold is placed on all of them.
    """

    def __init__(
        self,
        down_norms_F: Tensor,
        expert_size: int,
        *,
        width: int,
        ridge: float = 1e-3,
        energy_floor: float = ENERGY_FLOOR,
        sample_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        if down_norms_F.ndim != 1:
            raise ValueError(f"down_norms must hold one length per neuron; got shape {list(down_norms_F.shape)}")
        _check_expert_size(expert_size, len(down_norms_F))
        if width < 1 or sample_tokens < 1 or not ridge > 0 or not energy_floor > 0:
            raise ValueError("width, sample_tokens, ridge and energy_floor must all be positive")
        self._down_norms_F = down_norms_F.detach().double()
        self._expert_size = expert_size
        self._ridge = ridge
        self._energy_floor = energy_floor
        self._floor: Tensor | None = None
        experts = -(-len(down_norms_F) // expert_size)
        zeros = self._down_norms_F.new_zeros
        self._tokens = 0
        self._sum_x_D, self._sum_y_E = zeros(width), zeros(experts)
        self._sum_xx_DD, self._sum_xy_DE = zeros(width, width), zeros(width, experts)
        self._sample_ND = zeros(sample_tokens, width, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def tokens(self) -> int:
        """How many tokens the fit has seen."""
        return self._tokens

    @torch.no_grad()
    def update(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """Add a batch: the FFN's inputs and the hidden activations they gave, ungated, one row per token, no padding.

        Raises:
            ValueError: shapes that do not fit the constructor's, or NaN or infinity in either.
        """
        width, neurons = len(self._sum_x_D), len(self._down_norms_F)
        if x_TD.ndim != 2 or x_TD.shape[1] != width or hidden_TF.shape != (len(x_TD), neurons):
            raise ValueError(
                f"expected inputs [T, {width}] and hidden activations [T, {neurons}]; "
                f"got {list(x_TD.shape)} and {list(hidden_TF.shape)}"
            )
        if len(x_TD) == 0:
            return
        x64_TD, y_TE = x_TD.to(self._sum_x_D), self._log_energy(hidden_TF.to(self._sum_x_D))
        if not bool(torch.isfinite(x64_TD).all() & torch.isfinite(y_TE).all()):
            raise ValueError("inputs or hidden activations hold NaN or infinity; the router cannot be fitted to them")
        self._keep_sample(x64_TD.float())
        self._tokens += len(x64_TD)
        self._sum_x_D += x64_TD.sum(0)
        self._sum_y_E += y_TE.sum(0)
        self._sum_xx_DD.addmm_(x64_TD.T, x64_TD)
        self._sum_xy_DE.addmm_(x64_TD.T, y_TE)

    @torch.no_grad()
    def solve(
        self, target_density: float, *, threshold: float = 0.5, logit_std: float = LOGIT_STD
    ) -> tuple[Tensor, Tensor]:
        """Router whose scores exceed `threshold` for `target_density` of the (token, expert) pairs seen.

        One cut for all experts, so experts that matter more are chosen more often; logits have deviation `logit_std`
        over the pairs. When nothing tells pairs apart (constant energy), every expert is on.

        Raises:
            ValueError: no batch yet, or a density, threshold or deviation out of range.
        """
        _check_scale(target_density, threshold, logit_std)
        if self._tokens == 0:
            raise ValueError("nothing to fit yet: call update(x, hidden) with at least one token before solve()")
        slope_ED, offset_E = self._regression()
        predicted_NE = self._sample() @ slope_ED.T + offset_E
        cut, spread = cut_at_density(predicted_NE, target_density), predicted_NE.std(correction=0)
        noise = 1e-9 * (1 + offset_E.abs().max())
        if spread <= noise:
            always = torch.full_like(offset_E, logit_of(threshold) + logit_std)
            return torch.zeros_like(slope_ED).float(), always.float()
        gain = logit_std / spread
        return (gain * slope_ED).float(), (gain * (offset_E - cut) + logit_of(threshold)).float()

    @torch.no_grad()
    def predicted(self) -> Tensor:
        slope_ED, offset_E = self._regression()
        return self._sample() @ slope_ED.T + offset_E

    def _sample(self) -> Tensor:
        return self._sample_ND[: self._tokens].double()

    def _log_energy(self, hidden_TF: Tensor) -> Tensor:
        energy_TE = group_energy(hidden_TF, self._down_norms_F, self._expert_size)
        if self._floor is None:
            tiny = torch.finfo(torch.float32).tiny  # all-zero activations
            self._floor = (self._energy_floor * energy_TE.mean()).clamp(min=tiny)
        return (energy_TE + self._floor).log()

    def _keep_sample(self, x_TD: Tensor) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R): every token seen is kept with the same probability."""
        capacity = len(self._sample_ND)
        for_free = min(max(capacity - self._tokens, 0), len(x_TD))
        self._sample_ND[self._tokens : self._tokens + for_free] = x_TD[:for_free]
        seen_T = self._tokens + torch.arange(for_free, len(x_TD), dtype=torch.float64)
        slot_T = (torch.rand(len(seen_T), generator=self._generator, dtype=torch.float64) * (seen_T + 1)).long()
        last_token_of_slot = {int(slot): t for t, slot in enumerate(slot_T.tolist()) if slot < capacity}
        if not last_token_of_slot:
            return
        slots = torch.tensor(list(last_token_of_slot.keys()), device=x_TD.device)
        tokens = torch.tensor(list(last_token_of_slot.values()), device=x_TD.device)
        self._sample_ND[slots] = x_TD[for_free + tokens]

    def _regression(self) -> tuple[Tensor, Tensor]:
        mean_x_D, mean_y_E = self._sum_x_D / self._tokens, self._sum_y_E / self._tokens
        cov_xx_DD = self._sum_xx_DD / self._tokens - torch.outer(mean_x_D, mean_x_D)
        cov_xy_DE = self._sum_xy_DE / self._tokens - torch.outer(mean_x_D, mean_y_E)
        # inputs that hardly vary about their mean: what varies is rounding, which the floor keeps from being fitted
        floor = 1e-6 * self._sum_xx_DD.diagonal().mean() / self._tokens + torch.finfo(torch.float32).tiny
        cov_xx_DD.diagonal().add_(self._ridge * torch.maximum(cov_xx_DD.diagonal().mean(), floor))
        slope_ED = torch.linalg.solve(cov_xx_DD, cov_xy_DE).T
        return slope_ED, mean_y_E - slope_ED @ mean_x_D


def cut_at_density(values_NE: Tensor, density: float) -> Tensor:
    """Halfway between the last value that is to pass and the first that is not."""
    ordered = values_NE.flatten().sort(descending=True).values
    passing = min(max(round(density * len(ordered)), 1), len(ordered))
    if passing == len(ordered):
        return ordered[-1] - ordered.std(correction=0)
    return 0.5 * (ordered[passing - 1] + ordered[passing])


def logit_of(score: float) -> float:
    """Of a score in float32, which may be 0 or 1."""
    inside = min(max(score, torch.finfo(torch.float32).eps), 1 - torch.finfo(torch.float32).eps)
    return math.log(inside / (1 - inside))


def _check_expert_size(expert_size: int, neurons: int) -> None:
    if not 1 <= expert_size <= neurons:
        raise ValueError(f"expert_size must lie between 1 and the {neurons} neurons; got {expert_size}")


def _check_scale(density: float, threshold: float, logit_std: float) -> None:
    for name, value in (("density", density), ("threshold", threshold)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {value!r}")
    if not logit_std > 0.0:
        raise ValueError(f"logit_std must be positive; got {logit_std!r}")
