"""export_onnx: a transformed model to an ONNX file that any ONNX runtime runs."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from lte_compile.exporters.axes import DynamicAxes
from lte_compile.exporters.decompose import NODE_DTYPES
from lte_compile.exporters.files import check_writable
from lte_compile.exporters.kv_cache import CachedDecoder, example_of
from lte_compile.exporters.onnx_export import DEFAULT_OPSET, check_opset, export_program
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.views import copy_before_reshapes
from lte_compile.passes.anchors import is_lte
from lte_compile.passes.exported import rewrite_exported
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.lower import LowerSparse
from lte_compile.running.modes import eval_mode
from lte_compile.serving.programs import Inputs, Traced, trace, trace_with_cache

__all__ = ["OnnxReport", "export_onnx"]


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
    model = model if dtype is None else in_dtype(model, dtype)
    with eval_mode(model), torch.no_grad():
        traced = _trace_decoder(model) if kv_cache else trace(model, example_inputs, dynamic_axes)
    return write(traced, path, opset=opset, dense=dense, model=type(model).__name__)


def write(traced: Traced, path: Path, *, opset: int, dense: bool, model: str) -> OnnxReport:
    """Lower the routed FFNs of a traced model and write it. `model` is what an error calls it."""
    is_routed = any(is_lte(node) for node in traced.program.graph.nodes)
    if not is_routed and not dense:
        raise ValueError(
            f"{model} has no routed FFN; call lte_compile.transform(model) first, "
            "or pass dense=True to export the dense model"
        )
    program, reports = rewrite_exported(traced.program, (FuseExperts(), LowerSparse()) if is_routed else ())
    copy_before_reshapes(program)
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


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in one of the dtypes that files are written in."""
    if dtype not in NODE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, NODE_DTYPES))}; got {dtype}")
    return copy.deepcopy(model).to(dtype)


def _trace_decoder(model: nn.Module) -> Traced:
    return trace_with_cache(CachedDecoder(model), example_of(model), CachedDecoder.PREFIX)
