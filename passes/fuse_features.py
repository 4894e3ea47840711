"""FuseFeatures: what a two-layer router reads becomes one lte.router_features node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from lte_compile.passes.anchors import arguments, lte_nodes
from lte_compile.passes.building import Builder
from lte_compile.passes.dataflow import GraphView, argument, fake_value, op_name, shape_of
from lte_compile.passes.ir import CapturedGraph, Level, PassReport

_JOINS = ("cat", "concat", "concatenate")


@dataclass(frozen=True)
class FuseFeatures:
    """For inference: three nodes, each a launch on a GPU, become one.

        lte.sparse_ffn(x, ..., x_router=cat([x, relu(linear(x, w, b))], -1))
        ==>   lte.sparse_ffn(x, ..., x_router=lte.router_features(x, w, b))

    Only where all are of one dtype: autocast computes features in another than x.
    """

    name: ClassVar[str] = "fuse-features"
    requires: ClassVar[Level] = Level.LOWERED
    ensures: ClassVar[Level] = Level.LOWERED
    limit: int | None = None

    def __call__(self, graph: CapturedGraph) -> PassReport:
        view, changes = GraphView.of(graph), list[str]()
        for node in list(lte_nodes(graph, "sparse_ffn")):
            joined = arguments(node)["x_router"]
            found = _features(view, joined) if isinstance(joined, fx.Node) else None
            if found is None or (self.limit is not None and len(changes) >= self.limit):
                continue
            fused = Builder(graph, joined).call(torch.ops.lte.router_features.default, *found)
            joined.replace_all_uses_with(fused)
            changes.append(f"{joined.name}, which {node.name}'s router reads, became {fused.name}")
        return PassReport(name=self.name, changes=tuple(changes), refusals=())


def _features(view: GraphView, joined: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, weight and bias of [x, relu(x W^T + b)]; None for anything else."""
    parts, axis = argument(joined, 0, "tensors", default=()), argument(joined, 1, "dim", default=0)
    if op_name(view, joined) not in _JOINS or not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    if axis not in (-1, len(shape_of(joined)) - 1):
        return None
    layer = _argument_of(view, parts[1], "relu")
    x = None if layer is None else _argument_of(view, layer, "linear")
    if layer is None or x is None or x is not parts[0]:
        return None
    weight, bias = argument(layer, 1, "weight"), argument(layer, 2, "bias")
    values = [fake_value(node) for node in (x, weight, bias, layer, joined) if isinstance(node, fx.Node)]
    is_one_dtype = len(values) == 5 and len({value.dtype for value in values}) == 1
    return (x, weight, bias) if is_one_dtype else None


def _argument_of(view: GraphView, node: Any, name: str) -> fx.Node | None:
    """What a node calls the op on, if it calls that op."""
    if not isinstance(node, fx.Node) or op_name(view, node) != name:
        return None
    given = argument(node, 0, "input")
    return given if isinstance(given, fx.Node) else None
