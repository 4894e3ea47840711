"""The stacks that benchmarks.training trains, and one step of training them.

Shape suffixes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.config import Grouping, TransformConfig
from lte_compile.kernels.ffn_products import ONE_BELOW, TWO_BELOW, TWO_GRADIENTS_BELOW
from lte_compile.routing.router import require_routers
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform

WIDTH, NEURONS, EXPERT_SIZE = 4096, 11008, 32  # LLaMA-2-7B
DTYPE = torch.bfloat16
# Any values take the same time.
EFFICIENCY, SEPARABILITY = 0.3, 0.5
STEPS = 2  # of a turn
Call = Callable[[Tensor], Tensor]


class Ffn(nn.Module):
    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


class Block(nn.Module):
    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = Ffn(width, neurons)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = x_TD + self.mlp(self.norm(x_TD))
        return y_TD


@dataclass(frozen=True)
class Runner:
    """One way to train a stack: forward and backward on inputs of its own."""

    model: nn.Module
    call: Call
    x_TD: Tensor
    grad_TD: Tensor
    losses: bool = False

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        if not self.losses:
            self.call(self.x_TD).backward(self.grad_TD)  # type: ignore[no-untyped-call]
            return
        with trace_routers(self.model) as trace:
            y_TD = self.call(self.x_TD)
        auxiliary = EFFICIENCY * trace.efficiency_loss() + SEPARABILITY * trace.separability_loss()
        gradients = [self.grad_TD, torch.ones_like(auxiliary)]
        torch.autograd.backward([y_TD, auxiliary], gradients)

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()

    def memory(self) -> tuple[float, float]:
        """MB kept from forward to backward, and the most that a step allocates; weights and result left out."""
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with trace_routers(self.model) if self.losses else nullcontext():
            y_TD = self.call(self.x_TD)
        saved = torch.cuda.memory_allocated() - before - y_TD.nbytes
        del y_TD
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        self.model.zero_grad(set_to_none=True)
        return saved / 2**20, peak / 2**20


def make_stack(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return nn.Sequential(*(Block(WIDTH, NEURONS) for _ in range(layers))).to(DTYPE)


def make_routed(layers: int) -> nn.Sequential:
    model = make_stack(layers)
    example_TD = torch.randn(2, 64, WIDTH, device="cuda", dtype=DTYPE)
    transform(model, TransformConfig(expert_size=EXPERT_SIZE, grouping=Grouping.CONTIGUOUS), example_TD)
    return model


def hint_for(density: float, densities: Sequence[float]) -> float:
    """The largest density that leads to the same kernels: its graph, compiled once, serves all of them."""
    limits = (ONE_BELOW, TWO_GRADIENTS_BELOW, TWO_BELOW)
    return max(d for d in densities if bisect_right(limits, d) == bisect_right(limits, density))


@torch.no_grad()
def set_density(model: nn.Sequential, x_TD: Tensor, density: float, hint: float) -> None:
    """Routers that select this share of experts for inputs like x, and whose calibrated scores tell of `hint`."""
    for block, router in zip(model, require_routers(model), strict=True):
        assert isinstance(block, Block)
        assert router.bias is not None
        router.weight.normal_(std=router.weight.shape[1] ** -0.5)
        logits_TE = block.norm(x_TD[:256]).float() @ router.weight.float().t()
        router.bias.fill_(-float(torch.quantile(logits_TE.flatten(), 1 - density)))
        active = round(100 * hint)
        router.score_quantiles = (0.0,) * (100 - active) + (1.0,) * active
        x_TD = block(x_TD)
