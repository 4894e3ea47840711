"""Readers of a value that an in-place op changed are made to read the op's result, which is the same tensor.

Dynamo and symbolic_trace write `h = linear(x); h.relu_(); linear(h)` as the program does, so that the data flow from
the op to the last reader is nowhere in the graph. (torch.export has the reader read the op already.)
"""

from __future__ import annotations

import torch.fx as fx

_OPERATORS = frozenset(("iadd", "isub", "imul", "itruediv"))


def read_results_of_in_place_ops(module: fx.GraphModule) -> None:
    """Edits the graph without changing what it computes."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    for node in order:
        changed = node.args[0] if node.args else None
        if isinstance(changed, fx.Node) and _is_in_place(module, node):
            later = {user for user in changed.users if order[user] > order[node]}
            changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _is_in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False) is True
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    underscored = name.endswith("_") and not name.endswith("__")
    return underscored or name in _OPERATORS or node.kwargs.get("inplace") is True
