"""An FFN's element-wise region as a region program: whatever ops a tracer recorded, in the table's operations.

1. The region's nodes run on random float64 data under make_fx: functions, methods, modules and ATen overloads become
   ATen ops, and ops that the table of kernels/pointwise.py lacks decompose into simpler ones.
2. Each value is followed by what it holds: one operand, or both of a fused projection (a pair) until a view takes it
   apart; every element carries the number of its channel, so that a reordering of neurons cannot go unnoticed.
3. The program is run against the region on further data: equal, or refused.

Parameters of the region stay nodes of the graph; what computes constants from them element-wise joins the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from lte_compile.kernels.program import Operand, Program, run_program
from lte_compile.passes.anchors import arguments
from lte_compile.passes.constants import computed_constants
from lte_compile.passes.dataflow import UNTAGGED_POINTWISE, GraphView, fake_value, shape_of
from lte_compile.passes.emitting import Channels, Emitter, ProgramError, Traced, interpret, is_written
from lte_compile.passes.ir import Fusion
from lte_compile.passes.running import Region, Runner, Values
from lte_compile.passes.shared import FfnMatch

__all__ = ["ProgramError", "RegionProgram", "reads_symbolic_numbers", "region_program"]

_TOLERANCE = 1e-9  # float64: two orders of evaluation differ by 1e-15 a step, a wrong program by far more
_SPREADS = (0.5, 3.0, 30.0)  # of the data it is confirmed on: around zero, where functions bend, where clamps hold


@dataclass(frozen=True)
class RegionProgram:
    """A program and the nodes that hold its constants, in the order of an op's `constants`."""

    program: Program
    constants: tuple[fx.Node, ...]


def region_program(view: GraphView, match: FfnMatch) -> RegionProgram:
    """The program of a match's region, or a ProgramError that says what it cannot express."""
    runner = Runner(view, _region(view, match))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        drawn = [_draw(runner, generator, spread) for spread in _SPREADS]
        try:
            traced = _trace(runner, drawn[0], match)
        except TypeError as error:  # clamp(h, -1.0, limit) takes two numbers or two tensors
            raise ProgramError("one of its ops takes numbers only, and torch.compile made one symbolic") from error
        _confirm(runner, traced, drawn, match)
    return traced


def reads_symbolic_numbers(match: FfnMatch) -> bool:
    """Whether torch.compile(dynamic=True) made an attribute that the region reads symbolic: it may change any time.

    What such a region is called by its numbers of now is no name for it.
    """
    return any(_is_symbolic(source) for node in match.region for source in node.all_input_nodes)


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(fake_value(node), torch.SymFloat)


def _region(view: GraphView, match: FfnMatch) -> Region:
    """From the projections to the hidden value, as it is before its anchor scales it."""
    projections, output, axis = match.projections, match.down.data, match.down.axis
    nodes = {*match.region, *computed_constants(view, match.region, match.site.hidden)}
    if match.anchor is not None:
        output = arguments(match.anchor)["hidden"]
        axis = len(shape_of(output)) - 1
        nodes = {node for node in nodes if view.order[node] < view.order[match.anchor]}
    return Region(
        ups=tuple(linear.result for linear in projections),
        axes=tuple(linear.out_axis for linear in projections),
        nodes=tuple(sorted(nodes, key=lambda node: view.order[node])),
        output=output,
        axis=axis,
    )


def _draw(runner: Runner, generator: torch.Generator, spread: float) -> Values:
    """A value for each input. Parameters get random ones too: the program must not depend on what they are now."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = runner.inputs(draw).items()
    # One axis, as torch reads the number out of a tensor without any where it wants a number.
    values = {n: torch.tensor([v], dtype=torch.float64) if _is_symbolic(n) else v for n, v in inputs}
    small = {n for n in values if n not in runner.region.ups and isinstance(fake_value(n), Tensor)}
    return {n: 0.1 + v.abs() / spread if n in small and v.is_floating_point() else v for n, v in values.items()}


def _trace(runner: Runner, values: Values, match: FfnMatch) -> RegionProgram:
    tensors = [node for node, value in values.items() if isinstance(value, Tensor)]

    def run(*given: Tensor) -> Tensor:
        return runner({**values, **dict(zip(tensors, given, strict=True))})

    graph = make_fx(run, decomposition_table=_decompositions())(*(values[node] for node in tensors)).graph
    graph.eliminate_dead_code()
    channels = _channels(match)
    emitter = Emitter()
    inputs = [_input(runner.view, node, values[node], match, channels) for node in tensors]
    result = interpret(graph, inputs, emitter, channels)
    program, names = emitter.finish(result)
    by_name = {_constant_name(node): node for node in tensors}
    return RegionProgram(program, tuple(by_name[name] for name in names))


def _channels(match: FfnMatch) -> Channels:
    fusion, hidden = match.site.fusion, match.site.hidden
    parts = {
        Fusion.SEPARATE: (),
        Fusion.GATE_THEN_UP: ("gate", "up"),
        Fusion.UP_THEN_GATE: ("up", "gate"),
        Fusion.INTERLEAVED_GATE_FIRST: ("gate", "up"),
        Fusion.INTERLEAVED_UP_FIRST: ("up", "gate"),
    }[fusion]
    interleaved = fusion in (Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST)
    return Channels(hidden, parts, interleaved)


def _constant_name(node: fx.Node) -> str:
    return f"constant {node.name}"


def _input(view: GraphView, node: fx.Node, value: Tensor, match: FfnMatch, channels: Channels) -> Traced:
    """What a tensor that enters the region holds: a projection, a constant of each neuron, or a single number."""
    for linear in match.projections:
        if linear.result is node:
            name = "gate" if match.gate is linear else "up"
            return Traced(channels.parts or (name,), torch.arange(value.shape[-1]).expand(value.shape))
    if node not in view.constants and not _is_symbolic(node):
        raise ProgramError(f"it reads `{node.name}`, which is computed from data outside of it")
    if not value.is_floating_point():
        raise ProgramError(f"its constant `{node.name}` is {value.dtype}")
    operands: tuple[Operand, ...] = (_constant_name(node),)
    if value.numel() == 1:
        return Traced(operands, torch.full(value.shape, -1))
    if value.numel() == match.site.hidden:
        return Traced(operands, torch.arange(value.numel()).view(value.shape), per_neuron=True)
    raise ProgramError(
        f"its constant `{node.name}` has shape {list(value.shape)}: neither one value nor one per neuron"
    )


@cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Torch's own, for everything element-wise that the table has no row for."""
    return {op: decompose for op, decompose in decomposition_table.items() if _is_composed(op)}


def _is_composed(op: Any) -> bool:
    if not isinstance(op, torch._ops.OpOverload):
        return False
    name = op._schema.name.split("::")[1]
    return not is_written(name) and (torch.Tag.pointwise in op.tags or name in UNTAGGED_POINTWISE)


def _confirm(runner: Runner, found: RegionProgram, drawn: list[Values], match: FfnMatch) -> None:
    for values in drawn:
        operands = _operands(runner, values, match)
        constants = [values[node].reshape(-1) for node in found.constants]
        expected = runner(values)
        actual = run_program(found.program, operands["up"], operands.get("gate"), constants)
        actual = actual.reshape(expected.shape)
        if not torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise ProgramError("its program does not compute the same, as when a tensor is changed in place")


def _operands(runner: Runner, values: Values, match: FfnMatch) -> dict[str, Tensor]:
    channels = _channels(match)
    ups = runner.region.ups
    if not channels.parts:
        names = ["gate" if match.gate is linear else "up" for linear in match.projections]
        return {name: values[up] for name, up in zip(names, ups, strict=True)}
    (whole,) = (values[up] for up in ups)
    hidden = channels.hidden
    halves = (whole[..., ::2], whole[..., 1::2]) if channels.interleaved else (whole[..., :hidden], whole[..., hidden:])
    return dict(zip(channels.parts, halves, strict=True))
