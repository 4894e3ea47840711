"""Running an element-wise region on its own, on random float64 data in place of what its projections would give.

Nothing of the model is needed but the graph, so this works for weights on the meta device as well. Dropout and the
anchor `lte::gate_hidden` count as the identity. Two tokens stand for all where the region allows it (`Tokens`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate, map_arg

from lte_compile.passes.dataflow import (
    CONSTANT_KEY,
    REGROUP_OPS,
    TRANSPOSE_OPS,
    GraphView,
    argument,
    fake_value,
    float_hint,
    hint,
    is_tensor,
    op_name,
    shape_of,
)

_CAST_METHODS = ("float", "half", "bfloat16", "double", "type_as")
_VIEWS = REGROUP_OPS | {"unflatten"}
_MOVES = TRANSPOSE_OPS | {"movedim"}
_FILLS = ("masked_fill", "masked_fill_")
_TOKENS = 2  # enough to see one token reach another

Values = dict[fx.Node, Any]
Draw = Callable[[tuple[int, ...]], Tensor]


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

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(shape_of(up)[axis] for up, axis in zip(self.ups, self.axes, strict=True))


class Tokens(Enum):
    """How many tokens a region is run on: its arithmetic does not care, but views name sizes."""

    FLAT = auto()  # views regroup tokens and leave what is behind them alone: two tokens, views rewritten to match
    FEW = auto()  # no views: every token axis shrinks to two
    ALL = auto()  # the traced sizes


@dataclass(frozen=True, eq=False)
class Runner:
    """Evaluates a region on values whose hidden axis comes last, for the projections and for the result."""

    view: GraphView
    region: Region

    def inputs(self, draw: Draw) -> Values:
        """A value for every input of the region; `draw` makes the float64 ones."""
        return {node: self._input(node, draw) for node in self.region.inputs}

    def __call__(self, values: Values) -> Tensor:
        """The hidden value that the down-projection would read, [..., F]."""
        region = self.region
        env = dict(values)
        for up, axis in zip(region.ups, region.axes, strict=True):
            env[up] = values[up].movedim(-1, axis).clone()  # the region may work in place: `add_`, `relu_`
        for node in region.nodes:
            env[node] = self._call(node, env)
        result = env[region.output]
        assert isinstance(result, Tensor)
        return result.movedim(region.axis, -1)

    @cached_property
    def tokens(self) -> Tokens:
        names = {op_name(self.view, node) for node in self.region.nodes}
        carriers = [node for node in (*self.region.ups, *self.region.nodes) if is_tensor(node)]
        if not names & _MOVES and all(self._leading(node) is not None for node in carriers):
            return Tokens.FLAT
        return Tokens.ALL if names & _VIEWS else Tokens.FEW

    @cached_property
    def _num_tokens(self) -> int:
        return math.prod(shape_of(self.region.ups[0])) // self.region.widths[0]

    def _leading(self, node: fx.Node) -> int | None:
        """How many leading axes number the tokens and nothing else; None where an end's hidden axis is among them."""
        shape = shape_of(node)
        ends = {**dict(zip(self.region.ups, self.region.axes, strict=True)), self.region.output: self.region.axis}
        most = ends.get(node, len(shape) - 1)
        return next((k for k in range(most, -1, -1) if math.prod(shape[:k]) == self._num_tokens), None)

    def _input(self, node: fx.Node, draw: Draw) -> Any:
        value, known = fake_value(node), known_constant(self.view, node)
        if known is not None:
            return known.double().cpu() if known.is_floating_point() else known.cpu()
        if isinstance(value, torch.SymFloat):
            return float_hint(value)
        if not isinstance(value, Tensor):
            return hint(value) if isinstance(value, (int, torch.SymInt)) else value
        shape = self._shape(node)
        if value.is_floating_point():
            return draw(shape)
        fill = 0 if self._marks_what_is_filled(node) else 1
        return torch.full(shape, fill, dtype=value.dtype)

    def _marks_what_is_filled(self, node: fx.Node) -> bool:
        """Masks are drawn so that hidden values pass them: all true, but for masked_fill's, which say what goes."""
        fills = (user for user in self.region.nodes if op_name(self.view, user) in _FILLS)
        return any(argument(user, 1, "mask") is node for user in fills)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape a value of `node` is drawn in; the hidden axis of a projection comes last."""
        shape = shape_of(node)
        if self.tokens is Tokens.FLAT:
            return self._flat_shape(node)
        if self.tokens is Tokens.FEW:
            units = {1, *self.region.widths, shape_of(self.region.output)[self.region.axis]}
            shape = tuple(size if size in units else _TOKENS for size in shape)
        if node not in self.region.ups:
            return shape
        axis = self.region.axes[self.region.ups.index(node)]
        return (*shape[:axis], *shape[axis + 1 :], shape[axis])

    def _flat_shape(self, node: fx.Node) -> tuple[int, ...]:
        """All token axes but the last become 1, the last becomes two; a side input follows the node that reads it."""
        shape = shape_of(node)
        carrier = node if node in self.region.ups else next(n for n in self.region.nodes if node in n.all_input_nodes)
        behind = len(shape_of(carrier)) - (self._leading(carrier) or 0)
        first = max(len(shape) - behind, 0)
        leading = [1] * first
        if first:
            leading[-1] = 1 if shape[first - 1] == 1 and node not in self.region.ups else _TOKENS
        return (*leading, *shape[first:])

    def _call(self, node: fx.Node, env: Values) -> Any:
        name = op_name(self.view, node)
        if "dropout" in name or name == "gate_hidden":
            kept = env[node.all_input_nodes[0]]
            return (kept, torch.ones_like(kept)) if name == "native_dropout" else kept
        if node.op == "call_method" and name in _CAST_METHODS:
            return env[node.all_input_nodes[0]]
        if self.tokens is Tokens.FLAT and name in _VIEWS:
            leading = self._leading(node) or 0
            tokens = (1,) * (leading - 1) + (-1,) if leading else ()
            return env[node.all_input_nodes[0]].reshape(*tokens, *shape_of(node)[leading:])
        args, kwargs = _widened(map_arg((node.args, node.kwargs), env.__getitem__))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.view.module.get_submodule(str(node.target))(*args, **kwargs)


def known_constant(view: GraphView, node: fx.Node) -> Tensor | None:
    """The real value of a one-element constant of the graph, such as the 0.044715 in a written-out gelu.

    A parameter has none: training changes it, and what is a SiLU now (x * sigmoid(beta * x), beta = 1) is none then.
    """
    value = node.meta.get(CONSTANT_KEY)
    if value is None and node.op == "get_attr":
        value = _attribute(view.module, str(node.target))
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor | nn.Parameter):
        return None
    if value.is_meta or value.numel() != 1:
        return None
    return value


def _attribute(module: fx.GraphModule, path: str) -> Any:
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
