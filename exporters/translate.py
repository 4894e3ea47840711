"""How torch's ONNX exporter turns `lte::sparse_ffn` into a `SparseFFN` node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import opset20 as op
from onnxscript import values

from lte_compile.exporters import schema
from lte_compile.exporters.decompose import SPARSE_FFN


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export."""
    schema.register()  # onnxscript takes the node's inputs and attributes from the schema
    return {SPARSE_FFN: _sparse_ffn}


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
        activation=activation,
        expert_size=expert_size,
        gated=int(w_gate is not None),
        threshold=tau,
    )
