"""Routers, and the stage that all routers of a model are in. lte_compile.rewriting.attach puts them into a model.

Shapes: D model width, F neurons, E experts, T any leading token dimensions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.config import Stage, TransformConfig, parse_stage
from lte_compile.kernels.selection import find_rule
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.linear_fit import RidgeRouterFit, RouterFit, logit_of
from lte_compile.routing.recomputation import recomputing, rejoin_losses

# The rule of each stage unless set_stage names another; the hard stage's is in the config.
_STAGE_RULES = {Stage.DENSE: "dense", Stage.SOFT: "soft"}


class ScoreSink(Protocol):
    """Whoever wants to see the scores while a model runs (lte_compile.running.tracing.RouterTrace)."""

    def record(self, router: Router, scores_TE: Tensor) -> None: ...


class Router(nn.Module):
    """scores = sigmoid(x W_r^T + b_r), then gates by the stage's selection rule.

    `weight` is [E, D], `bias` [E] or None. Scores are computed in float32 whatever the model's dtype (float64 for
    float64 inputs). Dense stage: gates are ones. Soft: the scores. Hard: `selection` (by default score > threshold).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, site: FfnSite, config: TransformConfig, *, like: Tensor | None = None) -> None:
        """Weights are uninitialised; `like` sets their device and dtype."""
        super().__init__()
        self.site = site
        self.config = config
        self.num_experts = -(-site.hidden // config.expert_size)
        like = torch.empty(0) if like is None else like
        self.weight = nn.Parameter(like.new_empty(self.num_experts, self.input_width))
        bias = like.new_zeros(self.num_experts) if config.router_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.stage = Stage.DENSE
        self.rule = _STAGE_RULES[Stage.DENSE]
        self._score_quantiles: tuple[float, ...] = ()
        self.threshold = config.threshold
        self.sink: ScoreSink | None = None
        self.shift_B: Tensor | None = None  # see lte_compile.training.budgets

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates of shape [T, E] for inputs [T, D] (any leading dimensions)."""
        scores_TE = self.scores(x_TD)
        if self.shift_B is not None:
            scores_TE = lowered(scores_TE, self.shift_B)
        if recomputing():
            scores_TE = rejoin_losses(self, scores_TE)
        elif self.sink is not None:
            self.sink.record(self, scores_TE)
        hint = self.expected_density
        expected = () if hint is None else (hint,)
        gates_TE: Tensor = torch.ops.lte.select(scores_TE, self.rule, self.threshold, *expected)
        return gates_TE

    @property
    def expected_density(self) -> float | None:
        """Share of experts above the threshold where `lte_compile.calibrate` measured scores, in whole percent."""
        return self._share_above if self.rule == "threshold" else None

    @property
    def threshold(self) -> float:
        """tau in the rule; `lte_compile.set_density` moves it."""
        return self._threshold

    @threshold.setter
    def threshold(self, tau: float) -> None:
        self._threshold = tau
        self._expect()

    @property
    def score_quantiles(self) -> tuple[float, ...]:
        """Of the scores that `lte_compile.calibrate` measured, evenly spaced and rising; empty before."""
        return self._score_quantiles

    @score_quantiles.setter
    def score_quantiles(self, quantiles: tuple[float, ...]) -> None:
        self._score_quantiles = quantiles
        self._expect()

    def _expect(self) -> None:
        """Here rather than in `forward`, which would search the quantiles in every call and have Dynamo guard each."""
        found = self._score_quantiles
        self._share_above = round(1 - bisect_right(found, self._threshold) / len(found), 2) if found else None

    def scores(self, x_TD: Tensor) -> Tensor:
        """What the rule selects by, [T, E]. Routers of other kinds (lte_compile.baselines) have scores of their own."""
        scores_TE: Tensor = torch.ops.lte.route(self.router_input(x_TD), self.weight, self.bias)
        return scores_TE

    def router_input(self, x_TD: Tensor) -> Tensor:
        """What `weight` is multiplied by, [T, `input_width`]; here the FFN's own input."""
        return x_TD

    @property
    def input_width(self) -> int:
        """Columns of `weight`."""
        return self.site.width

    @property
    def weights_read(self) -> int:
        """Entries of the matrices that one token's scores take."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)

    def initial_state(self, weight_ED: Tensor, bias_E: Tensor) -> dict[str, Tensor]:
        """The parameters that score as this linear router does, by name; the bias only if this router has one."""
        return {"weight": weight_ED} if self.bias is None else {"weight": weight_ED, "bias": bias_E}

    @torch.no_grad()
    def load_initial(self, *weights: Tensor) -> None:
        """Take weights to start from (lte_compile.routing.linear_fit): from `initial_state` or this kind's fit."""
        for name, tensor in self.initial_state(*weights).items():
            self.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def scale_logits(self, factor: float) -> None:
        """Make logits `factor` times as far from the threshold's: the same experts stay above it.

        Without a bias they are scaled about 0, which is the same for a threshold of one half.
        """
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor).add_((1 - factor) * logit_of(self.threshold))
        self.score_quantiles = ()

    def new_fit(self, down_norms_F: Tensor, up_FD: Tensor, up_bias_F: Tensor | None) -> RouterFit:
        """What learns this router's weights from data; its solution is for `load_initial`.

        It may look at the FFN: at the lengths of the down-projection's vectors and at the up-projection.
        """
        return RidgeRouterFit(down_norms_F, self.config.expert_size, width=self.site.width, seed=self.config.seed)

    @property
    def active_rule(self) -> str:
        """The rule that says which experts are active: all in the dense stage, in the soft one the hard stage's."""
        return self.config.selection if self.stage is Stage.SOFT else self.rule

    @property
    def expert_sizes(self) -> Tensor:
        """Neurons per expert, int64 [E]; the last expert is smaller where E * S exceeds F."""
        sizes_E = torch.full((self.num_experts,), self.config.expert_size)
        sizes_E[-1] -= self.num_experts * self.config.expert_size - self.site.hidden
        return sizes_E

    def extra_repr(self) -> str:
        shape = f"{self.site.width} -> {self.num_experts} experts of {self.config.expert_size}"
        return f"{shape}, stage={self.stage.value}, rule={self.rule}, threshold={self.threshold:g}"


def lowered(scores_TE: Tensor, shift_B: Tensor) -> Tensor:
    """Scores of logits lower by shift_B[b] in row b, whose tokens are one b-th of the first axis.

    sigmoid(z - c) = s / (s + (1 - s) e^c) for s = sigmoid(z), without logits that saturated scores do not have.

    Raises:
        ValueError: the first axis is none of rows.
    """
    odds_T = per_token(shift_B.to(scores_TE.dtype).exp(), scores_TE)
    return scores_TE / (scores_TE + (1 - scores_TE) * odds_T)


def per_token(values_B: Tensor, like: Tensor) -> Tensor:
    """One value a row, to be multiplied with a tensor [T, ...] whose tokens are one b-th of the first axis a row.

    Raises:
        ValueError: the first axis is none of rows.
    """
    tokens, rows = like.shape[0], len(values_B)
    if tokens % rows:
        raise ValueError(f"a density for each of {rows} rows needs FFN inputs with rows first; got {tokens} tokens")
    return values_B[:, None].expand(rows, tokens // rows).reshape(tokens, *[1] * (like.dim() - 1))


def routers(model: nn.Module) -> Iterator[Router]:
    """The model's routers, each once, in module order. Nothing for a model that was not transformed."""
    return (module for module in model.modules() if isinstance(module, Router))


def require_routers(model: nn.Module) -> tuple[Router, ...]:
    """The model's routers, or a ValueError that says how to get some."""
    found = tuple(routers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no routers; call lte_compile.transform(model) first")
    return found


def set_stage(model: nn.Module, stage: Stage | str, *, selection: str | None = None) -> nn.Module:
    """Move every FFN of a transformed model to a stage, in place; returns the model.

    "dense": all gates 1, the original function. "soft": gates are the scores, routers train (LTE's stage 1).
    "hard": gates are [score > threshold], routers are frozen (stage 2 and inference).

    Args:
        selection: another rule than the stage's own (names: lte_compile.kernels.selection). Stage "soft" with
            "straight_through" trains with hard gates forward and score gradients backward.

    Raises:
        ValueError: unknown stage or rule, or a model without routers.
    """
    stage = parse_stage(stage)
    if selection is not None:
        find_rule(selection)
    for router in require_routers(model):
        router.stage = stage
        router.rule = selection or _STAGE_RULES.get(stage, router.config.selection)
        router.requires_grad_(stage is not Stage.HARD)
    return model
