"""The numeric probe on regions cut out by hand: it must catch what structure alone would let through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from lte_compile.capture.capture import capture
from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.passes.dataflow import GraphView
from lte_compile.passes.ir import Fusion
from lte_compile.passes.probe import UNKNOWN, Finding, ProbeError, Region, probe

T, H = 4, 24


def probed(
    function: Callable[..., Tensor], *widths: int, hidden: int = H, dtype: torch.dtype = torch.float32, vectors: int = 0
) -> Finding:
    """Probes `function` of projections of the given widths and vectors [hidden], all of whose nodes are the region."""
    projections = (torch.zeros(2, T, width, dtype=dtype) for width in widths)
    graph = capture(fx.symbolic_trace(function), (*projections, *torch.ones(vectors, hidden, dtype=dtype)))
    nodes = list(graph.module.graph.nodes)
    ups = tuple(node for node in nodes if node.op == "placeholder")[: len(widths)]
    inner = tuple(node for node in nodes if node.op not in ("placeholder", "output"))
    region = Region(ups=ups, axes=(2,) * len(ups), nodes=inner, output=inner[-1], axis=2)
    return probe(GraphView.of(graph), region, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_names_every_activation(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 too, where gelu and gelu_tanh round to the same numbers: the probe computes in float64."""
    apply = ACTIVATIONS[name].apply
    assert probed(lambda up: apply(up) + 0, H, dtype=dtype).activation == name
    gated = probed(lambda gate, up: apply(gate) * up, H, H, dtype=dtype)
    assert (gated.activation, gated.gate) == (name, 0)


def test_tells_gate_from_up_by_what_they_compute() -> None:
    assert probed(lambda up, gate: up * torch.relu(gate), H, H) == Finding("relu", Fusion.SEPARATE, 1)


@pytest.mark.parametrize(
    ("function", "fusion"),
    [
        (lambda both: torch.relu(both[..., :H]) * both[..., H:], Fusion.GATE_THEN_UP),
        (lambda both: both[..., :H] * torch.relu(both[..., H:]), Fusion.UP_THEN_GATE),
        (lambda both: torch.relu(both[..., ::2]) * both[..., 1::2], Fusion.INTERLEAVED_GATE_FIRST),
        (lambda both: both[..., ::2] * torch.relu(both[..., 1::2]), Fusion.INTERLEAVED_UP_FIRST),
    ],
)
def test_fused_layouts(function: Callable[[Tensor], Tensor], fusion: Fusion) -> None:
    finding = probed(function, 2 * H)
    assert (finding.fusion, finding.activation) == (fusion, "relu")


@pytest.mark.parametrize("function", [lambda up: up.clamp(0, 6), lambda up: torch.relu(up) * 2, torch.sin, torch.erf])
def test_near_namesakes_are_unknown(function: Callable[[Tensor], Tensor]) -> None:
    assert probed(lambda up: function(up) + 0, H).activation == UNKNOWN


@pytest.mark.parametrize(
    ("function", "widths", "message"),
    [
        (lambda up: up * up.mean(-1, keepdim=True), (H,), "hidden units interact"),
        (lambda up: up.softmax(-1), (H,), "hidden units interact"),
        (lambda up: up.cumsum(1), (H,), "tokens interact"),
        (lambda up: up.flip(-1), (H,), "the hidden units are reordered"),
        (lambda up: torch.relu(up) * 0, (H,), "reaches no hidden unit"),
        (lambda both: torch.relu(both[..., :H]), (2 * H,), "reaches no hidden unit"),
        (lambda up: up.flip(1), (H,), "the tokens are reordered"),
        (lambda up: up.transpose(0, 1).reshape(2, T, H), (H,), "the tokens are reordered"),
        (lambda up: up.transpose(0, 1), (H,), "the tokens are reordered"),
        (lambda up: (up.unsqueeze(1) * up.unsqueeze(2)).flatten(1, 2), (H,), "tokens interact"),
        (lambda both: both[..., :H] * both[..., H:].flip(-1), (2 * H,), "the hidden units are reordered"),
        (lambda up: up.view(2, T, 6, 4).transpose(2, 3).reshape(2, T, H), (H,), "the hidden units are reordered"),
        (lambda a, b, c: a * b * c, (H, H, H), "do not form a plain or gated FFN"),
        (lambda up: up + 0, (H // 2,), r"widths \[12\] do not form"),
    ],
)
def test_refuses(function: Callable[..., Tensor], widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        probed(function, *widths)


@pytest.mark.parametrize(
    ("function", "gate"),
    [
        (lambda a, b: torch.maximum(a, b), 0),
        (lambda gate, up: gate.clamp(max=7) * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1), 0),
        (lambda up, gate: 5 * torch.tanh(up * torch.relu(gate) / 5), 1),
        (lambda up, gate: (up + 1) * torch.sin(gate), 1),
        (lambda a, b: torch.relu(a + b), 0),
    ],
)
def test_two_operands_in_any_elementwise_combination(function: Callable[..., Tensor], gate: int) -> None:
    """The operand in which the region is linear near zero is `up`; where none is, the first counts as the gate."""
    assert probed(function, H, H) == Finding(UNKNOWN, Fusion.SEPARATE, gate)


def test_scales_may_leave_one_operand_of_a_maximum_no_chance() -> None:
    """With scales near .1 and shifts near .6, clamp(up) * scale never exceeds the other: other scales are tried too."""

    def larger(gate: Tensor, up: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.maximum(F.gelu(gate.clamp(-3, 3)) + shift, up.clamp(-3, 3) * scale)

    assert probed(larger, 512, 512, hidden=512, vectors=2) == Finding(UNKNOWN, Fusion.SEPARATE, 0)


@pytest.mark.parametrize(
    ("function", "widths"),
    [
        (lambda up: up + 0, (H,)),
        (lambda up: 0.5 * up + 3, (H,)),
        (lambda a, b: a - 2 * b, (H, H)),
        (lambda both: both[..., :H] + both[..., H:], (2 * H,)),
    ],
)
def test_an_affine_region_is_no_activation(function: Callable[..., Tensor], widths: tuple[int, ...]) -> None:
    assert (probed(function, *widths).activation, probed(function, *widths).gate) == ("identity", None)


@pytest.mark.parametrize("odd", range(H))
def test_no_channel_goes_unseen(odd: int) -> None:
    """One hidden unit that reads its neighbour is found whichever it is."""

    def leaking(up: Tensor) -> Tensor:
        neighbour = (odd + 1) % H
        return torch.relu(up) + F.pad(up[..., neighbour : neighbour + 1], (odd, H - 1 - odd))

    with pytest.raises(ProbeError, match="hidden units"):
        probed(leaking, H)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    probed(lambda up: torch.relu(up), H)
    assert torch.equal(before, torch.get_rng_state())
