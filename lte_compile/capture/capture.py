"""Trace a model into a graph whose parameters keep their names: `capture(model, inputs) -> CapturedGraph`.

Takes an nn.Module, an fx.GraphModule or an ExportedProgram. Modules go through torch.export; what it cannot trace
goes through Dynamo, which may break the model into several graphs (`capture_all`). Tracing happens on the model in
eval mode without gradients, and leaves training flags, configuration and random state as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.fx as fx
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lte_compile.capture.branches import mark_branches
from lte_compile.capture.dummies import dummy_inputs
from lte_compile.capture.meta import as_if_on_cpu, inputs_as_if_on_cpu
from lte_compile.passes.dataflow import BUFFER_KEY, CONSTANT_KEY, fake_value
from lte_compile.passes.inplace import read_results_of_in_place_ops
from lte_compile.passes.ir import CapturedGraph

__all__ = ["Inputs", "capture", "capture_all", "dummy_inputs"]

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


class Call(NamedTuple):
    """One call of a model: its positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def capture(model: nn.Module | ExportedProgram, example_inputs: Inputs | None = None) -> CapturedGraph:
    """The model as one graph.

    Args:
        model: an nn.Module, an fx.GraphModule or an ExportedProgram.
        example_inputs: keyword arguments (a mapping), positional arguments (a sequence) or the only argument (a
            tensor). May be left out for transformers models, whose configuration says what they read, for
            ExportedPrograms, and for GraphModules that carry fake values.

    Raises:
        ValueError: inputs are needed and not given, or the model can only be traced as several graphs.
    """
    graphs = capture_all(model, example_inputs)
    if len(graphs) != 1:
        raise ValueError(
            f"{type(model).__name__} was traced as {len(graphs)} graphs (torch.compile breaks it; "
            "TORCH_LOGS=graph_breaks says where); use capture_all, or remove the graph breaks"
        )
    return graphs[0]


def capture_all(model: nn.Module | ExportedProgram, example_inputs: Inputs | None = None) -> tuple[CapturedGraph, ...]:
    """Like `capture`, for models that need more than one graph: those between Dynamo's graph breaks."""
    if isinstance(model, ExportedProgram):
        return (capture_exported(model),)
    if isinstance(model, fx.GraphModule):
        return (capture_graph_module(model, example_inputs),)
    with as_if_on_cpu(model) as fakes:
        call = Call(*inputs_as_if_on_cpu(as_call(model, example_inputs), fakes))
        try:
            return (capture_by_export(model, call),)
        except _EXPORT_ERRORS:
            return capture_by_dynamo(model, call)


# Implementations that read the same parameters as "grouped_mm": a loop, and a copy of its matrix for each token.
_UNTRACEABLE_EXPERTS = ("eager", "batched_mm")

# What torch.export raises on code it cannot trace: data-dependent control flow (UserError and RuntimeErrors), unknown
# pytree nodes and objects it cannot copy (ValueError, TypeError, AttributeError), failed internal checks.
_EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError)


def as_call(model: nn.Module, example_inputs: Inputs | None) -> Call:
    """Normalises example inputs; without any, builds them from a transformers configuration."""
    if example_inputs is None:
        return Call((), dummy_inputs(model))
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return Call(tuple(example_inputs), {})
    raise ValueError(
        f"example_inputs is a {type(example_inputs).__name__}; give a dict of keyword arguments, "
        "a tuple of positional arguments, or one tensor"
    )


def capture_by_export(model: nn.Module, call: Call) -> CapturedGraph:
    """Non-strict torch.export: one graph with exact parameter names, or an error."""
    with _undisturbed(model):
        program = torch.export.export(model, call.args, _without_cache(model, call.kwargs), strict=False)
    return capture_exported(program, first_names(model))


def capture_exported(program: ExportedProgram, first_name: Mapping[str, str] | None = None) -> CapturedGraph:
    """An ExportedProgram's own graph; `first_name` maps each name of a tied tensor to the one to use."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    for node in program.graph.find_nodes(op="placeholder"):
        name = held.get(node.name) or constants.get(node.name)
        value = program.constants.get(name) if name else None
        if isinstance(value, Tensor):
            node.meta[CONSTANT_KEY] = value
        node.meta[BUFFER_KEY] = name is not None and node.name not in signature.inputs_to_parameters
    aliases = first_name or _tied_names(program.state_dict)
    names = {node: aliases.get(name, name) for node, name in {**held, **constants}.items()}
    return CapturedGraph(module=program.graph_module, parameters=names, route="export")


def capture_by_dynamo(model: nn.Module, call: Call) -> tuple[CapturedGraph, ...]:
    """Runs the model once under torch.compile with a backend that records graphs and executes them unchanged.

    Dynamo keeps what it compiled with the code of the functions involved, so its caches are reset before and after:
    functions the caller had compiled are compiled again when next called.
    """
    names = {id(tensor): name for name, tensor in _named_tensors(model)}
    graphs: list[CapturedGraph] = []

    def record(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        parameters = {}
        for node, value in zip(module.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
            if id(value) in names:
                parameters[node.name] = names[id(value)]
                node.meta[BUFFER_KEY] = not isinstance(value, nn.Parameter)
        read_results_of_in_place_ops(module)
        graphs.append(CapturedGraph(module=module, parameters=parameters, route="dynamo"))
        return module.forward

    torch._dynamo.reset()
    try:
        with _undisturbed(model):
            torch.compile(model, backend=record)(*call.args, **_without_cache(model, call.kwargs))
    finally:
        torch._dynamo.reset()
    if not graphs:
        raise ValueError(f"tracing {type(model).__name__} recorded no graph: its forward runs no torch operation")
    mark_branches(graphs)
    return tuple(graphs)


def capture_graph_module(module: fx.GraphModule, example_inputs: Inputs | None = None) -> CapturedGraph:
    """A GraphModule's own graph, with fake values propagated through it where it has none."""
    graph = module.graph
    if example_inputs is not None:
        with as_if_on_cpu(module) as fakes, _undisturbed(module):
            call = Call(*inputs_as_if_on_cpu(as_call(module, example_inputs), fakes))
            FakeTensorProp(module, fakes).propagate(*_placeholder_values(graph, call))
    elif any(fake_value(node) is None for node in graph.nodes if node.users and node.op != "get_attr"):
        raise ValueError("this GraphModule carries no fake values; pass example_inputs so that shapes can be inferred")
    read_results_of_in_place_ops(module)
    first = first_names(module)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    parameters = {}
    for node in graph.find_nodes(op="get_attr"):
        parameters[node.name] = first.get(str(node.target), str(node.target))
        node.meta[BUFFER_KEY] = str(node.target) not in held
    return CapturedGraph(module=module, parameters=parameters, route="fx")


def _placeholder_values(graph: fx.Graph, call: Call) -> list[Any]:
    values = list(call.args)
    for node in graph.find_nodes(op="placeholder")[len(values) :]:
        if str(node.target) in call.kwargs:
            values.append(call.kwargs[str(node.target)])
        elif node.args:
            values.append(node.args[0])
        else:
            raise ValueError(f"the graph reads {node.target!r}, which example_inputs does not give")
    return values


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, mapped to the first name of the same tensor."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _tied_names(state: Mapping[str, Any]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _without_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A key-value cache in the outputs is state the tracers cannot return; FFNs do not need it."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {**kwargs, "use_cache": False} if takes_cache else dict(kwargs)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no caches, nothing that hides FFNs from a tracer; everything restored at the end."""
    training = {module: module.training for module in model.modules()}
    configs = [m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", False)]
    # In eval mode nn.TransformerEncoderLayer becomes one opaque op, which would hide its FFN.
    fused_encoder_layers = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused_encoder_layers)
        stack.callback(_set_training, training)
        stack.callback(_set_use_cache, configs, True)
        torch.backends.mha.set_fastpath_enabled(False)
        _set_training(dict.fromkeys(training, False))  # exported modules refuse eval()
        _set_use_cache(configs, False)
        stack.enter_context(_traceable_experts(model))
        yield


@contextmanager
def _traceable_experts(model: nn.Module) -> Iterator[None]:
    """transformers' experts as grouped products: as loops over the experts that were hit they depend on the data."""
    setting = "_experts_implementation_internal"  # the public setter checks each model's class and keeps no sub-model
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), setting)}
    changed = [config for config in configs.values() if getattr(config, setting) in _UNTRACEABLE_EXPERTS]
    before = [getattr(config, setting) for config in changed]
    try:
        for config in changed:
            setattr(config, setting, "grouped_mm")
        yield
    finally:
        for config, value in zip(changed, before, strict=True):
            setattr(config, setting, value)


def _set_training(flags: Mapping[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        module.training = flag


def _set_use_cache(configs: Sequence[Any], value: bool) -> None:
    for config in configs:
        config.use_cache = value
