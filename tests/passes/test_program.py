"""Element-wise regions as programs: whatever a model writes, and whichever tracer recorded it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_compile
from lte_compile.capture.capture import capture, capture_all
from lte_compile.config import TransformConfig
from lte_compile.kernels.program import is_program, parse_program, run_program
from lte_compile.passes.anchors import arguments, lte_nodes
from lte_compile.passes.dataflow import GraphView
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.match import find_ffns
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.passes.program import ProgramError, RegionProgram, region_program

WIDTH, HIDDEN = 8, 24


class Ffn(nn.Module):
    """An FFN with the region `act(self, up)`, `act(self, gate, up)` or `act(self, both)`, and parameters for it."""

    def __init__(self, act: Callable[..., Tensor], *, form: str) -> None:
        super().__init__()
        self.form, self.act = form, act
        self.up = nn.Linear(WIDTH, 2 * HIDDEN if form == "fused" else HIDDEN)
        self.gate = nn.Linear(WIDTH, HIDDEN) if form == "gated" else None
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.scale, self.shift = nn.Parameter(torch.rand(HIDDEN) + 0.5), nn.Parameter(torch.rand(1, 1, HIDDEN))
        self.alpha, self.beta = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.act(self, up) if self.gate is None else self.act(self, self.gate(x), up)
        result: Tensor = self.down(hidden)
        return x + result


def xielu(m: Any, h: Tensor) -> Tensor:
    positive, negative = F.softplus(m.alpha), 0.5 + F.softplus(m.beta)
    return torch.where(h > 0, positive * h * h + 0.5 * h, (torch.expm1(h.clamp(max=-1e-6)) - h) * negative + 0.5 * h)


def gpt_oss(m: Any, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


PLAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda m, h: 0.5 * F.relu(h),
    "cubed": lambda m, h: F.relu(h) ** 3,
    "reciprocal power": lambda m, h: h * (h.abs() + 1) ** -2,
    "softcap": lambda m, h: 30 * torch.tanh(h / 30),
    "written-out gelu with a scale": lambda m, h: (
        m.scale * 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3))))
    ),
    "written-out mish, doubled": lambda m, h: 2 * h * torch.tanh(F.softplus(h)),
    "snake": lambda m, h: h + torch.sin(m.scale * h) ** 2 / m.scale,
    "scale and shift": lambda m, h: F.silu(h * m.scale + m.shift),
    "exponential scale": lambda m, h: torch.relu(h) * torch.exp(m.scale),
    "bounds of each neuron": lambda m, h: torch.clamp(h, -m.scale, m.scale),
    "learnable swish": lambda m, h: h * torch.sigmoid(m.alpha * h),  # alpha is 1 now, and will not stay so
    "xielu": xielu,
    "prelu": lambda m, h: F.prelu(h, m.beta),
    "hardswish": lambda m, h: F.hardswish(h),
    "selu": lambda m, h: F.selu(h),
    "celu": lambda m, h: F.celu(h, 0.5),
    "softsign": lambda m, h: F.softsign(h),
    "leaky": lambda m, h: F.leaky_relu(h, 0.2),
    "hardtanh": lambda m, h: F.hardtanh(h, -2, 3),
    "logsigmoid": lambda m, h: F.logsigmoid(h),
    "hardshrink": lambda m, h: F.hardshrink(h, 0.2),
    "softshrink": lambda m, h: F.softshrink(h, 0.2),
    "threshold": lambda m, h: F.threshold(h, 0.1, -2.0),
    "masked": lambda m, h: 2 * h.masked_fill(h < 0.2, 0.0),
    "times a mask": lambda m, h: h * (h > 0.1),
    "times a cast mask": lambda m, h: h * (h.abs() > 0.1).to(h.dtype),
    "activation in place": lambda m, h: F.leaky_relu_(h + 0.0, 0.2).mul_(2),
    "hardswish in place": lambda m, h: F.hardswish(h + 0.0, inplace=True),
    "in place": lambda m, h: F.relu(h + 0.0, inplace=True).mul_(3).add_(1),
    "power of a number": lambda m, h: torch.pow(2.0, h.clamp(max=2)),
    "addcmul": lambda m, h: torch.addcmul(h, h, h, value=0.5).relu(),
    "lerp": lambda m, h: torch.lerp(h, h.relu(), 0.3),
    "dropout": lambda m, h: F.dropout(F.relu(h) * m.scale, 0.3, m.training),
}
GATED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "gpt-oss": gpt_oss,
    "larger of both": lambda m, g, u: torch.maximum(g, u) ** 2,
    "sum": lambda m, g, u: torch.tanh(g + u * m.scale),
    "scaled gate": lambda m, g, u: F.silu(g * m.alpha) * u * m.shift,
}
FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "interleaved": lambda m, v: gpt_oss(m, v[..., ::2], v[..., 1::2]),
    "chunks": lambda m, v: F.silu(v.chunk(2, -1)[0] * m.scale) * v.chunk(2, -1)[1],
    "bent before the split": lambda m, v: 2 * F.gelu(v.clamp(-3, 3).chunk(2, -1)[1]) * v.clamp(-3, 3).chunk(2, -1)[0],
    "viewed": lambda m, v: (
        torch.tanh(v).view(*v.shape[:-1], 2, HIDDEN)[..., 0, :] * F.silu(v.view(*v.shape[:-1], 2, HIDDEN).unbind(-2)[1])
    ),
    "pairs": lambda m, v: (
        F.silu((v * 2).view(*v.shape[:-1], HIDDEN, 2)[..., 0]) * v.view(*v.shape[:-1], HIDDEN, 2)[..., 1]
    ),
}
CASES = [(form, name) for form, table in (("plain", PLAIN), ("gated", GATED), ("fused", FUSED)) for name in table]


def make(form: str, name: str) -> tuple[Ffn, Tensor]:
    torch.manual_seed(0)
    act = {"plain": PLAIN, "gated": GATED, "fused": FUSED}[form][name]  # type: ignore[index]
    return Ffn(act, form=form).double().eval(), torch.randn(2, 3, WIDTH, dtype=torch.float64)


def program_in(graph: CapturedGraph) -> RegionProgram:
    (match,) = find_ffns(graph).matches
    assert match.site.activation == "unknown"
    return region_program(GraphView.of(graph), match)


def captured(model: nn.Module, x: Tensor, route: str) -> CapturedGraph:
    if route == "export":
        return capture(model, (x,))
    if route == "fx":
        return capture(torch.fx.symbolic_trace(model), (x,))
    recorded: list[CapturedGraph] = []
    names = {id(tensor): name for name, tensor in model.named_parameters()}

    def record(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        placeholders = zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
        held = {node.name: names[id(value)] for node, value in placeholders if id(value) in names}
        recorded.append(CapturedGraph(module=module, parameters=held, route="dynamo"))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=record)(x)
    return recorded[0]


@pytest.mark.parametrize("form, name", CASES)
def test_transformed_models_compute_the_same_with_programs(form: str, name: str) -> None:
    model, x = make(form, name)
    dense = model(x).detach()
    routed = lte_compile.transform(model, TransformConfig(expert_size=5), (x,))
    torch.testing.assert_close(routed(x), dense, rtol=1e-12, atol=1e-12)
    lte_compile.set_stage(routed, "hard")
    with torch.no_grad():
        expected = routed(x)
    (graph,) = capture_all(routed, (x,))
    fuse, lower = run_pipeline(graph, (FuseExperts(), LowerSparse()))
    assert not (*fuse.refusals, *lower.refusals)
    assert "kernel generated" in lower.changes[0]
    (node,) = lte_nodes(graph, "sparse_ffn")
    assert is_program(arguments(node)["activation"])
    tensors = {**dict(routed.named_parameters()), **dict(routed.named_buffers())}
    held = [tensors[graph.parameters[p.name]] for p in graph.module.graph.find_nodes(op="placeholder")[:-1]]
    with torch.no_grad():
        (actual,) = graph.module(*held, x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["export", "dynamo", "fx"])
@pytest.mark.parametrize("form, name", [("plain", "xielu"), ("plain", "scale and shift"), ("fused", "interleaved")])
def test_every_tracer_gives_the_same_program(form: str, name: str, route: str) -> None:
    model, x = make(form, name)
    found = program_in(captured(model, x, route))
    constants = len(found.program.constant_names)
    assert constants == {"xielu": 2, "scale and shift": 2, "interleaved": 0}[name] == len(found.constants)
    up, gate = torch.randn(4, HIDDEN, dtype=torch.float64), torch.randn(4, HIDDEN, dtype=torch.float64)
    given = {"xielu": (model.alpha, model.beta), "scale and shift": (model.scale, model.shift.flatten())}.get(name, ())
    both = torch.stack([gate, up], -1).flatten(-2)
    expected = model.act(model, both if form == "fused" else up[None])
    actual = run_program(found.program, up, gate if form == "fused" else None, given)
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "act, reason",
    [
        (lambda m, h: torch.erfinv(torch.tanh(h)), "op erf_inv is not in the table"),
        (lambda m, h: torch.atan(h) * h, "op atan is not in the table"),
        (lambda m, h: h.abs() ** 2.5, "op pow with exponent 2.5 is not in the table"),
        (lambda m, h: torch.div(h, 0.3, rounding_mode="floor") * h, "op floor_divide|div with rounding_mode"),
        (lambda m, h: h * (3 * h).long(), "it casts values to torch.int64"),
    ],
)
def test_regions_without_a_program_say_why(act: Callable[..., Tensor], reason: str) -> None:
    model = Ffn(act, form="plain").double().eval()
    graph = capture(model, (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    with pytest.raises(ProgramError, match=reason):
        program_in(graph)


def test_a_learnable_slope_is_no_silu() -> None:
    """x * sigmoid(beta * x) is a SiLU as long as beta is 1: a parameter's value names nothing."""
    model, x = make("plain", "learnable swish")
    for route in ("export", "dynamo", "fx"):
        found = program_in(captured(model, x, route))
        assert str(found.program) == "v0 = mul(s0, up); v1 = sigmoid(v0); v2 = mul(up, v1)"


@pytest.mark.parametrize("form, name", [("plain", "xielu"), ("plain", "scale and shift"), ("gated", "gpt-oss")])
def test_compiled_training_reaches_the_constants(form: str, name: str) -> None:
    model, x = make(form, name)
    lte_compile.set_stage(lte_compile.transform(model, TransformConfig(expert_size=5), (x,)), "soft")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(run(x).square().sum(), parameters, allow_unused=True))

    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lte", options={"compiler": "aot_eager"}, fullgraph=True)
    for actual, wanted in zip(gradients(compiled), expected, strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None and wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


class Slope(nn.Module):
    """Its slope and limit are attributes, which torch.compile(dynamic=True) makes symbolic."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.slope, self.limit = nn.Linear(8, 24), nn.Linear(24, 8), 1.702, 0.7

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).clamp(max=self.limit)
        result: Tensor = self.down(h * torch.sigmoid(self.slope * h))
        return result


def test_an_attribute_that_changes_is_read_anew() -> None:
    torch.manual_seed(0)
    model, x = Slope().double().eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    lte_compile.set_stage(lte_compile.transform(model, TransformConfig(expert_size=5), (x,)), "hard")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lte", options={"compiler": "aot_eager"}, dynamic=True)
    with torch.no_grad():
        for model.slope, model.limit in ((1.702, 0.7), (1.0, 0.5), (0.3, 2.0)):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_dropout_in_training_keeps_the_anchor() -> None:
    model, x = make("plain", "dropout")
    lte_compile.set_stage(lte_compile.transform(model, TransformConfig(expert_size=5), (x,)), "soft")
    model.train()
    graph = captured(model, x, "dynamo")
    (report,) = run_pipeline(graph, (FuseExperts(),))
    assert not report.changes
    assert "dropout" in report.refusals[0].reason


def test_programs_of_equal_layers_are_equal_texts() -> None:
    texts = {str(program_in(captured(*make("plain", "xielu"), "export")).program) for _ in range(2)}
    assert len(texts) == 1
    assert parse_program(texts.pop()).scalar_constants == 2


class MaskedTokens(nn.Module):
    """Hidden values of some tokens are zeroed, by a mask computed from the FFN's own input."""

    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.fill(F.silu(self.up(x)), x.sum(-1, keepdim=True) > 0))
        return result


@pytest.mark.parametrize(
    "fill",
    [lambda h, keep: torch.where(keep, h, 0.0), lambda h, keep: h.masked_fill(~keep, 0.0)],
    ids=["where", "masked_fill"],
)
def test_a_mask_of_tokens_is_no_part_of_an_activation(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Named for its values alone the region would be silu, and fusing it would lose the mask."""
    torch.manual_seed(0)
    model, x = MaskedTokens(fill).double().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    lte_compile.set_stage(lte_compile.transform(model, TransformConfig(expert_size=5), (x,)), "hard")
    (graph,) = capture_all(model, (x,))
    (fused,) = run_pipeline(graph, (FuseExperts(),))
    assert not fused.changes
    assert fused.refusals
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="lte")(x), model(x), rtol=1e-12, atol=1e-12)
