"""Find feed-forward networks in a captured graph by data flow, never by name.

1. Every linear layer is tried as a down-projection: `walk` follows its input back to the linear layers that feed it.
2. What the walk found must be an FFN: one input tensor, D in and D out, more neurons than D (or gated), no hidden value
   used elsewhere, no neuron reading another, no second entry into the region, weights that are plain parameters.
3. `probe` runs the element-wise region on random data and names layout, gate and activation.
4. A weight that is also used elsewhere refuses its site: permuting it would break that use.

Every linear layer that is part of no site is returned as a `Rejection` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor

from lte_compile.passes.constants import computed_constants, neuron_parameters
from lte_compile.passes.dataflow import BRANCH_KEY, GraphView, fake_value
from lte_compile.passes.ir import CapturedGraph, FfnSite, Fusion, Rejection, SiteKind
from lte_compile.passes.linear import Linear, find_linears
from lte_compile.passes.low_rank import join_updates
from lte_compile.passes.parts import input_parts, with_output_parts
from lte_compile.passes.probe import UNKNOWN, Finding, ProbeError, Region, probe
from lte_compile.passes.reasons import Refusal, explain, inside_higher_order, low_rank_reader, low_rank_update
from lte_compile.passes.region import escape, reachable, second_entry
from lte_compile.passes.shared import FfnMatch, refuse_shared_weights
from lte_compile.passes.steps import Blocked
from lte_compile.passes.walk import Walk, common_input, tensor_behind, walk_back

__all__ = ["FfnMatch", "FfnSearch", "find_ffns"]


@dataclass(frozen=True)
class FfnSearch:
    """What a search found: a match per place in the graph, and why every other linear layer is no FFN's.

    `native_moe` are the FFNs of experts that the model has of itself, which no pass rewrites.
    """

    matches: tuple[FfnMatch, ...]
    rejections: tuple[Rejection, ...]
    native_moe: tuple[FfnMatch, ...] = ()

    @property
    def sites(self) -> tuple[FfnSite, ...]:
        """The FFNs by parameters: layers that run at several places (ALBERT) count once."""
        return tuple(dict.fromkeys(match.site for match in self.matches))


def find_ffns(captured: CapturedGraph) -> FfnSearch:
    """All FFNs of a captured graph, and a reason for every linear layer that belongs to none."""
    view = GraphView.of(captured)
    linears = join_updates(view, find_linears(view))
    by_result = {linear.result: linear for linear in linears}
    with_parts = with_output_parts(view, by_result)
    verdicts = {linear: _judge(view, by_result, with_parts, linear) for linear in linears}
    verdicts = refuse_shared_weights(view, verdicts)
    found = [verdict for verdict in verdicts.values() if isinstance(verdict, FfnMatch)]
    matches = tuple(match for match in found if match.site.kind is SiteKind.FFN)
    native_moe = tuple(match for match in found if match.site.kind is SiteKind.NATIVE_MOE)
    return FfnSearch(matches, tuple(_rejections(view, by_result, verdicts)), native_moe)


def _rejections(
    view: GraphView, linears: Mapping[fx.Node, Linear], verdicts: Mapping[Linear, FfnMatch | Refusal]
) -> Iterator[Rejection]:
    """One per linear layer outside of all sites; a producer of a refused FFN shares its reason."""
    matches = [verdict for verdict in verdicts.values() if isinstance(verdict, FfnMatch)]
    used = {linear.whole or linear for match in matches for linear in match.linears}
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
    for linear in linears.values():
        for factor in (factor for pair in linear.factors for factor in pair):
            reason = f"low-rank update (LoRA adapter) of `{linear.label}`, no FFN of its own"
            yield Rejection(node=factor.node.name, parameter=factor.weight, reason=reason)
    yield from inside_higher_order(view)


def _judge(
    view: GraphView, linears: Mapping[fx.Node, Linear], with_parts: Mapping[fx.Node, Linear], down: Linear
) -> FfnMatch | Refusal:
    """What `down` is with whole layers, or else with parts of them, which are looked at last as they are rare."""
    verdict = _examine(view, linears, down)
    if isinstance(verdict, FfnMatch):
        return verdict
    has_parts = len(with_parts) > len(linears)
    for part in (*([down] if has_parts else []), *input_parts(view, down)):
        found = _examine(view, with_parts, part)
        if isinstance(found, FfnMatch):
            return found
    return verdict


def _examine(view: GraphView, linears: Mapping[fx.Node, Linear], down: Linear) -> FfnMatch | Refusal:
    """`down` as the down-projection of an FFN, or why it is not."""
    walk = walk_back(view, linears, down)
    if isinstance(walk, Blocked):
        return Refusal(walk.reason)
    x = common_input(view, walk.ups)
    if x is None:
        return _different_inputs(view, linears, walk)
    if any(up.factors for up in walk.ups):  # an update may read x before it is viewed or cast for its layer
        x = tensor_behind(view, x)
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
    if plain and hidden <= width and down.experts == 1:
        return Refusal(f"its hidden width {hidden} does not exceed the model width {width}", ups, final=True)
    return None


def _flow_refusal(
    view: GraphView, linears: Mapping[fx.Node, Linear], walk: Walk, down: Linear, x: fx.Node
) -> Refusal | None:
    ups = tuple(walk.ups)
    outputs = {up.result for up in ups}
    downstream = reachable(view, outputs, down.node)
    for side, reader in walk.sides:
        if side in downstream:
            reason = f"hidden units interact: `{reader.name}` reads `{side.name}`, which is computed from all of them"
            return Refusal(reason, ups, final=True)
    if found := escape(view, walk.nodes | outputs, {down.node, *down.readers}):
        value, user = found
        reason = f"its hidden value `{value.name}` has another user, `{user.name}`"
        return Refusal(low_rank_reader(view, linears, user, down) or reason, ups, final=True)
    if down.experts > 1:  # which expert a token goes to is decided outside
        return None
    end = down.data if down.whole else down.node
    if entry := second_entry(view, x, end, ignored=walk.gates):
        reason = f"its hidden value also depends on `{entry.name}`, which does not come from the FFN's input `{x.name}`"
        return Refusal(reason, ups, final=True)
    return None


def _weight_refusal(view: GraphView, walk: Walk, down: Linear) -> Refusal | None:
    ups = tuple(walk.ups)
    for linear in (*ups, down):
        if condition := linear.node.meta.get(BRANCH_KEY):
            reason = f"data-dependent control flow: {condition} decides whether it runs, and only one side was traced"
            return Refusal(reason, ups, final=True)
        if linear.problem:
            return Refusal(f"`{linear.label}`: {linear.problem}", ups, final=True)
        if held := next((name for name in (linear.weight, linear.bias) if name in view.buffers), None):
            return Refusal(f"`{held}` is a buffer or constant, not a parameter", ups, final=True)
        if linear.experts != down.experts:
            reason = f"`{linear.label}` stacks {linear.experts} matrices and `{down.label}` {down.experts}"
            return Refusal(reason, ups, final=True)
    for constant in walk.hidden_constants if down.experts == 1 else ():
        if neuron_parameters(view, tensor_behind(view, constant), down.in_width) is None:
            reason = f"the per-neuron constant `{constant.name}` is not a parameter with one value per neuron"
            return Refusal(reason, ups, final=True)
    return None


def _verified(view: GraphView, walk: Walk, down: Linear, x: fx.Node) -> FfnMatch | Refusal:
    """The match, after running its region on random data."""
    ups = tuple(walk.ups)
    nodes = _sorted(view, walk.nodes)
    region = Region(
        ups=tuple(up.result for up in ups),
        axes=tuple(up.out_axis for up in ups),
        nodes=_sorted(view, walk.nodes | computed_constants(view, walk.nodes, down.in_width)),
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
        activation=UNKNOWN if _is_masked(view, walk, down) else finding.activation,
        gated=gate is not None,
        up_bias=up.bias,
        gate_bias=None if gate is None else gate.bias,
        down_bias=down.bias,
        up_layout=up.layout,
        gate_layout=(gate or up).layout,
        down_layout=down.layout,
        fusion=finding.fusion,
        hidden_parameters=_neuron_parameters(view, walk, down.in_width),
        first_projection=_name(ups[0]),
        kind=SiteKind.FFN if down.experts == 1 else SiteKind.NATIVE_MOE,
        experts=down.experts,
        up_start=up.start,
        gate_start=0 if gate is None else gate.start,
        down_start=down.start,
        up_low_rank=_factors(up, 1),
        gate_low_rank=() if gate is None or gate is up else _factors(gate, 1),
        down_low_rank=_factors(down, 0),
    )
    return FfnMatch(site, x, up, gate, down, nodes, walk.anchor)


def _is_masked(view: GraphView, walk: Walk, down: Linear) -> bool:
    """Whether integers or booleans of the tokens have a say in the hidden values, which no activation's name tells.

    Experts' masks only say which tokens have an expert.
    """
    values = [fake_value(side) for side, _ in walk.sides if side not in view.constants]
    return down.experts == 1 and any(isinstance(v, Tensor) and not v.is_floating_point() for v in values)


def _sorted(view: GraphView, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(sorted(nodes, key=lambda node: view.order[node]))


def _neuron_parameters(view: GraphView, walk: Walk, hidden: int) -> tuple[str, ...]:
    names = (neuron_parameters(view, tensor_behind(view, constant), hidden) for constant in walk.hidden_constants)
    return tuple(sorted({name for found in names if found for name in found}))


def _factors(linear: Linear, which: int) -> tuple[str, ...]:
    return tuple(_name(pair[which]) for pair in linear.factors)


def _up_and_gate(ups: tuple[Linear, ...], finding: Finding) -> tuple[Linear, Linear | None]:
    if finding.gate is None:
        return ups[0], None
    if finding.fusion is not Fusion.SEPARATE:
        return ups[0], ups[0]
    return ups[1 - finding.gate], ups[finding.gate]


def _name(linear: Linear) -> str:
    assert linear.weight is not None  # _weight_refusal saw to it
    return linear.weight
