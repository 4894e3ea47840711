"""FuseExperts: which graphs become lte.expert_ffn, that they compute what they did, and which must stay and why."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor

from lte_compile.passes.anchors import arguments, lte_nodes
from lte_compile.passes.copying import copy_captured
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.ir import CapturedGraph, PassReport
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.passes.rendering import render
from tests.passes.parsing import parse

# Two float64 evaluations of one sum in different order; about 1e-16 per term.
assert_same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

HEAD = """
x = input(2, 3, 4)
w_router = parameter(3, 4)
w_up = parameter(8, 4)
w_gate = parameter(8, 4)
w_both = parameter(16, 4)
b_both = parameter(16)
w_down = parameter(4, 8)
b_up = parameter(8)
b_down = parameter(4)
w_in_out = parameter(4, 8)
w_out_in = parameter(8, 4)
gates = lte.select(lte.route(x, w_router, None), 'soft', 0.5)
"""
PLAIN = (
    HEAD
    + """
h = aten.relu(aten.linear(x, w_up, b_up))
return aten.linear(lte.gate_hidden(h, gates, 3), w_down, b_down)
"""
)
GATED = (
    HEAD
    + """
h = aten.mul(aten.linear(x, w_up, b_up), aten.silu(aten.linear(x, w_gate)))
return aten.linear(lte.gate_hidden(h, gates, 3), w_down)
"""
)
GATE_THEN_UP = (
    HEAD
    + """
both = aten.linear(x, w_both, b_both)
h = aten.mul(aten.silu(aten.slice(both, -1, 0, 8)), aten.slice(both, -1, 8, 16))
return aten.linear(lte.gate_hidden(h, gates, 3), w_down)
"""
)
UP_THEN_GATE = (
    HEAD
    + """
both = aten.linear(x, w_both, b_both)
h = aten.mul(aten.slice(both, -1, 0, 8), aten.silu(aten.slice(both, -1, 8, 16)))
return aten.linear(lte.gate_hidden(h, gates, 3), w_down)
"""
)
INTERLEAVED = (
    HEAD
    + """
both = aten.linear(x, w_both, b_both)
h = aten.mul(aten.slice(both, -1, 0, 16, 2), aten.gelu(aten.slice(both, -1, 1, 16, 2)))
return aten.linear(lte.gate_hidden(h, gates, 3), w_down)
"""
)
# GPT-2: weights [in, out], tokens flattened around each projection but not around the router
CONV1D = (
    HEAD
    + """
h = aten.relu(aten.view(aten.addmm(b_up, aten.view(x, [6, 4]), w_in_out), [2, 3, 8]))
gated = aten.view(lte.gate_hidden(h, gates, 3), [6, 8])
return aten.view(aten.addmm(b_down, gated, w_out_in), [2, 3, 4])
"""
)
# the parent flattens tokens between the router and the anchor
FLAT_GATES = (
    HEAD
    + """
h = aten.relu(aten.linear(aten.view(x, [6, 4]), w_up, b_up))
return aten.linear(lte.gate_hidden(h, aten.reshape(gates, [6, 3]), 3), w_down)
"""
)
SEPARATE_BIAS = (
    HEAD
    + """
h = aten.relu(aten.add(aten.matmul(x, w_in_out), b_up))
return aten.add(aten.matmul(lte.gate_hidden(h, gates, 3), w_out_in), b_down)
"""
)
NARROW_LAST = (
    HEAD
    + """
h = aten.relu(aten.linear(x, w_up))
return aten.linear(lte.gate_hidden(aten.dropout(h, 0.5, False), gates, 3), w_down)
"""
)
REGION_HEAD = (
    HEAD
    + """
scale = parameter(8)
shift = parameter(1, 1, 8)
alpha = parameter()
beta = parameter(1)
u = aten.linear(x, w_up, b_up)
g = aten.linear(x, w_gate)
both = aten.linear(x, w_both, b_both)
"""
)
# Regions that no named activation is, and the programs they become.
REGIONS = {
    "relu6": ("h = aten.hardtanh(u, 0.0, 6.0)", "v0 = clamp_min(up, 0.0); v1 = clamp_max(v0, 6.0)"),
    "scaled": ("h = aten.mul(aten.relu(u), 0.5)", "v0 = relu(up); v1 = mul(v0, 0.5)"),
    "scale and shift of each neuron": (
        "h = aten.silu(aten.add(aten.mul(u, scale), shift))",
        "v0 = mul(up, n0); v1 = add(v0, n1); v2 = sigmoid(v1); v3 = mul(v1, v2)",
    ),
    "softcap": (
        "h = aten.mul(aten.tanh(aten.div(u, 5.0)), 5.0)",
        "v0 = div(up, 5.0); v1 = tanh(v0); v2 = mul(v1, 5.0)",
    ),
    "learnable slope": (
        "h = aten.mul(u, aten.sigmoid(aten.mul(u, alpha)))",
        "v0 = mul(up, s0); v1 = sigmoid(v0); v2 = mul(up, v1)",
    ),
    "numbers computed from parameters": (  # they move into the program: no launch for a single number
        "h = aten.mul(aten.relu(u), aten.exp(aten.neg(beta)))",
        "v0 = relu(up); v1 = neg(s0); v2 = exp(v1); v3 = mul(v0, v2)",
    ),
    "clamped gate of interleaved halves (gpt-oss)": (
        "a = aten.clamp.default(aten.slice(both, -1, 0, 16, 2), None, 0.7)\n"
        "b = aten.clamp.default(aten.slice(both, -1, 1, 16, 2), -0.7, 0.7)\n"
        "h = aten.mul(aten.add(b, 1.0), aten.mul(a, aten.sigmoid(aten.mul(a, 1.702))))",
        "v0 = clamp_max(gate, 0.7); v1 = clamp_min(up, -0.7); v2 = clamp_max(v1, 0.7); v3 = add(v2, 1.0); "
        "v4 = mul(v0, 1.702); v5 = sigmoid(v4); v6 = mul(v0, v5); v7 = mul(v3, v6)",
    ),
    "clamped before it is split": (
        "c = aten.clamp.default(both, -1.0, 1.0)\n"
        "h = aten.mul(aten.slice(c, -1, 0, 8), aten.relu(aten.slice(c, -1, 8, 16)))",
        "v0 = clamp_min(up, -1.0); v1 = clamp_max(v0, 1.0); v2 = clamp_min(gate, -1.0); v3 = clamp_max(v2, 1.0); "
        "v4 = relu(v3); v5 = mul(v1, v4)",
    ),
    "two operands in a form of its own": (
        "h = aten.maximum(g, aten.tanh(aten.add(g, u)))",
        "v0 = add(up, gate); v1 = tanh(v0); v2 = maximum(up, v1)",
    ),
}


def region_graph(name: str) -> str:
    return f"{REGION_HEAD}{REGIONS[name][0]}\nreturn aten.linear(lte.gate_hidden(h, gates, 3), w_down)\n"


FUSABLE = {
    "plain": PLAIN,
    "gated": GATED,
    "gate_then_up": GATE_THEN_UP,
    "up_then_gate": UP_THEN_GATE,
    "interleaved": INTERLEAVED,
    "conv1d": CONV1D,
    "flat_gates": FLAT_GATES,
    "separate_bias": SEPARATE_BIAS,
    "dropout_switched_off": NARROW_LAST,
    **{name: region_graph(name) for name in REGIONS},
}


def fused(text: str) -> tuple[CapturedGraph, CapturedGraph, PassReport]:
    """The parsed graph, its fused copy and the report."""
    graph = parse(text)
    copied = copy_captured(graph)
    (report,) = run_pipeline(copied, (FuseExperts(),))
    return graph, copied, report


def lines(graph: CapturedGraph) -> str:
    """The graph without the type comments."""
    return "\n".join(line.partition("  #")[0] for line in render(graph).splitlines())


def expect(text: str) -> str:
    return text.strip()


def test_plain_ffn() -> None:
    before, after, report = fused(PLAIN)
    assert lines(before) == expect("""
x = input()
route = lte.route(x, weight=w_router)
gates = lte.select(route, rule='soft', tau=0.5)
linear = aten.linear(x, w_up, b_up)
h = aten.relu(linear)
gate_hidden = lte.gate_hidden(h, gates=gates, expert_size=3)
linear_1 = aten.linear(gate_hidden, w_down, b_down)
return linear_1
""")
    assert lines(after) == expect("""
x = input()
route = lte.route(x, weight=w_router)
gates = lte.select(route, rule='soft', tau=0.5)
expert_ffn = lte.expert_ffn(x, gates=gates, w_up=w_up, w_down=w_down, b_up=b_up, b_down=b_down, activation='relu', \
expert_size=3)
return expert_ffn
""")
    assert report.changes == ("w_down: 4 nodes became expert_ffn",)
    assert not report.refusals


def test_the_density_to_expect_comes_from_the_selection() -> None:
    _, after, _ = fused(PLAIN.replace("'soft', 0.5)", "'threshold', 0.5, 0.2)"))
    (node,) = lte_nodes(after, "expert_ffn")
    assert arguments(node)["density"] == 0.2


def test_weights_stored_in_out_are_transposed_and_a_flat_result_keeps_its_shape() -> None:
    _, after, _ = fused(CONV1D)
    assert lines(after) == expect("""
x = input()
route = lte.route(x, weight=w_router)
gates = lte.select(route, rule='soft', tau=0.5)
t = aten.t(w_in_out)
t_1 = aten.t(w_out_in)
expert_ffn = lte.expert_ffn(x, gates=gates, w_up=t, w_down=t_1, b_up=b_up, b_down=b_down, activation='relu', \
expert_size=3)
reshape = aten.reshape(expert_ffn, [-1, 4])
view = aten.view(reshape, [2, 3, 4])
return view
""").replace("view = ", f"{_last_view(after)} = ").replace("return view", f"return {_last_view(after)}")


def _last_view(graph: CapturedGraph) -> str:
    return str(graph.module.graph.output_node().args[0])


def test_halves_of_one_projection_are_sliced() -> None:
    _, after, _ = fused(INTERLEAVED)
    sliced = [line.partition(" = ")[2] for line in lines(after).splitlines() if "aten.slice" in line]
    assert sliced == [
        "aten.slice(w_both, 0, 0, 16, 2)",
        "aten.slice(b_both, 0, 0, 16, 2)",
        "aten.slice(w_both, 0, 1, 16, 2)",
        "aten.slice(b_both, 0, 1, 16, 2)",
    ]


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_graph_computes_what_it_did_forward_and_backward(name: str) -> None:
    before, after, report = fused(FUSABLE[name])
    assert [len(report.changes), len(report.refusals)] == [1, 0]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, actual = values_and_gradients(before, x), values_and_gradients(after, x)
    assert expected.keys() == actual.keys()
    for key in expected:
        assert_same(actual[key], expected[key])


def values_and_gradients(graph: CapturedGraph, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its squared sum towards x and every parameter in use."""
    x = x.clone().requires_grad_()
    tensors = {"x": x, **dict(graph.module.named_parameters())}
    result = graph.module(x)
    gradients = torch.autograd.grad(result.square().sum(), list(tensors.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
    return {"output": result.detach(), **found}


@pytest.mark.parametrize("name", REGIONS)
def test_other_regions_become_programs(name: str) -> None:
    _, after, report = fused(region_graph(name))
    (node,) = lte_nodes(after, "expert_ffn")
    program = arguments(node)["activation"]
    assert program == REGIONS[name][1]
    assert f"its hidden region a program of {program.count(';') + 1} operations" in report.changes[0]


@pytest.mark.parametrize("name", FUSABLE)
def test_a_second_run_changes_nothing(name: str) -> None:
    _, after, _ = fused(FUSABLE[name])
    once = render(after)
    (report,) = run_pipeline(after, (FuseExperts(),))
    assert render(after) == once
    assert not report.changes


def test_fake_values_and_provenance_come_along() -> None:
    graph = parse(CONV1D)
    down = graph.module.graph.output_node().args[0].args[0]  # type: ignore[union-attr]
    down.meta["nn_module_stack"] = {"owner": ("mlp.c_proj", torch.nn.Linear)}  # type: ignore[union-attr]
    run_pipeline(graph, (FuseExperts(),))
    (node,) = lte_nodes(graph, "expert_ffn")
    assert node.meta["val"].shape == (2, 3, 4)
    assert node.meta["val"].dtype == torch.float64
    assert node.meta["nn_module_stack"] == {"owner": ("mlp.c_proj", torch.nn.Linear)}


MUST_STAY = {
    # no row of kernels/pointwise.py, and torch has nothing simpler for it
    "an operation without a kernel": (
        "h = aten.erfinv(aten.tanh(aten.linear(x, w_up)))\ny = lte.gate_hidden(h, gates, 3)\n"
        "return aten.linear(y, w_down)",
        "no kernel can be generated for its hidden region: op erf_inv is not in the table",
    ),
    "a power that is no product": (
        "h = aten.pow(aten.relu(aten.linear(x, w_up)), 2.5)\ny = lte.gate_hidden(h, gates, 3)\n"
        "return aten.linear(y, w_down)",
        "op pow with exponent 2.5 is not in the table",
    ),
    # a mask drawn per call cannot move into the op
    "dropout": (
        "h = aten.dropout(aten.relu(aten.linear(x, w_up)), 0.1, True)\ny = lte.gate_hidden(h, gates, 3)\n"
        "return aten.linear(y, w_down)",
        "dropout .* is active on the hidden value",
    ),
    # fusing would take the hidden value away from its other reader
    "hidden value used elsewhere": (
        "h = aten.relu(aten.linear(x, w_up))\ny = lte.gate_hidden(h, gates, 3)\n"
        "return aten.linear(y, w_down), aten.neg(h)",
        "its hidden value `h` has another user",
    ),
    # the op gates last
    "activation behind the anchor": (
        "h = aten.linear(x, w_up)\ny = aten.relu(lte.gate_hidden(h, gates, 3))\nreturn aten.linear(y, w_down)",
        "the gated hidden value is changed before the down-projection reads it",
    ),
    "two inputs": (
        "z = aten.neg(x)\nh = aten.mul(aten.silu(aten.linear(x, w_gate)), aten.linear(z, w_up))\n"
        "y = lte.gate_hidden(h, gates, 3)\nreturn aten.linear(y, w_down)",
        "read different tensors",
    ),
    # the op's result has its input's leading sizes
    "tokens regrouped inside": (
        "h = aten.relu(aten.linear(aten.view(x, [6, 4]), w_up))\n"
        "y = lte.gate_hidden(aten.view(h, [3, 2, 8]), aten.view(gates, [3, 2, 3]), 3)\n"
        "return aten.linear(y, w_down)",
        "its input, gates and result group tokens differently",
    ),
    "no down-projection": (
        "return lte.gate_hidden(aten.relu(aten.linear(x, w_up)), gates, 3)",
        "no FFN was recognised",
    ),
}


@pytest.mark.parametrize("case", MUST_STAY)
def test_what_the_op_cannot_express_keeps_its_anchor(case: str) -> None:
    body, reason = MUST_STAY[case]
    before, after, report = fused(HEAD + body)
    assert render(after) == render(before)
    assert not report.changes
    (refusal,) = report.refusals
    assert re.search(reason, refusal.reason), refusal.reason
