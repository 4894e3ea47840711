"""export_onnx: a transformed model to an ONNX file that any ONNX runtime runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from lte_compile.capture import dummy_inputs
from lte_compile.exporters.axes import DynamicAxes, axis_names, export_dims, widen
from lte_compile.exporters.decompose import NODE_DTYPES
from lte_compile.exporters.files import check_writable
from lte_compile.exporters.kv_cache import CachedDecoder, example_of
from lte_compile.exporters.onnx_export import DEFAULT_OPSET, check_opset, export_program
from lte_compile.exporters.report import OnnxReport
from lte_compile.modes import eval_mode
from lte_compile.passes.anchors import is_lte
from lte_compile.passes.exported import rewrite_exported
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.lower import LowerSparse

__all__ = ["OnnxReport", "export_onnx"]

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


@dataclass(frozen=True)
class _Traced:
    """A program and the names of its flat inputs, their axes and its flat outputs."""

    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axis_names: tuple[Mapping[int, str], ...]
    prefix: str = ""  # what a wrapper module puts before the model's parameter names


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Inputs | None = None,
    dynamic_axes: DynamicAxes = "batch_and_sequence",
    kv_cache: bool = False,
    opset: int = DEFAULT_OPSET,
    dtype: torch.dtype | None = None,
    dense: bool = False,
) -> OnnxReport:
    """Write `model`, in the stage it is in, as an ONNX file. The model is left as it was.

    Every FFN in the hard stage becomes one `lte::SparseFFN` node, which the file also defines in standard operators:
    plain ONNX Runtime runs it, and a library of kernels may take the nodes over. Other stages, and FFNs that cannot be
    fused, are written in standard operators throughout; the report names them with the reason.

    Args:
        path: of the file; its folder must exist. Weights above 2 GB go to `<path>.data`.
        example_inputs: as for `transform`; by default built from a transformers model's config.
        dynamic_axes: "batch_and_sequence", "batch", "none", or names per input and axis:
            {"input_ids": {0: "batch", 1: "sequence"}}.
        kv_cache: write a decoder with its cache as inputs and outputs, named as ONNX Runtime GenAI wants:
            input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value.
            Prefill and decode are the same graph, all axes dynamic. Examples are not needed.
        opset: 20 to 23. From 23 on attention stays one operator.
        dtype: export a copy of the model in this dtype (torch.float32, float16 or bfloat16).
        dense: also take a model without routers.

    Raises:
        ValueError: the model has no routed FFN, an argument is not one of the allowed values, an axis cannot be
            dynamic, or `path` cannot be written. Nothing is written then.
    """
    path = Path(path)
    check_opset(opset)
    check_writable(path)
    if kv_cache and (example_inputs is not None or dynamic_axes != "batch_and_sequence"):
        raise ValueError("kv_cache=True sets its own example inputs and dynamic axes; leave those arguments out")
    model = model if dtype is None else _in_dtype(model, dtype)
    with eval_mode(model), torch.no_grad():
        traced = _trace_with_cache(model) if kv_cache else _trace(model, example_inputs, dynamic_axes)
    is_routed = any(is_lte(node) for node in traced.program.graph.nodes)
    if not is_routed and not dense:
        raise ValueError(
            f"{type(model).__name__} has no routed FFN; call lte_compile.transform(model) first, "
            "or pass dense=True to export the dense model"
        )
    program, reports = rewrite_exported(traced.program, (FuseExperts(), LowerSparse()) if is_routed else ())
    return export_program(
        program,
        path,
        opset=opset,
        input_names=traced.input_names,
        output_names=traced.output_names,
        axis_names=traced.axis_names,
        strip_prefix=traced.prefix,
        passes=reports,
    )


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    if dtype not in NODE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, NODE_DTYPES))}; got {dtype}")
    return copy.deepcopy(model).to(dtype)


def _trace(model: nn.Module, example_inputs: Inputs | None, dynamic_axes: DynamicAxes) -> _Traced:
    inputs = dummy_inputs(model) if example_inputs is None else _by_name(model, example_inputs)
    axes = axis_names(inputs, dynamic_axes)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: _cast(widen(inputs[name], axes[name]), dtype) for name in axes}
    kwargs = {**inputs, **tensors}
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False  # without a cache to hand on, keys and values are not outputs
    shapes = {name: export_dims(axes[name]) if name in axes else None for name in kwargs}
    program = _export(model, (), kwargs, shapes)
    return _Traced(program, tuple(axes), _output_names(program), tuple(axes.values()))


def _trace_with_cache(model: nn.Module) -> _Traced:
    example = example_of(model)
    inputs, _ = example.args
    dims = [export_dims(axes) for axes in example.axis_names]
    of_inputs, of_past = dims[: len(inputs)], dims[len(inputs) :]
    shapes = (
        dict(zip(inputs, of_inputs, strict=True)),
        list(zip(of_past[::2], of_past[1::2], strict=True)),
    )
    program = _export(CachedDecoder(model).eval(), example.args, {}, shapes)
    return _Traced(program, example.input_names, example.output_names, example.axis_names, CachedDecoder.PREFIX)


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
    except torch._dynamo.exc.UserError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced with these dynamic axes: {cause} "
            "Fix the axes that have to be constant with dynamic_axes='batch', 'none' or a mapping."
        ) from error


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
