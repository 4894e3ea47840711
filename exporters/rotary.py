"""Making fused RotaryEmbedding nodes legal.

onnxscript's fusion for opset 23 replaces x * cos + rotate(x) * sin, where the angles [1, T, K / 2] of a model that was
not given position_ids broadcast over the batch, with an operator that demands [B, T, K / 2]. It checks fine and fails
at run time for every batch but 1, so the caches are expanded here.
Shape suffixes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import onnx_ir as ir


def expand_rotary_caches(model: ir.Model) -> None:
    """Expand cos and sin of every RotaryEmbedding to its input's batch where they do not have it already."""
    for node in [node for node in model.graph if node.domain == "" and node.op_type == "RotaryEmbedding"]:
        x_BHTK, cos, sin = node.inputs[:3]
        has_positions = (
            len(node.inputs) > 3 and node.inputs[3] is not None
        )  # caches are then tables, [positions, K / 2]
        if x_BHTK is None or cos is None or sin is None or has_positions or _share_batch(x_BHTK, cos):
            continue
        batch = ir.node("Shape", [x_BHTK], {"start": 0, "end": 1})
        ones = ir.node("Constant", [], {"value_ints": [1, 1]})
        target = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
        expanded = [ir.node("Expand", [cache, target.outputs[0]]) for cache in (cos, sin)]
        model.graph.insert_before(node, [batch, ones, target, *expanded])
        for index, expand in enumerate(expanded, start=1):
            node.replace_input_with(index, expand.outputs[0])


def _share_batch(left: ir.Value, right: ir.Value) -> bool:
    batch = _batch(left)
    return batch is not None and batch == _batch(right)


def _batch(value: ir.Value) -> object:
    """Size or symbol of axis 0, through element-wise operators without a recorded shape; None where unknown."""
    while value.shape is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Cos", "Sin", "Cast", "Mul") or producer.inputs[0] is None:
            return None
        value = producer.inputs[0]
    return value.shape[0]
