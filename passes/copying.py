"""Copying a graph without copying the tensors it works on."""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from lte_compile.passes.ir import CapturedGraph


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same parameters, buffers and submodules. Node names stay."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    graph._codegen = module.graph._codegen  # how torch.export's flat arguments map to the caller's
    copy = fx.GraphModule(module, graph)
    copy.meta = dict(module.meta)
    for node, copied in copies.items():
        copied.name = node.name  # fx renames what shadows a builtin; torch.export's signature knows the old name
    return copy


def copy_captured(graph: CapturedGraph) -> CapturedGraph:
    """A captured graph whose nodes can be changed while the given one stays."""
    return replace(graph, module=copy_graph_module(graph.module))
