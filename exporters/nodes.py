"""Finishing the `SparseFFN` nodes of an ONNX graph: names, stored weights, the functions that define them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.optimizer import fold_constants

from lte_compile.exporters import schema
from lte_compile.exporters.function import Variant, sparse_ffn_function

_BIASES = tuple(name for name in schema.INPUT_NAMES if name.startswith("b_"))


@dataclass(frozen=True, kw_only=True)
class SparseNode:
    """One `SparseFFN` node as written."""

    name: str
    activation: str
    gated: bool
    width: int
    neurons: int
    experts: int
    expert_size: int
    threshold: float


def sparse_nodes(model: ir.Model) -> list[ir.Node]:
    """Every `SparseFFN` node, in execution order."""
    return [node for node in model.graph if node.domain == schema.DOMAIN and node.op_type == schema.OP_TYPE]


def name_nodes(model: ir.Model) -> None:
    """Name each node after its site: the module path that the up and the down weight share."""
    seen: Counter[str] = Counter()
    for node in sparse_nodes(model):
        site = _site_name(node)
        node.name = f"{site}#{seen[site]}" if seen[site] else site
        seen[site] += 1


def _site_name(node: ir.Node) -> str:
    origins = [_origin(_input(node, name)) for name in ("w_up", "w_down")]
    if None in origins:
        return str(node.name)
    paths = [str(name).rpartition(".")[0].split(".") for name in origins]
    shared = []
    for left, right in zip(*paths, strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared) or str(node.name)


def _input(node: ir.Node, name: str) -> ir.Value | None:
    index = schema.INPUT_NAMES.index(name)
    return node.inputs[index] if index < len(node.inputs) else None


def _origin(value: ir.Value | None) -> str | None:
    """Name of the initializer that `value` is, or is computed from."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.inputs else None
    return None if value is None else value.name


def bake_weights(model: ir.Model) -> None:
    """Compute every weight input of the nodes now, so that the file holds it once, in the layout of schema.py.

    Projections that a model stores transposed (the down-projection, GPT-2's Conv1D) or as slices of one parameter
    (fused gate and up) arrive as small chains over an initializer.
    """
    CommonSubexpressionEliminationPass()(model)  # layers that share weights keep sharing what is computed from them
    inputs = [
        (node, index, chain, f"{_origin(value)}.{schema.INPUT_NAMES[index]}")
        for node in sparse_nodes(model)
        for index, value in enumerate(node.inputs)
        if index > 0 and (chain := _chain(value))
    ]
    foldable = {link for _, _, chain, _ in inputs for link in chain}
    fold_constants(model, should_fold=lambda node: node in foldable)
    for node, index, _, name in inputs:
        baked = node.inputs[index]
        if baked is not None and baked.is_initializer():
            baked.name = name


def _chain(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that compute `value` out of initializers alone; empty if it depends on anything else."""
    nodes: list[ir.Node] = []
    pending = [value]
    while pending:
        current = pending.pop()
        if current is None or current.is_initializer():
            continue
        producer = current.producer()
        if producer is None:  # an input of the graph
            return []
        nodes.append(producer)
        pending += producer.inputs
    return nodes


def attach_functions(model: ir.Model, opset: int) -> None:
    """Give the model the function of each kind of `SparseFFN` in it; overloads only where there are several kinds."""
    nodes = sparse_nodes(model)
    variants = {node: _variant(node) for node in nodes}
    kinds = sorted(set(variants.values()))
    for kind in kinds:
        overload = kind.overload if len(kinds) > 1 else ""
        function = ir.serde.deserialize_function(sparse_ffn_function(kind, opset=opset, overload=overload))
        model.functions[function.identifier()] = function
        for node in nodes:
            if variants[node] == kind:
                node.overload = overload
    if nodes:
        model.graph.opset_imports[schema.DOMAIN] = schema.VERSION


def _variant(node: ir.Node) -> Variant:
    described = describe(node)
    return Variant(
        activation=described.activation,
        gated=described.gated,
        biases=tuple(name for name in _BIASES if _input(node, name) is not None),
        ragged=described.neurons % described.expert_size != 0,
        router_input=_input(node, "x_router") is not None,
    )


def describe(node: ir.Node) -> SparseNode:
    """What the node's attributes and weight shapes say."""
    up, router = _input(node, "w_up"), _input(node, "w_router")
    if up is None or up.shape is None or router is None or router.shape is None:
        raise RuntimeError(f"{node.name}: the weights of a SparseFFN have no static shape")
    neurons, width = (int(size) for size in up.shape)  # type: ignore[arg-type]
    attributes = node.attributes
    return SparseNode(
        name=str(node.name),
        activation=attributes["activation"].as_string(),
        gated=bool(attributes["gated"].as_int()),
        width=width,
        neurons=neurons,
        experts=int(router.shape[0]),  # type: ignore[arg-type]
        expert_size=attributes["expert_size"].as_int(),
        threshold=attributes["threshold"].as_float(),
    )
