"""Passes over a torch.export.ExportedProgram: the program that comes back is as valid as the one given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.fx as fx
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputSpec, TensorArgument

from lte_compile.passes.copying import copy_graph_module
from lte_compile.passes.dataflow import CONSTANT_KEY
from lte_compile.passes.ir import CapturedGraph, Pass, PassReport
from lte_compile.passes.pipeline import run_pipeline


def rewrite_exported(
    program: ExportedProgram, passes: Sequence[Pass], *, max_rewrites: int | None = None
) -> tuple[ExportedProgram, tuple[PassReport, ...]]:
    """Run `passes` over a copy of the program's graph.

    Parameters, buffers, inputs, outputs and range constraints stay; tensors are shared with `program`, whose own graph
    is left as it was. Raises what `run_pipeline` raises.
    """
    module = copy_graph_module(program.graph_module)
    reports = run_pipeline(captured_program(program, module), passes, max_rewrites=max_rewrites)
    rewritten = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=_with_outputs(program.graph_signature, module.graph),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return rewritten, reports


def captured_program(program: ExportedProgram, module: fx.GraphModule) -> CapturedGraph:
    """`module`, the program's graph module or a copy of it, with parameters named by the program's signature."""
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants}
    for node in module.graph.find_nodes(op="placeholder"):
        value = program.constants.get(names.get(node.name, ""))
        if isinstance(value, Tensor):
            node.meta[CONSTANT_KEY] = value
    first = _first_names(program)
    return CapturedGraph(module=module, parameters={n: first.get(p, p) for n, p in names.items()}, route="export")


def _first_names(program: ExportedProgram) -> dict[str, str]:
    """Tied parameters go by one name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in program.state_dict.items()}


def _with_outputs(signature: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """Outputs go by the names of the nodes that compute them now."""
    returned = graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    specs = [_renamed(spec, node) for spec, node in zip(signature.output_specs, returned, strict=True)]
    return ExportGraphSignature(input_specs=list(signature.input_specs), output_specs=specs)


def _renamed(spec: OutputSpec, node: object) -> OutputSpec:
    if isinstance(node, fx.Node) and isinstance(spec.arg, TensorArgument):
        return replace(spec, arg=TensorArgument(name=node.name))
    return spec
