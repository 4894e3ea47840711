"""Linear layers in a captured graph, however they are written: linear, addmm, mm, matmul, 1x1 convolution, einsum.

A node counts when exactly one operand depends on parameters only. Shape letters: D inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.fx as fx
from torch import nn

from lte_compile.passes.dataflow import CAST_OPS, TRANSPOSE_OPS, GraphView, argument, is_tensor, op_name, shape_of
from lte_compile.passes.ir import WeightLayout
from lte_compile.passes.moe import PICK_OPS, bank_size, bias_bank, picked_from

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer: `result = data @ weight + bias` along `axis` of data and `out_axis` of the result.

    `node` does the product; `result` is the node after a separately added bias, else `node` itself. `problem` says
    why its weight cannot be an FFN's, None when it can. `experts` counts the matrices its weight stacks.

    A part of a layer (passes/parts.py) has `whole`, and `start` says where its rows or columns begin. A layer with
    low-rank updates (passes/low_rank.py) has their two `factors` each, the one that reads `data` first. `readers` are
    what else reads `data` for the layer: the nodes of its updates, the `cat` in front of a part.
    """

    node: fx.Node
    result: fx.Node
    data: fx.Node
    axis: int
    out_axis: int
    in_width: int
    out_width: int
    weight: str | None
    bias: str | None
    layout: WeightLayout
    problem: str | None = None
    experts: int = 1
    start: int = 0
    whole: Linear | None = None
    readers: tuple[fx.Node, ...] = ()
    factors: tuple[tuple[Linear, Linear], ...] = ()

    @property
    def label(self) -> str:
        return self.weight or self.node.name

    @property
    def is_last_axis(self) -> bool:
        """Reads and writes the last axis, as nn.Linear does."""
        return self.axis == len(shape_of(self.data)) - 1 and self.out_axis == len(shape_of(self.result)) - 1


@dataclass(frozen=True)
class _Operands:
    """A product before its parameters are named: axes may be negative, `swapped` is true for a [in, out] weight."""

    data: object
    weight: object
    bias: object = None
    axis: int = -1
    out_axis: int = -1
    in_out: bool = False


def find_linears(view: GraphView) -> tuple[Linear, ...]:
    """Every linear-like node, in graph order."""
    found = (_linear_of(view, node) for node in view.order)
    return tuple(linear for linear in found if linear is not None)


def _linear_of(view: GraphView, node: fx.Node) -> Linear | None:
    if node.op == "call_module":
        return _linear_module(view, node)
    if node.op not in ("call_function", "call_method") or not is_tensor(node):
        return None
    reader = _READERS.get(op_name(view, node))
    operands = reader(view, node) if reader else None
    if operands is None or not isinstance(operands.data, fx.Node) or operands.data in view.constants:
        return None
    return _with_added_bias(view, _named(view, node, operands))


def _linear_module(view: GraphView, node: fx.Node) -> Linear | None:
    """nn.Linear and 1x1 convolutions that symbolic_trace kept as modules."""
    module, data = view.module.get_submodule(str(node.target)), node.args[0]
    if not isinstance(data, fx.Node):
        return None
    if isinstance(module, nn.Linear):
        axis, widths = len(shape_of(data)) - 1, (module.in_features, module.out_features)
    elif isinstance(module, _CONVOLUTIONS) and _is_pointwise_convolution(module.weight.shape, data, node):
        axis, widths = 1, (module.in_channels, module.out_channels)
    else:
        return None
    bias = None if module.bias is None else f"{node.target}.bias"
    return Linear(node, node, data, axis, axis, *widths, f"{node.target}.weight", bias, WeightLayout.OUT_IN)


def _named(view: GraphView, node: fx.Node, operands: _Operands) -> Linear:
    """Resolves axes and parameter names; what does not resolve becomes the linear's `problem`."""
    data, weight = operands.data, operands.weight
    assert isinstance(data, fx.Node)
    assert isinstance(weight, fx.Node)
    axis, out_axis = operands.axis % len(shape_of(data)), operands.out_axis % len(shape_of(node))
    weight_name, flipped = _parameter(view, weight, picks=True)
    experts = bank_size(weight, picked_from(view, weight))
    bias_name = _parameter(view, operands.bias, picks=experts > 1)[0] if isinstance(operands.bias, fx.Node) else None
    problem = None
    if weight_name is None or (experts == 1 and (_is_stack(weight) or picked_from(view, weight) is not None)):
        problem = "its weight is not a parameter but computed in the graph"
    elif isinstance(operands.bias, fx.Node) and bias_name is None:
        problem = "its bias is not a parameter but computed in the graph"
    return Linear(
        node=node,
        result=node,
        data=data,
        axis=axis,
        out_axis=out_axis,
        in_width=shape_of(data)[axis],
        out_width=shape_of(node)[out_axis],
        weight=weight_name,
        bias=bias_name,
        layout=WeightLayout.IN_OUT if operands.in_out != flipped else WeightLayout.OUT_IN,
        problem=problem,
        experts=experts,
    )


def _is_stack(weight: fx.Node) -> bool:
    """More than a matrix, which may have axes of size 1 behind it as a 1x1 convolution's has."""
    return any(size != 1 for size in shape_of(weight)[2:])


def parameter_behind(view: GraphView, node: fx.Node) -> str | None:
    """The parameter a node is, seen through casts and transposes; None when it is computed."""
    return _parameter(view, node)[0]


def _parameter(view: GraphView, node: fx.Node, picks: bool = False) -> tuple[str | None, bool]:
    """Name, and whether the last two axes are swapped on the way. `picks` looks through the picking of an expert."""
    flipped = False
    while (name := view.parameter_name(node)) is None:
        op, source = op_name(view, node), node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None, flipped
        if op in TRANSPOSE_OPS:
            flipped ^= shape_of(node) != shape_of(source) or _swaps(node)
        elif op not in CAST_OPS and not (picks and op in PICK_OPS and picked_from(view, node) is not None):
            return None, flipped
        node = source
    return name, flipped


def _swaps(node: fx.Node) -> bool:
    """Whether a transpose of a square matrix really swaps: permute(0, 1) and transpose(0, 0) do not."""
    dims = [dim for arg in node.args[1:] for dim in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if len(dims) != 2:
        return True
    first, second = (int(dim) % 2 for dim in dims)  # type: ignore[arg-type]
    return (first, second) == (1, 0) or (first != second and "permute" not in str(node.target))


def _with_added_bias(view: GraphView, linear: Linear) -> Linear:
    """`x @ W` whose only user adds a parameter along the outputs is one linear with a bias."""
    users = list(linear.node.users)
    if linear.bias is not None or len(users) != 1 or op_name(view, users[0]) not in ("add", "add_"):
        return linear
    add = users[0]
    others = [source for source in add.all_input_nodes if source is not linear.node]
    if len(others) != 1:
        return linear
    name = _added_parameter(view, linear, others[0])
    on_last_axis = linear.out_axis == len(shape_of(linear.node)) - 1 and shape_of(add) == shape_of(linear.node)
    if name is None or not on_last_axis or add.kwargs.get("alpha", 1) != 1:
        return linear
    return replace(linear, result=add, bias=name)


def _added_parameter(view: GraphView, linear: Linear, node: fx.Node) -> str | None:
    if linear.experts > 1:
        return bias_bank(view, node, linear.experts, linear.out_width)
    is_vector = node in view.constants and shape_of(node) == (linear.out_width,)
    return parameter_behind(view, node) if is_vector else None


def _constant(view: GraphView, node: object, rank: int = 2) -> bool:
    """Depends on parameters only, but for which expert's part of them it is."""
    if not isinstance(node, fx.Node) or len(shape_of(node)) < rank:
        return False
    return node in view.constants or picked_from(view, node) is not None


def _read_linear(view: GraphView, node: fx.Node) -> _Operands | None:
    weight = argument(node, 1, "weight")
    if not _constant(view, weight):
        return None
    return _Operands(argument(node, 0, "input"), weight, argument(node, 2, "bias"))


def _read_addmm(view: GraphView, node: fx.Node) -> _Operands | None:
    bias, data, weight = (argument(node, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
    scaled = node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1
    if scaled or not _constant(view, weight) or not _constant(view, bias, rank=1):
        return None
    return _Operands(data, weight, bias, in_out=True)


def _read_matmul(view: GraphView, node: fx.Node) -> _Operands | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "mat2", "other")
    if _constant(view, right):
        return _Operands(left, right, in_out=True)
    if _constant(view, left):  # W @ x: the outputs are the second to last axis
        return _Operands(right, left, axis=-2, out_axis=-2)
    return None


def _read_grouped(view: GraphView, node: fx.Node) -> _Operands | None:
    weight = argument(node, 1, "mat2", "mat_b")
    return _Operands(argument(node, 0, "input", "mat_a"), weight, in_out=True) if _constant(view, weight) else None


def _read_conv(view: GraphView, node: fx.Node) -> _Operands | None:
    """A 1x1 convolution of stride 1 and one group is a linear layer over axis 1."""
    data, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if not _constant(view, weight, rank=3) or not isinstance(data, fx.Node):
        return None
    if not _is_pointwise_convolution(shape_of(weight), data, node):
        return None
    return _Operands(data, weight, argument(node, 2, "bias"), axis=1, out_axis=1)


def _is_pointwise_convolution(weight_shape: Sequence[int], data: fx.Node, result: fx.Node) -> bool:
    _, in_channels, *kernel = weight_shape
    shape = shape_of(data)
    batched = len(shape) == len(weight_shape)
    return (
        batched and all(size == 1 for size in kernel) and in_channels == shape[1] and shape_of(result)[2:] == shape[2:]
    )


def _read_einsum(view: GraphView, node: fx.Node) -> _Operands | None:
    equation = node.args[0]
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    operands = [operand for operand in given if isinstance(operand, fx.Node)]
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, output = equation.replace(" ", "").replace("...", "_").split("->")
    labels = inputs.split(",")
    weight_at = [index for index in (0, 1) if _constant(view, operands[index])]
    if len(weight_at) != 1 or "_" in labels[weight_at[0]] or len(labels[weight_at[0]]) not in (2, 3):
        return None
    return _einsum_operands(operands, labels, output, weight_at[0])


def _einsum_operands(operands: list[fx.Node], labels: list[str], output: str, weight_at: int) -> _Operands | None:
    weight, data = labels[weight_at][-2:], labels[1 - weight_at]  # a bank's first axis counts experts
    contracted = [label for label in weight if label in data and label not in output]
    produced = [label for label in weight if label not in data and label in output]
    if len(contracted) != 1 or len(produced) != 1:
        return None
    return _Operands(
        operands[1 - weight_at],
        operands[weight_at],
        axis=_axis(data, contracted[0]),
        out_axis=_axis(output, produced[0]),
        in_out=weight[0] == contracted[0],
    )


def _axis(labels: str, label: str) -> int:
    """The label's axis, counted from the side that an ellipsis (written `_`) does not blur."""
    place = labels.index(label)
    return place - len(labels) if "_" in labels[:place] else place


_READERS: dict[str, Callable[[GraphView, fx.Node], _Operands | None]] = {
    "linear": _read_linear,
    "addmm": _read_addmm,
    "mm": _read_matmul,
    "matmul": _read_matmul,
    "__matmul__": _read_matmul,
    "bmm": _read_matmul,
    "_grouped_mm": _read_grouped,
    "grouped_mm": _read_grouped,
    "grouped_mm_fallback": _read_grouped,  # transformers' own op for its expert banks
    "conv1d": _read_conv,
    "conv2d": _read_conv,
    "conv3d": _read_conv,
    "convolution": _read_conv,
    "einsum": _read_einsum,
}
