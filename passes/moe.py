"""Experts a model already has: banks, parameters that stack one matrix (or bias) per expert along their first axis.

A bank is read whole by a grouped or batched product, or one expert's part is picked from it: by a number in a loop over
experts, or by the expert each token was sent to.
"""

from __future__ import annotations

import torch.fx as fx

from lte_compile.passes.dataflow import CAST_OPS, REGROUP_OPS, TRANSPOSE_OPS, GraphView, is_tensor, op_name, shape_of

PICK_OPS = frozenset(("index", "index_select", "select", "getitem"))
_MATRIX_BANK_RANK = 3  # [experts, out, in] or [experts, in, out]


def picked_from(view: GraphView, node: fx.Node) -> fx.Node | None:
    """The stack of parameters that `node` is a part of, picked along the first axis; None when it is something else."""
    while op_name(view, node) in CAST_OPS | TRANSPOSE_OPS:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node = source
    if op_name(view, node) not in PICK_OPS or not is_tensor(node):
        return None
    stack = node.args[0]
    if not isinstance(stack, fx.Node) or stack not in view.constants or not is_tensor(stack):
        return None
    return stack if _picks_first_axis(view, node, stack) else None


def _picks_first_axis(view: GraphView, node: fx.Node, stack: fx.Node) -> bool:
    """What lies behind the first axis is whole: one part, or one per token, of the stacked tensors."""
    if op_name(view, node) in ("select", "index_select") and node.args[1] != 0:
        return False
    inner = shape_of(stack)[1:]
    return bool(inner) and shape_of(node)[-len(inner) :] == inner


def bias_bank(view: GraphView, node: fx.Node, experts: int, width: int) -> str | None:
    """The parameter [experts, width] whose rows `node` holds, all or one for each token; None if it is none."""
    while (name := view.parameter_name(node)) is None:
        source = node.args[0] if node.args else None
        if op_name(view, node) not in CAST_OPS | REGROUP_OPS | PICK_OPS or not isinstance(source, fx.Node):
            return None
        node = source
    return name if shape_of(node) == (experts, width) else None


def bank_size(weight: fx.Node, stack: fx.Node | None) -> int:
    """How many matrices a weight, picked from `stack` if given, stacks; 1 for a matrix, also of a 1x1 convolution."""
    shape = shape_of(weight if stack is None else stack)
    is_matrix = stack is None and all(size == 1 for size in shape[2:])
    return 1 if is_matrix or len(shape) != _MATRIX_BANK_RANK else shape[0]
