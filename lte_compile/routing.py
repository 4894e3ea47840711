"""Routers and how they hook into a model's own modules.

A transformed FFN keeps its modules and its parent's forward. The module of the first projection gains a child `router`
and a forward pre-hook that computes the gates from its own input; the down-projection gains a pre-hook that scales its
input by them through the anchor op `lte::gate_hidden`. Hooks rather than swapped classes: the leaf's type, pickling and
deepcopy stay as they were, and torch.nn.TransformerEncoderLayer's fused path, which would bypass the rewrite, turns
itself off when it sees one.

Shapes: D model width, F neurons, E experts, T any leading token dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.config import Stage, TransformConfig, parse_stage
from lte_compile.kernels.selection import find_rule
from lte_compile.passes.ir import FfnSite

# The rule of each stage unless set_stage names another; the hard stage's is in the config.
_STAGE_RULES = {Stage.DENSE: "dense", Stage.SOFT: "soft"}


class ScoreSink(Protocol):
    """Whoever wants to see the scores while a model runs (lte_compile.tracing.RouterTrace)."""

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
        self.weight = nn.Parameter(like.new_empty(self.num_experts, site.width))
        bias = like.new_zeros(self.num_experts) if config.router_bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.stage = Stage.DENSE
        self.rule = _STAGE_RULES[Stage.DENSE]
        self.threshold = config.threshold
        self.sink: ScoreSink | None = None
        self.score_quantiles: tuple[float, ...] = ()  # measured by lte_compile.calibrate

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates of shape [T, E] for inputs [T, D] (any leading dimensions)."""
        scores_TE = torch.ops.lte.route(x_TD, self.weight, self.bias)
        if self.sink is not None and not _recomputing():
            self.sink.record(self, scores_TE)
        gates_TE: Tensor = torch.ops.lte.select(scores_TE, self.rule, self.threshold)
        return gates_TE

    @torch.no_grad()
    def load_initial(self, weight_ED: Tensor, bias_E: Tensor) -> None:
        """Take weights to start from (lte_compile.router_init); the bias only if this router has one."""
        self.weight.copy_(weight_ED)
        if self.bias is not None:
            self.bias.copy_(bias_E)

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


def _recomputing() -> bool:
    """True inside a backward pass, where gradient checkpointing runs the forward a second time."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


class Handover:
    """Carries the gates from the first projection's hook to the down-projection's hook."""

    def __init__(self) -> None:
        self.gates_TE: Tensor | None = None


class ComputeGates:
    """Pre-hook of the first projection: its input is the FFN's input, so the router reads it here."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TD = args[0] if args else next(iter(kwargs.values()))
        router: Any = module.router
        self.handover.gates_TE = router(x_TD.movedim(1, -1) if _channels_first(module) else x_TD)


class ApplyGates:
    """Pre-hook of the down-projection: scales its input, the hidden activation, by the gates."""

    def __init__(self, handover: Handover, expert_size: int) -> None:
        self.handover = handover
        self.expert_size = expert_size

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        gates_TE, self.handover.gates_TE = self.handover.gates_TE, None
        if gates_TE is None:
            raise RuntimeError("the down-projection of a routed FFN ran before its first projection; no gates to apply")
        name, hidden_TF = (None, args[0]) if args else next(iter(kwargs.items()))
        gated_TF = _gate(hidden_TF, gates_TE, self.expert_size, _channels_first(module))
        return ((gated_TF, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: gated_TF})


def _channels_first(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _gate(hidden: Tensor, gates_TE: Tensor, expert_size: int, channels_first: bool) -> Tensor:
    hidden_TF = hidden.movedim(1, -1) if channels_first else hidden
    if gates_TE.shape[:-1] != hidden_TF.shape[:-1]:  # the parent flattened tokens between the two projections
        gates_TE = gates_TE.reshape(*hidden_TF.shape[:-1], gates_TE.shape[-1])
    gated_TF: Tensor = torch.ops.lte.gate_hidden(hidden_TF, gates_TE, expert_size)
    return gated_TF.movedim(-1, 1) if channels_first else gated_TF


def attach_router(model: nn.Module, router: Router) -> None:
    """Put `router` under its site's first projection and hook both projections. Parameters stay untouched."""
    first = model.get_submodule(router.site.first_projection.rpartition(".")[0])
    down = model.get_submodule(router.site.down.rpartition(".")[0])
    handover = Handover()
    first.add_module("router", router)
    first.register_forward_pre_hook(ComputeGates(handover), with_kwargs=True)
    down.register_forward_pre_hook(ApplyGates(handover, router.config.expert_size), with_kwargs=True)


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
