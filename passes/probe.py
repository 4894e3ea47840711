"""Numeric verification of a matched region: run it on random data and see what it computes.

Everything runs in float64 whatever the model's dtype, so that activations that differ in the fourth digit (gelu and
its tanh form) are told apart. Dropout and the anchor `lte::gate_hidden` count as the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate, map_arg

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.passes.dataflow import (
    CONSTANT_KEY,
    LAYOUT_OPS,
    REGROUP_OPS,
    GraphView,
    fake_value,
    float_hint,
    hint,
    op_name,
    shape_of,
)
from lte_compile.passes.ir import Fusion

UNKNOWN = "unknown"
_SAMPLED_CHANNELS = 12  # per projection; structure is already proven by the walk, this guards against its mistakes
_TOLERANCE = (
    1e-7  # float64 evaluations of one formula written two ways differ by about 1e-15, gelu and gelu_tanh by 1e-4
)
_NUDGES = (0.25, -1.0, 4.0)  # tried in turn: an activation may be flat around one value
_TOKENS = 2  # enough to see one token reach another
_CAST_METHODS = ("float", "half", "bfloat16", "double", "type_as")


@dataclass(frozen=True)
class Region:
    """An element-wise region cut out of a graph: projection results `ups` feed `nodes` (in graph order) up to `output`.

    The hidden axis is `axes[i]` of `ups[i]` and `axis` of `output`.
    """

    ups: tuple[fx.Node, ...]
    axes: tuple[int, ...]
    nodes: tuple[fx.Node, ...]
    output: fx.Node
    axis: int

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        inside = {*self.nodes, *self.ups}
        others = (source for node in self.nodes for source in node.all_input_nodes if source not in inside)
        return tuple(dict.fromkeys((*self.ups, *others)))


@dataclass(frozen=True)
class Finding:
    """What a region computes. `gate` is the index of the projection that goes through the activation (None: plain)."""

    activation: str
    fusion: Fusion = Fusion.SEPARATE
    gate: int | None = None


class ProbeError(ValueError):
    """The region is not what its structure promised; the message says how."""


Values = dict[fx.Node, Any]


def probe(view: GraphView, region: Region, hidden: int) -> Finding:
    """Checks that hidden units are independent and identifies layout, gate and activation, or raises `ProbeError`."""
    runner = Runner(view, region, flat=_keeps_last_axis(view, region))
    widths = [shape_of(up)[axis] for up, axis in zip(region.ups, region.axes, strict=True)]
    if widths not in ([hidden], [2 * hidden], [hidden, hidden]):
        raise ProbeError(f"projections of widths {widths} do not form a plain or gated FFN of {hidden} neurons")
    maps = _channel_maps(runner, hidden)
    if len(widths) == 2:
        return _identify_gated(runner, hidden, {0: Fusion.SEPARATE, 1: Fusion.SEPARATE})
    if widths == [hidden]:
        return _identify_plain(runner)
    return _identify_gated(runner, hidden, _fused_layouts(maps, hidden))


@dataclass(frozen=True)
class Runner:
    """Evaluates a region on values whose hidden axis comes last, for the projections and for the result.

    When `flat`, views only regroup tokens, so that two tokens stand for all.
    """

    view: GraphView
    region: Region
    flat: bool

    def inputs(self, draw: Callable[[tuple[int, ...]], Tensor]) -> Values:
        """A value for every input of the region; `draw` makes the float64 ones."""
        return {node: self._input(node, draw) for node in self.region.inputs}

    def _input(self, node: fx.Node, draw: Callable[[tuple[int, ...]], Tensor]) -> Any:
        value, known = fake_value(node), known_constant(self.view, node)
        if known is not None:
            return known.double().cpu() if known.is_floating_point() else known.cpu()
        if isinstance(value, torch.SymFloat):
            return float_hint(value)
        if not isinstance(value, Tensor):
            return hint(value) if isinstance(value, (int, torch.SymInt)) else value
        shape = self._shape(node)
        return draw(shape) if value.is_floating_point() else torch.ones(shape, dtype=value.dtype)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        shape = shape_of(node)
        if not self.flat or len(shape) < 2:
            return (
                _hidden_last(shape, self.region.axes[self.region.ups.index(node)]) if node in self.region.ups else shape
            )
        varies = node in self.region.ups or any(size != 1 for size in shape[:-1])
        return (1,) * (len(shape) - 2) + (_TOKENS if varies else 1, shape[-1])

    def __call__(self, values: Values) -> Tensor:
        region = self.region
        env = dict(values)
        for up, axis in zip(region.ups, region.axes, strict=True):
            env[up] = values[up].movedim(-1, axis)
        for node in region.nodes:
            env[node] = self._call(node, env)
        result = env[region.output]
        assert isinstance(result, Tensor)
        return result.movedim(region.axis, -1)

    def _call(self, node: fx.Node, env: Values) -> Any:
        name = op_name(self.view, node)
        if "dropout" in name or name == "gate_hidden":
            kept = env[node.all_input_nodes[0]]
            return (kept, torch.ones_like(kept)) if name == "native_dropout" else kept
        if node.op == "call_method" and name in _CAST_METHODS:
            return env[node.all_input_nodes[0]]
        if self.flat and name in LAYOUT_OPS:
            rank = len(shape_of(node))
            return env[node.all_input_nodes[0]].reshape((1,) * (rank - 2) + (-1, shape_of(node)[-1]))
        args, kwargs = _widened(map_arg((node.args, node.kwargs), env.__getitem__))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.view.module.get_submodule(str(node.target))(*args, **kwargs)


def _hidden_last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def known_constant(view: GraphView, node: fx.Node) -> Tensor | None:
    """The real value of a one-element constant of the graph, such as the 0.044715 in a written-out gelu."""
    value = node.meta.get(CONSTANT_KEY)
    if value is None and node.op == "get_attr":
        value = attribute(view.module, str(node.target))
    usable = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.numel() == 1
    return value if usable else None


def attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _widened(arguments: Any) -> Any:
    """Casts inside the region become casts to float64 on the CPU."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return torch.device("cpu") if isinstance(value, torch.device) else value

    return map_aggregate(arguments, widen)


def _keeps_last_axis(view: GraphView, region: Region) -> bool:
    ends = [*zip(region.ups, region.axes, strict=True), (region.output, region.axis)]
    hidden_is_last = all(axis == len(shape_of(node)) - 1 > 0 for node, axis in ends)
    layout = [node for node in region.nodes if op_name(view, node) in LAYOUT_OPS]
    return hidden_is_last and all(_regroups_tokens(view, node) for node in layout)


def _regroups_tokens(view: GraphView, node: fx.Node) -> bool:
    shape, source = shape_of(node), shape_of(node.all_input_nodes[0])
    return op_name(view, node) in REGROUP_OPS and len(shape) > 1 and shape[-1] == source[-1]


def _channel_maps(runner: Runner, hidden: int) -> list[tuple[int, int]]:
    """(channel, hidden unit it reaches) pairs, found by perturbing one channel of one token at a time.

    Small positive values keep clipped and saturating activations alive while they are perturbed.
    """
    generator = torch.Generator().manual_seed(0)
    values = runner.inputs(lambda shape: 0.1 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64))
    base = runner(values)
    pairs = []
    for up in runner.region.ups:
        width = values[up].shape[-1]
        for channel in torch.linspace(0, width - 1, min(width, _SAMPLED_CHANNELS)).long().tolist():
            place = (0,) * (values[up].dim() - 1) + (channel,)
            pairs.append((channel, _unit_reached(runner, values, base, up, place)))
    wrong = [(c, unit) for c, unit in pairs if unit not in (c, c - hidden, c // 2)]
    if wrong:
        channel, unit = wrong[0]
        raise ProbeError(f"output {channel} of a projection feeds hidden unit {unit}: the hidden units are reordered")
    return pairs


def _unit_reached(runner: Runner, values: Values, base: Tensor, up: fx.Node, place: tuple[int, ...]) -> int:
    moved = torch.empty(0, base.dim())
    for nudge in _NUDGES:
        changed = values[up].clone()
        changed[place] += nudge
        moved = (runner({**values, up: changed}) != base).nonzero()
        if len(moved):
            break
    units = sorted(set(moved[:, -1].tolist()))
    if not units:
        raise ProbeError(f"output {place[-1]} of a projection reaches no hidden unit")
    if len(units) > 1:
        raise ProbeError(f"hidden units interact: output {place[-1]} of a projection reaches {len(units)} of them")
    if len(moved) > 1:
        raise ProbeError(f"tokens interact: output {place[-1]} of one token reaches {len(moved)} tokens")
    return int(units[0])


def _fused_layouts(maps: list[tuple[int, int]], hidden: int) -> dict[int, Fusion]:
    """For a projection that holds both halves: the layouts its channel map allows, by which part is the gate."""
    if all(unit == channel % hidden for channel, unit in maps):
        return {0: Fusion.GATE_THEN_UP, 1: Fusion.UP_THEN_GATE}
    if all(unit == channel // 2 for channel, unit in maps):
        return {0: Fusion.INTERLEAVED_GATE_FIRST, 1: Fusion.INTERLEAVED_UP_FIRST}
    raise ProbeError("the two halves of the fused projection are neither consecutive nor interleaved")


def _signed_inputs(runner: Runner) -> Values:
    """Half of the values where activations bend, half far out, where clipped ones differ from their namesakes."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        far = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.5
        return torch.randn(shape, generator=generator, dtype=torch.float64) * torch.where(far, 30.0, 2.0)

    return runner.inputs(draw)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


def _identify_plain(runner: Runner) -> Finding:
    values = _signed_inputs(runner)
    (up,) = runner.region.ups
    result = runner(values).reshape(values[up].shape)
    matching = (name for name, act in ACTIVATIONS.items() if _same(act.apply(values[up]), result))
    return Finding(next(matching, UNKNOWN))


def _identify_gated(runner: Runner, hidden: int, layouts: Mapping[int, Fusion]) -> Finding:
    values = _signed_inputs(runner)
    parts = _parts(runner, values, hidden, next(iter(layouts.values())))
    result = runner(values).reshape(parts[0].shape)
    for (name, act), gate in itertools.product(ACTIVATIONS.items(), layouts):
        if _same(act.apply(parts[gate]) * parts[1 - gate], result):
            return Finding(name, layouts[gate], gate)
    for gate, fusion in layouts.items():
        if _is_linear_in(runner, values, hidden, fusion, 1 - gate):
            return Finding(UNKNOWN, fusion, gate)
    raise ProbeError("its two projections are combined in a way that is neither plain nor gated")


_INTERLEAVED = (Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST)


def _parts(runner: Runner, values: Values, hidden: int, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """The two F-wide operands, as views into `values`."""
    ups = runner.region.ups
    if fusion is Fusion.SEPARATE:
        return values[ups[0]], values[ups[1]]
    whole = values[ups[0]]
    if fusion in _INTERLEAVED:
        return whole[..., ::2], whole[..., 1::2]
    return whole[..., :hidden], whole[..., hidden:]


def _is_linear_in(runner: Runner, values: Values, hidden: int, fusion: Fusion, part: int) -> bool:
    doubled = {node: value.clone() if node in runner.region.ups else value for node, value in values.items()}
    _parts(runner, doubled, hidden, fusion)[part].mul_(2)
    return _same(runner(doubled), 2 * runner(values))
