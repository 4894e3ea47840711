"""Models as programs with named inputs and outputs, ready to be written as ONNX files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lte_compile.capture.capture import dummy_inputs
from lte_compile.exporters.axes import DynamicAxes, axis_names, export_dims, widen
from lte_compile.exporters.kv_cache import CachedExample

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


@dataclass(frozen=True)
class Traced:
    """A program and the names of its flat inputs, their axes and its flat outputs."""

    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axis_names: tuple[Mapping[int, str], ...]
    prefix: str = ""  # what a wrapper module puts before the model's parameter names


def trace(model: nn.Module, example_inputs: Inputs | None, dynamic_axes: DynamicAxes) -> Traced:
    """One forward pass without a cache.

    Raises:
        ValueError: no example inputs can be made, or an axis cannot be dynamic.
    """
    inputs = dummy_inputs(model) if example_inputs is None else _by_name(model, example_inputs)
    axes = axis_names(inputs, dynamic_axes)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: _cast(widen(inputs[name], axes[name]), dtype) for name in axes}
    kwargs = {**inputs, **tensors}
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False  # without a cache to hand on, keys and values are not outputs
    shapes = {name: export_dims(axes[name]) if name in axes else None for name in kwargs}
    program = _export(model, (), kwargs, shapes)
    return Traced(program, tuple(axes), _output_names(program), tuple(axes.values()))


def trace_with_cache(wrapper: nn.Module, example: CachedExample, prefix: str) -> Traced:
    """A model in one of the wrappers of exporters that make its cache flat inputs or outputs."""
    names = iter(example.axis_names)
    shapes = pytree.tree_map(lambda _: export_dims(next(names)), example.args)
    program = _export(wrapper.eval(), example.args, {}, shapes)
    return Traced(program, example.input_names, example.output_names, example.axis_names, prefix)


def _by_name(model: nn.Module, example_inputs: Inputs) -> dict[str, Any]:
    """Example inputs as keyword arguments, in the order of the model's signature."""
    signature = inspect.signature(model.forward)
    if isinstance(example_inputs, Mapping):
        bound = signature.bind_partial(**example_inputs)
    else:
        positional = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        bound = signature.bind_partial(*positional)
    by_name: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        by_name.update(value if is_rest else {name: value})
    return by_name


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except GuardOnDataDependentSymNode as error:
        raise ValueError(
            f"{type(model).__name__} decides by values of its tensors, which a graph cannot, at {_place(error)}. "
            "Where that is a safeguard of one precision, export in another dtype."
        ) from error
    except torch._dynamo.exc.UserError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced with these dynamic axes: {cause} "
            "Fix the axes that have to be constant with dynamic_axes='batch', 'none' or a mapping."
        ) from error


def _place(error: GuardOnDataDependentSymNode) -> str:
    """The innermost line of a model's own code that the tracer stopped at."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    return ":".join(frames[-1]) if frames else "a place the tracer does not tell"


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the flat outputs: the keys of a mapping (transformers' outputs), else output, output.1, ..."""
    spec = program.call_spec.out_spec
    if spec is None:
        return ()
    result = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    fields = result.items() if isinstance(result, Mapping) else [("output", result)]
    return tuple(
        name if index == 0 else f"{name}.{index}"
        for name, value in fields
        for index, _ in enumerate(pytree.tree_leaves(value))
    )
