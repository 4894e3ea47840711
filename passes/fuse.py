"""FuseExperts: an FFN and its anchor become one lte.expert_ffn node."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.kernels.program import is_program, parse_program
from lte_compile.passes.anchors import arguments, computed_value, is_lte, lte_nodes, views_back
from lte_compile.passes.building import LIMIT_REACHED, Builder
from lte_compile.passes.dataflow import GraphView, drops_out, fake_value, shape_of
from lte_compile.passes.ir import CapturedGraph, Fusion, Level, PassReport, Rejection
from lte_compile.passes.layout import AlignedInputs, align, same_width_views, shaped_like
from lte_compile.passes.linear import Linear
from lte_compile.passes.match import FfnMatch, FfnSearch, find_ffns
from lte_compile.passes.probe import UNKNOWN
from lte_compile.passes.program import ProgramError, reads_symbolic_numbers, region_program
from lte_compile.passes.separate import (
    cut_inputs,
    cut_outputs,
    look_through_joins,
    separable,
    weight_of,
    write_other_inputs,
    write_other_outputs,
)


@dataclass(frozen=True)
class FuseExperts:
    """Every FFN whose hidden value passes an anchor becomes one node; its router and selection stay.

        gates = lte.select(lte.route(x, ...), rule, tau)
        y = linear(lte.gate_hidden(act(linear(x, w_up)), gates), w_down)   ==>   y = lte.expert_ffn(x, gates, ...)

    1. Weights are the graph's own parameters: transposed where stored [in, out], sliced where gate and up share one.
    2. x and gates are the views of them whose tokens line up; the result takes the shape of the replaced node.
    3. A region that is no named activation goes into the node as a region program, with the constants it reads.
    4. What lte.expert_ffn cannot express keeps the anchor form, with the reason in the report.
    """

    name: ClassVar[str] = "fuse-experts"
    requires: ClassVar[Level] = Level.ROUTED
    ensures: ClassVar[Level] = Level.ROUTED
    limit: int | None = None

    def __call__(self, graph: CapturedGraph) -> PassReport:
        anchors = list(lte_nodes(graph, "gate_hidden"))
        if not anchors:
            return PassReport(name=self.name)
        look_through_joins(graph)
        search = find_ffns(graph)
        view = GraphView.of(graph)
        by_anchor = {match.anchor: match for match in search.matches}
        changes: list[str] = []
        refusals: list[Rejection] = []
        became: dict[fx.Node, fx.Node] = {}
        for anchor in anchors:
            match = by_anchor.get(anchor)
            if match is None:
                refusals.append(_unmatched(view, search, anchor))
            elif self.limit is not None and len(changes) >= self.limit:
                refusals.append(_refusal(match, LIMIT_REACHED))
            elif isinstance(plan := _plan(view, match, anchor), str):
                refusals.append(_refusal(match, plan))
            else:
                changes.append(_rewrite(graph, match, plan, became))
        return PassReport(name=self.name, changes=tuple(changes), refusals=tuple(refusals))


@dataclass(frozen=True)
class _Plan:
    inputs: AlignedInputs
    expert_size: int
    expert_offsets: fx.Node | None
    activation: str
    constants: tuple[fx.Node, ...]
    density: float | None


def _refusal(match: FfnMatch, reason: str) -> Rejection:
    return Rejection(node=match.down.node.name, parameter=match.site.down, reason=reason)


def _unmatched(view: GraphView, search: FfnSearch, anchor: fx.Node) -> Rejection:
    """Why the linear layer behind the anchor is no FFN's down-projection, in the matcher's words."""
    readers = {node.name for node in _readers(view, anchor)}
    for rejection in search.rejections:
        if rejection.node in readers:
            return rejection
    return Rejection(node=anchor.name, reason="no FFN was recognised around it")


def _readers(view: GraphView, node: fx.Node) -> Iterator[fx.Node]:
    """Users of the node, also through views of it."""
    for user in node.users:
        yield user
        if node in list(views_back(user))[1:2]:
            yield from _readers(view, user)


def _plan(view: GraphView, match: FfnMatch, anchor: fx.Node) -> _Plan | str:
    """What the fused node needs, or why there can be none."""
    if obstacle := _obstacle(view, match, anchor):
        return obstacle
    given = arguments(anchor)
    x_views = [*same_width_views(match.projections[0].data), match.x]
    inputs = align(x_views, given["gates"], match.down.result)
    if inputs is None:
        return "its input, gates and result group tokens differently"
    activation = match.site.activation
    constants: tuple[fx.Node, ...] = ()
    if activation == UNKNOWN or reads_symbolic_numbers(match):
        try:
            found = region_program(view, match)
        except ProgramError as error:
            return f"no kernel can be generated for its hidden region: {error}"
        activation, constants = str(found.program), found.constants
    density = _expected_density(given["gates"])
    return _Plan(inputs, given["expert_size"], given["expert_offsets"], activation, constants, density)


def _expected_density(gates: fx.Node) -> float | None:
    """What the selection that made the gates says of them."""
    select = computed_value(gates)
    return arguments(select)["density"] if is_lte(select, "select") else None


def _obstacle(view: GraphView, match: FfnMatch, anchor: fx.Node) -> str | None:
    if updated := next((linear for linear in match.linears if linear.factors), None):
        return f"unmerged LoRA: `{updated.label}` has a low-rank update; merge the adapter first"
    if shared := next((linear for linear in match.linears if not separable(view, linear)), None):
        return f"`{shared.label}` also serves a layer that reads it whole"
    if not all(linear.is_last_axis for linear in match.linears):
        return "a projection reads or writes another axis than the last"
    if anchor not in views_back(match.down.data):
        return "the gated hidden value is changed before the down-projection reads it"
    if dropout := next((node for node in match.region if drops_out(view, node)), None):
        return f"dropout ({dropout.name}) is active on the hidden value"
    return _dtype_obstacle(view, match)


def _dtype_obstacle(view: GraphView, match: FfnMatch) -> str | None:
    """The op reads x and all weights in one dtype. Under autocast it casts them itself, but not through casts."""
    names = set(match.site.parameters) - set(match.site.hidden_parameters)
    parameters = [node for node in view.constants if view.parameter_name(node) in names]
    direct = {node for linear in match.linears for node in linear.node.all_input_nodes}
    read = [match.projections[0].data] if any(node not in direct for node in parameters) else []
    dtypes = {value.dtype for node in (*parameters, *read) if isinstance(value := fake_value(node), Tensor)}
    if len(dtypes) > 1:
        return f"its input and weights have different dtypes ({', '.join(sorted(map(str, dtypes)))})"
    return None


def _rewrite(graph: CapturedGraph, match: FfnMatch, plan: _Plan, became: dict[fx.Node, fx.Node]) -> str:
    """`became` maps results replaced so far to what replaced them: one FFN's may be the next one's input."""
    replaced = match.down.result
    builder = Builder(graph, replaced)
    gate = match.gate
    w_up, b_up = _projection(builder, match, match.up, second=_up_is_second(match.site.fusion))
    w_gate, b_gate = (None, None)
    if gate is not None:
        w_gate, b_gate = _projection(builder, match, gate, second=not _up_is_second(match.site.fusion))
    w_down = cut_inputs(builder, match.down)
    rest = None if match.down.whole is None else write_other_inputs(builder, GraphView.of(graph), match.down)
    b_down = None if match.down.bias is None or rest is not None else builder.parameter(match.down.bias)
    optional: tuple[Any, ...] = () if plan.expert_offsets is None else (plan.expert_offsets,)
    if plan.constants:
        optional = (plan.expert_offsets, [_constant(builder, node) for node in plan.constants])
    fused = builder.call(
        torch.ops.lte.expert_ffn.default,
        *(became.get(plan.inputs.x, plan.inputs.x), plan.inputs.gates, w_up, w_gate, w_down, b_up, b_gate, b_down),
        *(plan.activation, plan.expert_size, *optional),
        **({} if plan.density is None else {"density": plan.density}),
    )
    result = shaped_like(builder, fused, replaced)
    became[replaced] = result = result if rest is None else builder.call(torch.ops.aten.add.Tensor, rest, result)
    replaced.replace_all_uses_with(result)
    for part in match.projections:
        if part.whole is not None:
            write_other_outputs(graph, part)
    _drop_asserts(graph, match)
    label, count = match.site.name or match.site.down, len(match.region) + len(match.linears)
    return f"{label}: {count} nodes became {fused.name}{_hidden_note(plan.activation)}"


def _hidden_note(activation: str) -> str:
    """For the report: nothing for a named activation."""
    if not is_program(activation):
        return ""
    return f", its hidden region a program of {len(parse_program(activation).instructions)} operations"


def _constant(builder: Builder, node: fx.Node) -> fx.Node:
    """A constant of the region as the op wants it: a tensor of one axis, or of one element."""
    if isinstance(fake_value(node), torch.SymFloat):
        result = fake_value(builder.place)
        dtype = torch.float64 if result.dtype == torch.float64 else torch.float32
        return builder.call(torch.ops.aten.scalar_tensor.default, node, dtype=dtype, device=result.device)
    size = math.prod(shape_of(node))
    return node if size == 1 or len(shape_of(node)) == 1 else builder.reshape(node, [size])


def _up_is_second(fusion: Fusion) -> bool:
    return fusion in (Fusion.GATE_THEN_UP, Fusion.INTERLEAVED_GATE_FIRST)


def _projection(builder: Builder, match: FfnMatch, linear: Linear, *, second: bool) -> tuple[fx.Node, fx.Node | None]:
    """Weight [F, D] and bias [F] of up or gate; of a projection with other outputs too, the rows that are its own."""
    if match.site.fusion is Fusion.SEPARATE:
        if linear.whole is None:
            bias = None if linear.bias is None else builder.parameter(linear.bias)
            return weight_of(builder, linear), bias
        return cut_outputs(builder, linear, (linear.start, linear.start + linear.out_width, 1))
    start, end, step = _rows(match.site.fusion, match.site.hidden, second)
    return cut_outputs(builder, linear, (linear.start + start, linear.start + end, step))


def _rows(fusion: Fusion, hidden: int, second: bool) -> tuple[int, int, int]:
    """(start, end, step) of one part's rows in a fused weight of 2F rows."""
    if fusion in (Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST):
        return int(second), 2 * hidden, 2
    return (hidden, 2 * hidden, 1) if second else (0, hidden, 1)


def _drop_asserts(graph: CapturedGraph, match: FfnMatch) -> None:
    """torch.export asserts dtypes on values that nothing computes any more; those asserts would keep them alive."""
    for node in (*match.region, *(linear.node for linear in match.linears)):
        for user in list(node.users):
            if user.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.module.graph.erase_node(user)
