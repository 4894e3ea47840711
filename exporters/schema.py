"""The ONNX operator `lte::SparseFFN`, version 1: its inputs, its attributes and how its weights lie in the file.

Shape suffixes: T tokens (any leading axes), D model width, F neurons, E experts, S neurons per expert.

    y = (h * [sigmoid(r w_router^T + b_router) > threshold] per neuron) w_down + b_down
    h = act(x w_gate^T + b_gate) * (x w_up^T + b_up)      when gated
    h = act(x w_up^T + b_up)                              when plain
    r = x_router where it is given, and w_router is [E, C]; else x

Every weight is stored once and neuron-major: row f of `w_up`, `w_gate` and `w_down` holds all that neuron f needs, and
expert e is the contiguous rows [e * S, min((e + 1) * S, F)). A kernel that skips experts then reads whole rows; the
portable body multiplies by `w_down` as it lies and by the transposes of the others, which ONNX Runtime folds at load.
"""

from __future__ import annotations

from typing import Final

import onnx.defs

DOMAIN: Final = "lte"
VERSION: Final = 1
OP_TYPE: Final = "SparseFFN"

# (name, shape, required). The order is the operator's interface: only ever append.
INPUTS: Final[tuple[tuple[str, str, bool], ...]] = (
    ("x", "[..., D]", True),
    ("w_router", "[E, D]", True),
    ("b_router", "[E]", False),
    ("w_up", "[F, D]", True),
    ("w_gate", "[F, D]", False),
    ("w_down", "[F, D]", True),
    ("b_up", "[F]", False),
    ("b_gate", "[F]", False),
    ("b_down", "[D]", False),
    ("x_router", "[..., C]", False),
)
INPUT_NAMES: Final = tuple(name for name, _, _ in INPUTS)

# Written on every node: a custom operator never sees a function's attribute defaults.
ATTRIBUTES: Final[tuple[tuple[str, onnx.defs.OpSchema.AttrType, str], ...]] = (
    ("activation", onnx.defs.OpSchema.AttrType.STRING, "a name of lte_compile.kernels.activations.ACTIVATIONS"),
    ("expert_size", onnx.defs.OpSchema.AttrType.INT, "S, neurons per expert; the last expert may hold fewer"),
    ("gated", onnx.defs.OpSchema.AttrType.INT, "1 when w_gate is given, else 0"),
    ("threshold", onnx.defs.OpSchema.AttrType.FLOAT, "tau: an expert runs where its score is strictly above it"),
)
ATTRIBUTE_NAMES: Final = tuple(name for name, _, _ in ATTRIBUTES)

FLOAT_TYPES: Final = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")


def _schema() -> onnx.defs.OpSchema:
    option = onnx.defs.OpSchema.FormalParameterOption
    inputs = [
        onnx.defs.OpSchema.FormalParameter(
            name, "T", description=shape, param_option=option.Single if required else option.Optional
        )
        for name, shape, required in INPUTS
    ]
    attributes = [onnx.defs.OpSchema.Attribute(name, kind, text, required=True) for name, kind, text in ATTRIBUTES]
    return onnx.defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc="A feed-forward network that runs, per token, only the experts whose router score exceeds the threshold.",
        inputs=inputs,
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T", description="[..., D], like x")],
        type_constraints=[("T", list(FLOAT_TYPES), "One floating-point type for activations and weights.")],
        attributes=attributes,
    )


def register() -> None:
    """Make `lte::SparseFFN` known to `onnx` (shape inference, exporters). Doing it again changes nothing."""
    if not onnx.defs.has(OP_TYPE, domain=DOMAIN):
        onnx.defs.register_schema(_schema())
