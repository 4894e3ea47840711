"""Routers that keep a fixed share of experts, and predictors trained on a dense model's traces to be such routers.

Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

from lte_compile.baselines.workbench import Workbench
from lte_compile.calibration.watching import SeeFfn, watch_ffns
from lte_compile.config import RouterKind, Stage, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router, require_routers, set_stage
from lte_compile.running.modes import in_stage
from lte_compile.transform import transform

R = TypeVar("R", bound=Router)
MakeRouter: TypeAlias = Callable[[FfnSite, TransformConfig, Tensor], R]
PredictionLoss: TypeAlias = Callable[[R, Tensor, Tensor], Tensor]  # (router, x [T, D], hidden [T, F]) -> scalar

RULE = "top_share"


def routed_by(model: nn.Module, make: MakeRouter[R], seed: int) -> tuple[R, ...]:
    """Put routers from `make(site, config, like)` in the place of LTE's, in a transformed model.

    What they draw depends on the seed alone, not on what was run before.
    """
    devices = {old.weight.device for old in require_routers(model) if old.weight.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return _routed_by(model, make)


def _routed_by(model: nn.Module, make: MakeRouter[R]) -> tuple[R, ...]:
    made = []
    for old in require_routers(model):
        if len(old.site.places) > 1:
            raise ValueError(f"{old.site.name} runs in several modules; only LTE's own routers can be shared")
        new = make(old.site, old.config, old.weight)
        model.set_submodule(old.site.router_path, new)
        made.append(new)
    return tuple(made)


def dense_with_experts(bench: Workbench, config: TransformConfig) -> nn.Module:
    """A copy of the dense model with routers that keep a share."""
    model, config = bench.dense_copy(), with_linear_routers(config)
    transform(model, config, bench.example, activations=bench.activations(model, config))
    return model


def start_with_experts(bench: Workbench, config: TransformConfig) -> nn.Module:
    """The same of the start, to be trained."""
    return bench.transformed(with_linear_routers(config))


def with_linear_routers(config: TransformConfig) -> TransformConfig:
    """Whatever LTE's are like, these are linear, and keep a share."""
    return replace(config, selection=RULE, router=RouterKind.LINEAR, router_rank=None)


@contextmanager
def at_share(model: nn.Module, density: float) -> Iterator[nn.Module]:
    """The model in the hard stage, with this share of experts for every token."""
    set_share(model, density)
    set_stage(model, Stage.HARD)
    yield model


def set_share(model: nn.Module, density: float) -> None:
    """What the rule `top_share` reads as tau."""
    for router in require_routers(model):
        router.threshold = density


def learn_from_traces(
    bench: Workbench, model: nn.Module, loss: PredictionLoss[R], routers: tuple[R, ...], rate: float, tokens: int
) -> None:
    """Train each router by Adam on what the dense model's FFNs read and compute, `tokens` a step, storing nothing."""
    device = next(model.parameters()).device.type
    with in_stage(model, Stage.DENSE), torch.autocast(device, torch.bfloat16, enabled=bench.config.autocast):
        watch_ffns(model, bench.traces(), {r.site: _learner(r, loss, rate, tokens) for r in routers})


def _learner(router: R, loss: PredictionLoss[R], rate: float, tokens: int) -> SeeFfn:
    optimizer = Adam(router.parameters(), lr=rate, fused=True)  # thousands of small steps: one kernel each

    def step(x_TD: Tensor, hidden_TF: Tensor) -> None:
        with torch.enable_grad(), torch.autocast(x_TD.device.type, enabled=False):
            value = loss(router, x_TD.float(), hidden_TF.float())
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def learn(x_TD: Tensor, hidden_TF: Tensor) -> None:
        """The model runs on large batches, to be fast; routers learn in many small steps."""
        for x_SD, hidden_SF in zip(torch.split(x_TD, tokens), torch.split(hidden_TF, tokens), strict=True):
            step(x_SD, hidden_SF)

    return learn
