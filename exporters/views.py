"""Reshaping transposed tensors.

Attention may lay its result out so that the transpose behind it is contiguous; decomposing a traced program then turns
the reshape behind that into a view. A later step of the exporter works with another layout, in which the transpose is
not contiguous, and fails at the view (T5, whose position bias goes into the mask). A copy in between is right in either
layout. In ONNX it is Identity, which the optimizer removes.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.fx as fx
from torch.export import ExportedProgram

aten = torch.ops.aten
_RESHAPES: Final = (aten.view.default, aten.reshape.default)
_TRANSPOSES: Final = (aten.transpose.int, aten.permute.default, aten.t.default)


def copy_before_reshapes(program: ExportedProgram) -> None:
    """Copy, in place in the program, each transposed tensor that a view or reshape reads."""
    for node in list(program.graph.nodes):
        source = node.args[0] if node.target in _RESHAPES else None
        if isinstance(source, fx.Node) and source.target in _TRANSPOSES:
            node.replace_input_with(source, _contiguous_copy(program.graph, source, node))
    program.graph_module.recompile()


def _contiguous_copy(graph: fx.Graph, source: fx.Node, user: fx.Node) -> fx.Node:
    with graph.inserting_before(user):
        copy = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta = {**source.meta, "val": source.meta["val"].clone(memory_format=torch.contiguous_format)}
    return copy
