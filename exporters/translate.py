"""How torch's ONNX exporter turns `lte::sparse_ffn` into a `SparseFFN` node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset20 as op
from onnxscript import values

from lte_compile.exporters import schema
from lte_compile.exporters.decompose import SPARSE_FFN

_INT64 = int(onnx.TensorProto.INT64)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export."""
    schema.register()  # onnxscript takes the node's inputs and attributes from the schema
    return {SPARSE_FFN: _sparse_ffn, torch.ops.aten.repeat_interleave.Tensor: _repeat_interleave}


def _sparse_ffn(
    x: Any,
    w_router: Any,
    b_router: Any,
    w_up: Any,
    w_gate: Any,
    w_down: Any,
    b_up: Any,
    b_gate: Any,
    b_down: Any,
    activation: str,
    expert_size: int,
    tau: float,
    expert_offsets: Any = None,  # decompose.to_standard_ops left no node that has them
    constants: Any = None,  # likewise
    density: float | None = None,  # a hint for kernels that are chosen when a call is made
    x_router: Any = None,
) -> Any:
    lte = values.Opset(schema.DOMAIN, schema.VERSION)
    w_down_FD = op.Transpose(w_down, perm=[1, 0])  # nn.Linear keeps [D, F]; nodes.bake_weights folds this away
    return lte.SparseFFN(
        x,
        w_router,
        b_router,
        w_up,
        w_gate,
        w_down_FD,
        b_up,
        b_gate,
        b_down,
        *([] if x_router is None else [x_router]),
        activation=activation,
        expert_size=expert_size,
        gated=int(w_gate is not None),
        threshold=tau,
    )


def _repeat_interleave(repeats: Any, output_size: int | None = None) -> Any:
    """Which element each output position repeats, for experts of unequal sizes: torch's own does not take the size."""
    ends = op.CumSum(repeats, op.Constant(value_int=0))
    total = op.ReduceSum(repeats, keepdims=0) if output_size is None else op.Constant(value_int=output_size)
    positions = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
    has_ended = op.GreaterOrEqual(
        op.Unsqueeze(positions, op.Constant(value_ints=[1])), op.Unsqueeze(ends, op.Constant(value_ints=[0]))
    )
    return op.ReduceSum(op.Cast(has_ended, to=_INT64), op.Constant(value_ints=[1]), keepdims=0)
