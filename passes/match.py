"""Find feed-forward networks in a captured graph by data flow, never by name.

1. Every linear layer is tried as a down-projection: `walk` follows its input back to the linear layers that feed it.
2. What the walk found must be an FFN: one input tensor, D in and D out, more neurons than D (or gated), no hidden value
   used elsewhere, no neuron reading another, no second entry into the region, weights that are plain parameters.
3. `probe` runs the element-wise region on random data and names layout, gate and activation.
4. A weight that is also used elsewhere refuses its site: permuting it would break that use.

Every linear layer that is part of no site is returned as a `Rejection` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.fx as fx

from lte_compile.passes.dataflow import GraphView, shape_of
from lte_compile.passes.ir import CapturedGraph, FfnSite, Fusion, Rejection
from lte_compile.passes.linear import Linear, find_linears, parameter_behind
from lte_compile.passes.probe import Finding, ProbeError, Region, probe
from lte_compile.passes.reasons import Refusal, explain, low_rank_reader, low_rank_update
from lte_compile.passes.region import escape, reachable, second_entry
from lte_compile.passes.shared import FfnMatch, refuse_shared_weights
from lte_compile.passes.steps import Blocked
from lte_compile.passes.walk import Walk, common_input, tensor_behind, walk_back

__all__ = ["FfnMatch", "FfnSearch", "find_ffns"]


@dataclass(frozen=True)
class FfnSearch:
    """What a search found: a match per place in the graph, and why every other linear layer is no FFN's."""

    matches: tuple[FfnMatch, ...]
    rejections: tuple[Rejection, ...]

    @property
    def sites(self) -> tuple[FfnSite, ...]:
        """The FFNs by parameters: layers that run at several places (ALBERT) count once."""
        return tuple(dict.fromkeys(match.site for match in self.matches))


def find_ffns(captured: CapturedGraph) -> FfnSearch:
    """All FFNs of a captured graph, and a reason for every linear layer that belongs to none."""
    view = GraphView.of(captured)
    linears = find_linears(view)
    by_result = {linear.result: linear for linear in linears}
    verdicts = {linear: _examine(view, by_result, linear) for linear in linears}
    verdicts = refuse_shared_weights(view, verdicts)
    matches = tuple(verdict for verdict in verdicts.values() if isinstance(verdict, FfnMatch))
    return FfnSearch(matches, tuple(_rejections(view, by_result, verdicts)))


def _rejections(
    view: GraphView, linears: Mapping[fx.Node, Linear], verdicts: Mapping[Linear, FfnMatch | Refusal]
) -> Iterator[Rejection]:
    """One per linear layer outside of all sites; a producer of a refused FFN shares its reason."""
    used = {linear for verdict in verdicts.values() if isinstance(verdict, FfnMatch) for linear in verdict.linears}
    blamed = {up: down for down, v in verdicts.items() if isinstance(v, Refusal) and v.final for up in v.producers}
    for linear, verdict in verdicts.items():
        if linear in used or isinstance(verdict, FfnMatch):
            continue
        down = blamed.get(linear)
        if verdict.final:
            reason = verdict.reason
        elif down is not None:
            refusal = verdicts[down]
            assert isinstance(refusal, Refusal)
            reason = f"projection into `{down.label}`, which is refused: {refusal.reason}"
        else:
            reason = explain(view, linears, linear, verdict.reason)
        yield Rejection(node=linear.node.name, parameter=linear.weight, reason=reason)


def _examine(view: GraphView, linears: Mapping[fx.Node, Linear], down: Linear) -> FfnMatch | Refusal:
    """`down` as the down-projection of an FFN, or why it is not."""
    walk = walk_back(view, linears, down)
    if isinstance(walk, Blocked):
        return Refusal(walk.reason)
    x = common_input(view, walk.ups)
    if x is None:
        return _different_inputs(view, linears, walk)
    refusal = (
        _width_refusal(walk, down) or _weight_refusal(view, walk, down) or _flow_refusal(view, linears, walk, down, x)
    )
    return refusal or _verified(view, walk, down, x)


def _different_inputs(view: GraphView, linears: Mapping[fx.Node, Linear], walk: Walk) -> Refusal:
    ups = tuple(walk.ups)
    if not ups:
        return Refusal("no linear layer feeds it")
    if update := low_rank_update(view, linears, ups):
        return Refusal(update, ups, final=True)
    readings = " and ".join(f"`{up.label}` reads `{up.data.name}`" for up in ups)
    return Refusal(f"the layers that feed it read different tensors: {readings}")


def _width_refusal(walk: Walk, down: Linear) -> Refusal | None:
    ups, hidden = tuple(walk.ups), down.in_width
    width = ups[0].in_width
    plain = len(ups) == 1 and ups[0].out_width == hidden
    if plain and hidden < min(width, down.out_width):
        reason = f"low-rank pair or adapter: its hidden width {hidden} is narrower than the model width {width}"
        return Refusal(reason, ups, final=True)
    if width != down.out_width:
        return Refusal(f"its output width {down.out_width} differs from the model width {width}")
    if plain and hidden <= width:
        return Refusal(f"its hidden width {hidden} does not exceed the model width {width}", ups, final=True)
    return None


def _flow_refusal(
    view: GraphView, linears: Mapping[fx.Node, Linear], walk: Walk, down: Linear, x: fx.Node
) -> Refusal | None:
    ups = tuple(walk.ups)
    outputs = {node for up in ups for node in (up.node, up.result)}
    downstream = reachable(view, outputs, down.node)
    for side, reader in walk.sides:
        if side in downstream:
            reason = f"hidden units interact: `{reader.name}` reads `{side.name}`, which is computed from all of them"
            return Refusal(reason, ups, final=True)
    if found := escape(view, walk.nodes | outputs, {down.node}):
        value, user = found
        reason = f"its hidden value `{value.name}` has another user, `{user.name}`"
        return Refusal(low_rank_reader(view, linears, user, down) or reason, ups, final=True)
    if entry := second_entry(view, x, down.node, ignored=walk.gates):
        reason = f"its hidden value also depends on `{entry.name}`, which does not come from the FFN's input `{x.name}`"
        return Refusal(reason, ups, final=True)
    return None


def _weight_refusal(view: GraphView, walk: Walk, down: Linear) -> Refusal | None:
    ups = tuple(walk.ups)
    for linear in (*ups, down):
        if linear.problem:
            return Refusal(f"`{linear.label}`: {linear.problem}", ups, final=True)
    for constant in walk.hidden_constants:
        if _neuron_parameter(view, constant, down.in_width) is None:
            reason = f"the per-neuron constant `{constant.name}` is not a parameter with one value per neuron"
            return Refusal(reason, ups, final=True)
    return None


def _neuron_parameter(view: GraphView, node: fx.Node, hidden: int) -> str | None:
    behind = tensor_behind(view, node)
    return parameter_behind(view, behind) if math.prod(shape_of(behind)) == hidden else None


def _verified(view: GraphView, walk: Walk, down: Linear, x: fx.Node) -> FfnMatch | Refusal:
    """The match, after running its region on random data."""
    ups = tuple(walk.ups)
    nodes = tuple(sorted(walk.nodes, key=lambda node: view.order[node]))
    region = Region(
        ups=tuple(up.result for up in ups),
        axes=tuple(up.out_axis for up in ups),
        nodes=nodes,
        output=down.data,
        axis=down.axis,
    )
    try:
        finding = probe(view, region, down.in_width)
    except ProbeError as error:
        return Refusal(str(error), ups, final=True)
    if finding.gate is None and finding.activation == "identity":
        return Refusal(
            "no activation between it and the layer that feeds it: a low-rank pair, not an FFN", ups, final=True
        )
    up, gate = _up_and_gate(ups, finding)
    site = FfnSite(
        up=_name(up),
        gate=None if gate is None else _name(gate),
        down=_name(down),
        width=down.out_width,
        hidden=down.in_width,
        activation=finding.activation,
        gated=gate is not None,
        up_bias=up.bias,
        gate_bias=None if gate is None else gate.bias,
        down_bias=down.bias,
        up_layout=up.layout,
        down_layout=down.layout,
        fusion=finding.fusion,
        hidden_parameters=_neuron_parameters(view, walk, down.in_width),
        first_projection=_name(ups[0]),
    )
    return FfnMatch(site, x, up, gate, down, nodes, walk.anchor)


def _neuron_parameters(view: GraphView, walk: Walk, hidden: int) -> tuple[str, ...]:
    names = (_neuron_parameter(view, constant, hidden) for constant in walk.hidden_constants)
    return tuple(sorted({name for name in names if name is not None}))


def _up_and_gate(ups: tuple[Linear, ...], finding: Finding) -> tuple[Linear, Linear | None]:
    if finding.gate is None:
        return ups[0], None
    if finding.fusion is not Fusion.SEPARATE:
        return ups[0], ups[0]
    return ups[1 - finding.gate], ups[finding.gate]


def _name(linear: Linear) -> str:
    assert linear.weight is not None  # _weight_refusal saw to it
    return linear.weight
