"""Models whose FFNs are written in ways that no hook on two linear layers would reach: `MODELS[name]()`, in float64.

Each has D = 16 and F = 40, maps [..., tokens, D] to the same shape, and is in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, RANK = 16, 40, 3


class Raw(nn.Module):
    """x + W2 gelu(W1 x + b1) + b2 over parameters of its own, multiplied as `how` says."""

    def __init__(self, how: str = "linear") -> None:
        super().__init__()
        self.how = how
        self.w_up, self.b_up = nn.Parameter(torch.randn(HIDDEN, WIDTH)), nn.Parameter(torch.randn(HIDDEN))
        self.w_down, self.b_down = nn.Parameter(torch.randn(WIDTH, HIDDEN)), nn.Parameter(torch.randn(WIDTH))
        if how in ("matmul", "addmm", "einsum"):
            self.w_up.data, self.w_down.data = self.w_up.data.T.contiguous(), self.w_down.data.T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "linear":
                return x + F.linear(F.gelu(F.linear(x, self.w_up, self.b_up)), self.w_down, self.b_down)
            case "transposed":
                return x + (F.gelu(x @ self.w_up.T + self.b_up) @ self.w_down.T + self.b_down)
            case "matmul":
                return x + torch.matmul(F.gelu(x @ self.w_up + self.b_up), self.w_down) + self.b_down
            case "addmm":
                hidden = F.gelu(torch.addmm(self.b_up, x.flatten(0, -2), self.w_up))
                return x + torch.addmm(self.b_down, hidden, self.w_down).view_as(x)
            case "einsum":
                hidden = F.gelu(torch.einsum("...d,df->...f", x, self.w_up) + self.b_up)
                return x + torch.einsum("fd,...f->...d", self.w_down, hidden) + self.b_down
            case _:  # weights on the left
                return x + (self.w_down @ F.gelu(self.w_up @ x.mT + self.b_up[:, None])).mT + self.b_down


class Lists(nn.Module):
    """Parameters in lists that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ParameterList(torch.randn(HIDDEN, WIDTH) for _ in range(2))
        self.downs = nn.ParameterList(torch.randn(WIDTH, HIDDEN) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + F.linear(F.gelu(F.linear(x, up)), down)
        return x


class Branching(nn.Module):
    """Control flow, keyword arguments and dropout; one weight of its own, one of a child that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = nn.Linear(WIDTH, HIDDEN)
        self.w_down = nn.Parameter(torch.randn(WIDTH, HIDDEN))

    def forward(self, x: Tensor, *, scale: float | None = None) -> Tensor:
        hidden = F.dropout(F.silu(F.linear(x, self.holder.weight, self.holder.bias)), 0.5, self.training)
        y = hidden @ self.w_down.t()
        return x + (y if scale is None else scale * y)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head."""
    query, key, value = (tensor.unsqueeze(-3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).squeeze(-3)


class SingleStream(nn.Module):
    """One projection into query, key, value and neurons, one back from cat[attention, neurons] (ViT-22B, FLUX)."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.linear1 = nn.Linear(WIDTH, 3 * WIDTH + (1 + gated) * HIDDEN)
        self.linear2 = nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv, neurons = torch.split(self.linear1(x), [3 * WIDTH, (1 + self.gated) * HIDDEN], dim=-1)
        query, key, value = qkv.chunk(3, dim=-1)
        attended = attention(query, key, value)
        if self.gated:
            gate, up = neurons.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(neurons, approximate="tanh")
        result: Tensor = x + self.linear2(torch.cat([attended, hidden], dim=-1))
        return result


class Apart(nn.Module):
    """Gate and up are two windows of one projection that do not touch; neurons come first in the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * HIDDEN + 3 * WIDTH, bias=False)
        self.outer = nn.Linear(HIDDEN + WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        gate, qkv, up = y[..., :HIDDEN], y[..., HIDDEN : HIDDEN + 3 * WIDTH], y[..., HIDDEN + 3 * WIDTH :]
        attended = attention(*qkv.chunk(3, dim=-1))
        result: Tensor = x + self.outer(torch.cat((F.silu(gate) * up, attended), dim=-1))
        return result


class Palm(nn.Module):
    """One projection for attention and FFN, two back."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(WIDTH, 3 * WIDTH + 2 * HIDDEN, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_out = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, both = self.fused(x).split([WIDTH, WIDTH, WIDTH, 2 * HIDDEN], dim=-1)
        up, gate = both.chunk(2, dim=-1)
        attended = self.attention_out(attention(query, key, value))
        result: Tensor = x + attended + self.ffn_out(F.silu(gate) * up)
        return result


class Updated(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.A, self.B = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + 0.5 * self.B(self.A(x))
        return result


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = Updated(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), Updated(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class RawLowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_up, self.w_down = nn.Parameter(torch.randn(HIDDEN, WIDTH)), nn.Parameter(torch.randn(WIDTH, HIDDEN))
        self.a_up, self.b_up = nn.Parameter(torch.randn(RANK, WIDTH)), nn.Parameter(torch.randn(HIDDEN, RANK))
        self.a_down, self.b_down = nn.Parameter(torch.randn(RANK, HIDDEN)), nn.Parameter(torch.randn(WIDTH, RANK))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.w_up) + 2.0 * F.linear(F.linear(x, self.a_up), self.b_up))
        return x + F.linear(hidden, self.w_down) + 2.0 * F.linear(F.linear(hidden, self.a_down), self.b_down)


class TiedModules(nn.Module):
    """Two FFNs of different modules that share their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)}) for _ in range(2)
        )
        for name, module in self.two.items():
            other: Any = self.one[name]
            module.weight, module.bias = other.weight, other.bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return x


class TiedRaw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Raw(), Raw("transposed")
        for name, parameter in self.one.named_parameters():
            setattr(self.two, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(x))
        return result


class Repeated(nn.Module):
    """One FFN that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Raw("matmul")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(0.1 * self.layer(x))
        return result


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{f"raw {how}": partial(Raw, how) for how in ("linear", "transposed", "matmul", "addmm", "einsum", "left")},
    "raw in a stack": lambda: nn.Sequential(Raw(), Raw("transposed")),
    "raw lists": Lists,
    "raw with branches": Branching,
    "single stream": SingleStream,
    "single stream gated": lambda: SingleStream(gated=True),
    "windows apart": Apart,
    "palm": Palm,
    "low rank": LowRank,
    "low rank raw": RawLowRank,
    "tied modules": TiedModules,
    "tied raw": TiedRaw,
    "repeated": Repeated,
}


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().double().eval()

    return make


MODELS = {name: _seeded(build) for name, build in _BUILDERS.items()}
