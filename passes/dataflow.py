"""Reading a captured graph: shapes, op names, what is element-wise, and what depends on parameters only.

Works the same on graphs of ATen overloads (torch.export) and of torch functions, methods and modules (Dynamo,
symbolic_trace). Nothing here knows a model: ops are judged by their ATen tags, shapes and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from lte_compile.passes.ir import CapturedGraph

CONSTANT_KEY = "lte_constant"  # node.meta key: the real tensor behind a placeholder that stands for a constant
BUFFER_KEY = "lte_buffer"  # node.meta key: true where the tensor is a buffer or constant, not a parameter
BRANCH_KEY = "lte_branch"  # node.meta key: the condition on data that decides whether the node runs at all

# ATen ops that carry no `pointwise` tag and still keep every element where it is.
_KEEPS_ELEMENTS = frozenset(
    ("clone", "_to_copy", "to", "alias", "detach", "detach_", "contiguous", "copy_", "lift_fresh", "lift_fresh_copy")
    + ("native_dropout", "bernoulli", "bernoulli_", "rand_like", "empty_like", "zeros_like", "ones_like", "full_like")
    + ("fill_", "full", "scalar_tensor", "_assert_tensor_metadata")
)
# Element-wise functions that torch (some of them before 2.13) does not tag as such.
UNTAGGED_POINTWISE = frozenset(
    ("hardswish", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu", "leaky_relu_", "log_sigmoid")
    + ("log_sigmoid_forward", "threshold_", "elu_", "celu_", "gelu_", "mish_", "abs_", "masked_fill_", "fill")
)
REGROUP_OPS = frozenset(("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze"))
TRANSPOSE_OPS = frozenset(("transpose", "permute", "t", "T", "numpy_T", "mT", "swapaxes", "swapdims"))
LAYOUT_OPS = REGROUP_OPS | TRANSPOSE_OPS | {"unflatten", "movedim"}
CAST_OPS = frozenset(
    ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "type_as")
    + ("float", "half", "bfloat16", "double")
)
# Uses of a value that read its metadata, not its elements.
METADATA_OPS = frozenset(
    ("_assert_tensor_metadata", "size", "sym_size", "dim", "ndim", "shape", "numel", "sym_numel", "dtype", "device")
)


@dataclass(frozen=True, eq=False)
class GraphView:
    """A captured graph with the facts every question about it needs: node order and parameter-only nodes."""

    module: fx.GraphModule
    parameters: Mapping[str, str]
    order: Mapping[fx.Node, int]
    constants: frozenset[fx.Node]
    buffers: frozenset[str] = frozenset()  # those of `parameters` that are buffers or constants
    pointwise_cache: dict[fx.Node, bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, captured: CapturedGraph) -> GraphView:
        nodes = list(captured.module.graph.nodes)
        constants: set[fx.Node] = set()
        for node in nodes:
            if _is_constant(node, captured.parameters, constants):
                constants.add(node)
        order = {node: position for position, node in enumerate(nodes)}
        held = {node.name: bool(node.meta.get(BUFFER_KEY)) for node in nodes if node.name in captured.parameters}
        buffers = frozenset(captured.parameters[name] for name, is_buffer in held.items() if is_buffer)
        return cls(captured.module, captured.parameters, order, frozenset(constants), buffers)

    def parameter_name(self, node: fx.Node) -> str | None:
        """The parameter or buffer a placeholder or get_attr stands for."""
        if node.op not in ("placeholder", "get_attr"):
            return None
        return self.parameters.get(node.name)


def _is_constant(node: fx.Node, parameters: Mapping[str, str], known: set[fx.Node]) -> bool:
    """Depends on parameters and literals only."""
    if node.op == "placeholder":
        return node.name in parameters
    if node.op in ("get_attr", "output"):
        return node.op == "get_attr"
    return all(source in known for source in node.all_input_nodes)


def fake_value(node: fx.Node) -> Any:
    """What the tracer recorded for the node: a fake tensor, a tuple of them, a SymInt, or None."""
    value = node.meta.get("val")
    return node.meta.get("example_value") if value is None else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The node's shape with symbolic sizes replaced by the traced ones; () for what is not a tensor."""
    value = fake_value(node)
    return tuple(hint(size) for size in value.shape) if isinstance(value, Tensor) else ()


def is_tensor(node: fx.Node) -> bool:
    return isinstance(fake_value(node), Tensor)


def hint(size: int | torch.SymInt) -> int:
    """The size seen while tracing; -1 for a data-dependent size, which has none."""
    if isinstance(size, int):
        return size
    known = getattr(size.node, "hint", None)
    return int(known) if isinstance(known, int) else -1


def float_hint(value: torch.SymFloat) -> float:
    """The number seen while tracing, which torch.compile(dynamic=True) made symbolic; NaN if there is none."""
    known = getattr(value.node, "hint", None)
    return float(known) if isinstance(known, int | float) else float("nan")


def op_name(view: GraphView, node: fx.Node) -> str:
    """The op's bare name whatever the tracer wrote: aten.silu.default, F.silu, Tensor.silu and nn.SiLU are `silu`."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):  # their targets are names a model chose, such as `t` or `view`
        return node.op
    if target is getattr and isinstance(node.args[1], str):  # `weight.T` under Dynamo
        return node.args[1]
    if node.op == "call_module":
        return type(view.module.get_submodule(str(target))).__name__.lower()
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """A positional argument that may also have been passed by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


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


def is_pointwise(view: GraphView, node: fx.Node) -> bool:
    """Whether each output element depends on the input elements at its own place only, dropout included."""
    known = view.pointwise_cache.get(node)
    if known is None:
        known = view.pointwise_cache[node] = _runs_pointwise(view, node)
    return known


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def _runs_pointwise(view: GraphView, node: fx.Node) -> bool:
    """ATen overloads say it by their tags. Anything else is run again on its fake inputs to see what it dispatches."""
    name = op_name(view, node)
    if "dropout" in name:
        return "feature" not in name and name not in ("dropout1d", "dropout2d", "dropout3d")
    if isinstance(node.target, torch._ops.OpOverload) and _keeps_elements(node.target):
        return True
    value = fake_value(node)
    if not isinstance(value, Tensor) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    call = _callable(view, node)
    fakes = getattr(value, "fake_mode", None)
    if call is None or fakes is None:
        return False
    args, kwargs = map_arg((node.args, node.kwargs), fake_value)
    try:
        with fakes, _Recorder() as recorder:
            call(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # needs real data, or reads a field of a result
        return False
    return all(_keeps_elements(op) for op in recorder.ops if op.namespace != "prim")


def _keeps_elements(op: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in op.tags or op._schema.name.split("::")[1] in _KEEPS_ELEMENTS | UNTAGGED_POINTWISE


def _callable(view: GraphView, node: fx.Node) -> Callable[..., Any] | None:
    if node.op == "call_function":
        return node.target  # type: ignore[return-value]
    if node.op == "call_method":
        return _method(str(node.target))
    module = view.module.get_submodule(str(node.target))
    return None if next(module.parameters(), None) is not None else module


def _method(name: str) -> Callable[..., Any]:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    return call
