"""FuseExperts: an FFN and its anchor become one lte.expert_ffn node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.passes.anchors import arguments, lte_nodes, views_back
from lte_compile.passes.building import LIMIT_REACHED, Builder
from lte_compile.passes.dataflow import GraphView, argument, fake_value, op_name
from lte_compile.passes.ir import CapturedGraph, Fusion, Level, PassReport, Rejection, WeightLayout
from lte_compile.passes.layout import AlignedInputs, align, same_width_views, shaped_like
from lte_compile.passes.linear import Linear
from lte_compile.passes.match import FfnMatch, FfnSearch, find_ffns
from lte_compile.passes.probe import UNKNOWN


@dataclass(frozen=True)
class FuseExperts:
    """Every FFN whose hidden value passes an anchor becomes one node; its router and selection stay.

        gates = lte.select(lte.route(x, ...), rule, tau)
        y = linear(lte.gate_hidden(act(linear(x, w_up)), gates), w_down)   ==>   y = lte.expert_ffn(x, gates, ...)

    1. Weights are the graph's own parameters: transposed where stored [in, out], sliced where gate and up share one.
    2. x and gates are the views of them whose tokens line up; the result takes the shape of the replaced node.
    3. What lte.expert_ffn cannot express keeps the anchor form, with the reason in the report.
    """

    name: ClassVar[str] = "fuse-experts"
    requires: ClassVar[Level] = Level.ROUTED
    ensures: ClassVar[Level] = Level.ROUTED
    limit: int | None = None

    def __call__(self, graph: CapturedGraph) -> PassReport:
        anchors = list(lte_nodes(graph, "gate_hidden"))
        if not anchors:
            return PassReport(name=self.name)
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
    return _Plan(inputs, given["expert_size"], given["expert_offsets"])


def _obstacle(view: GraphView, match: FfnMatch, anchor: fx.Node) -> str | None:
    site = match.site
    if site.hidden_parameters:
        return f"its activation reads per-neuron parameters ({', '.join(site.hidden_parameters)})"
    if site.activation == UNKNOWN:
        return "its activation is none that lte.expert_ffn knows"
    if not all(linear.is_last_axis for linear in match.linears):
        return "a projection reads or writes another axis than the last"
    if anchor not in views_back(match.down.data):
        return "the gated hidden value is changed before the down-projection reads it"
    if dropout := next((node for node in match.region if drops_out(view, node)), None):
        return f"dropout ({dropout.name}) is active on the hidden value"
    return _dtype_obstacle(view, match)


def _dtype_obstacle(view: GraphView, match: FfnMatch) -> str | None:
    """The op reads x and all weights in one dtype. Under autocast it casts them itself, but not through casts."""
    parameters = [node for node in view.constants if view.parameter_name(node) in match.site.parameters]
    direct = {node for linear in match.linears for node in linear.node.all_input_nodes}
    read = [match.projections[0].data] if any(node not in direct for node in parameters) else []
    dtypes = {value.dtype for node in (*parameters, *read) if isinstance(value := fake_value(node), Tensor)}
    if len(dtypes) > 1:
        return f"its input and weights have different dtypes ({', '.join(sorted(map(str, dtypes)))})"
    return None


def drops_out(view: GraphView, node: fx.Node) -> bool:
    """Whether the node is a dropout that is switched on."""
    name = op_name(view, node)
    if "bernoulli" in name or "rand_like" in name:
        return True
    if "dropout" not in name:
        return False
    if node.op == "call_module":
        module = view.module.get_submodule(str(node.target))
        return module.training and getattr(module, "p", 0.0) > 0
    probability = argument(node, 1, "p", default=0.5)
    return bool(argument(node, 2, "training", "train", default=True)) and probability > 0


def _rewrite(graph: CapturedGraph, match: FfnMatch, plan: _Plan, became: dict[fx.Node, fx.Node]) -> str:
    """`became` maps results replaced so far to what replaced them: one FFN's may be the next one's input."""
    replaced = match.down.result
    builder = Builder(graph, replaced)
    gate = match.gate
    w_up, b_up = _projection(builder, match, match.up, second=_up_is_second(match.site.fusion))
    w_gate, b_gate = (None, None)
    if gate is not None:
        w_gate, b_gate = _projection(builder, match, gate, second=not _up_is_second(match.site.fusion))
    w_down = _weight(builder, match.down)
    b_down = None if match.down.bias is None else builder.parameter(match.down.bias)
    optional: tuple[Any, ...] = () if plan.expert_offsets is None else (plan.expert_offsets,)
    fused = builder.call(
        torch.ops.lte.expert_ffn.default,
        *(became.get(plan.inputs.x, plan.inputs.x), plan.inputs.gates, w_up, w_gate, w_down, b_up, b_gate, b_down),
        *(match.site.activation, plan.expert_size, *optional),
    )
    became[replaced] = result = shaped_like(builder, fused, replaced)
    replaced.replace_all_uses_with(result)
    _drop_asserts(graph, match)
    return f"{match.site.name or match.site.down}: {len(match.region) + len(match.linears)} nodes became {fused.name}"


def _up_is_second(fusion: Fusion) -> bool:
    return fusion in (Fusion.GATE_THEN_UP, Fusion.INTERLEAVED_GATE_FIRST)


def _weight(builder: Builder, linear: Linear) -> fx.Node:
    """The layer's weight in nn.Linear orientation, [out, in]."""
    assert linear.weight is not None
    node = builder.parameter(linear.weight)
    return builder.call(torch.ops.aten.t.default, node) if linear.layout is WeightLayout.IN_OUT else node


def _projection(builder: Builder, match: FfnMatch, linear: Linear, *, second: bool) -> tuple[fx.Node, fx.Node | None]:
    """Weight [F, D] and bias [F] of up or gate; of a fused projection the rows of the first or second part."""
    weight = _weight(builder, linear)
    bias = None if linear.bias is None else builder.parameter(linear.bias)
    if match.site.fusion is Fusion.SEPARATE:
        return weight, bias
    rows = _rows(match.site.fusion, match.site.hidden, second)
    cut = torch.ops.aten.slice.Tensor
    return builder.call(cut, weight, 0, *rows), bias and builder.call(cut, bias, 0, *rows)


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
