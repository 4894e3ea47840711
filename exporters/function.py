"""`lte::SparseFFN` written in standard ONNX operators, so that a runtime without our kernels still runs the file.

ONNX identifies a model-local function by domain, name and overload. A model whose FFNs all look alike needs one
function and no overload; a model that mixes kinds (gated and plain, ReLU and GELU) gets one overload per kind. ONNX
Runtime resolves several overloads of one name from release 1.27 on; a single function works in every release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx
import onnx.parser

from lte_compile.exporters.schema import ATTRIBUTE_NAMES, DOMAIN, INPUT_NAMES, OP_TYPE

# The Gelu operator enters ONNX here; earlier opsets have no name for it.
MIN_OPSET: Final = 20

# Each reads `pre` and writes `act`. Constants follow kernels/activations.py.
ACTIVATION_BODIES: Final[dict[str, str]] = {
    "relu": "act = Relu (pre)",
    "gelu": 'act = Gelu <approximate = "none"> (pre)',
    "gelu_tanh": 'act = Gelu <approximate = "tanh"> (pre)',
    "silu": "act_s = Sigmoid (pre)\n act = Mul (pre, act_s)",
    "quick_gelu": (
        "act_c = Constant <value_float = 1.702> ()\n act_t = CastLike (act_c, pre)\n act_m = Mul (pre, act_t)\n"
        " act_s = Sigmoid (act_m)\n act = Mul (pre, act_s)"
    ),
    "relu_squared": "act_r = Relu (pre)\n act = Mul (act_r, act_r)",
    "sigmoid": "act = Sigmoid (pre)",
    "tanh": "act = Tanh (pre)",
    "identity": "act = Identity (pre)",
    "leaky_relu": "act = LeakyRelu <alpha = 0.01> (pre)",
    "elu": "act = Elu <alpha = 1.0> (pre)",
    "mish": "act = Mish (pre)",
}


@dataclass(frozen=True, kw_only=True, order=True)
class Variant:
    """What the body of a `SparseFFN` depends on; threshold and expert size stay attributes.

    `biases` are the optional bias inputs that are given. `ragged` says that the last expert holds fewer neurons,
    `router_input` that the router reads `x_router` instead of x.
    """

    activation: str
    gated: bool
    biases: tuple[str, ...] = ()
    ragged: bool = False
    router_input: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATION_BODIES:
            allowed = ", ".join(sorted(ACTIVATION_BODIES))
            raise ValueError(f"activation {self.activation!r} has no ONNX body; there is one for {allowed}")

    @property
    def overload(self) -> str:
        """A readable name, unique among variants."""
        parts = [
            self.activation,
            "gated" if self.gated else "plain",
            *self.biases,
            *(["ragged"] if self.ragged else []),
            *(["x_router"] if self.router_input else []),
        ]
        return ".".join(parts)


def sparse_ffn_function(variant: Variant, *, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The body of `SparseFFN` for one kind of FFN. Takes x of any rank and any number of tokens, none included."""
    if opset < MIN_OPSET:
        raise ValueError(f"the SparseFFN function needs opset {MIN_OPSET} or later; got {opset}")
    lines = [*_router(variant), *_hidden(variant), *_mask(variant), *_down(variant)]
    body = "\n".join(f" {line}" for line in lines)
    head = f'<domain: "{DOMAIN}", overload: "{overload}", opset_import: ["" : {opset}]>'
    signature = f"{OP_TYPE} <{', '.join(ATTRIBUTE_NAMES)}> ({', '.join(INPUT_NAMES)}) => (y)"
    return onnx.parser.parse_function(f"{head}\n{signature} {{\n{body}\n}}")


def _router(variant: Variant) -> list[str]:
    """`selected` [..., E]; in float32 whatever the type of x, as in the kernels."""
    lines = [
        f"x_f32 = Cast <to = 1> ({'x_router' if variant.router_input else 'x'})",
        "router_f32 = Cast <to = 1> (w_router)",
        "router_t = Transpose <perm = [1, 0]> (router_f32)",
        "logits = MatMul (x_f32, router_t)",
    ]
    scored = "logits"
    if "b_router" in variant.biases:
        lines += ["router_bias = Cast <to = 1> (b_router)", "logits_biased = Add (logits, router_bias)"]
        scored = "logits_biased"
    return [
        *lines,
        f"scores = Sigmoid ({scored})",
        "tau = Constant <value_float: float = @threshold> ()",
        "selected = Greater (scores, tau)",
    ]


def _project(variant: Variant, weight: str, bias: str, result: str) -> list[str]:
    lines = [f"{weight}_t = Transpose <perm = [1, 0]> ({weight})"]
    if bias not in variant.biases:
        return [*lines, f"{result} = MatMul (x, {weight}_t)"]
    return [*lines, f"{result}_mm = MatMul (x, {weight}_t)", f"{result} = Add ({result}_mm, {bias})"]


def _hidden(variant: Variant) -> list[str]:
    activation = ACTIVATION_BODIES[variant.activation]
    if not variant.gated:
        return [*_project(variant, "w_up", "b_up", "pre"), activation, "hidden = Identity (act)"]
    gate, up = _project(variant, "w_gate", "b_gate", "pre"), _project(variant, "w_up", "b_up", "up")
    return [*gate, activation, *up, "hidden = Mul (act, up)"]


def _mask(variant: Variant) -> list[str]:
    """`masked` [..., F]: zero where the neuron's expert is not selected.

    Where, not Mul: an unselected neuron that overflows float16 must give 0, as in a kernel that never computes it.
    Every target shape is spelled out (no -1), so that no tokens at all is a legal input.
    """
    lines = [
        "last = Constant <value_ints = [-1]> ()",
        "size_0d = Constant <value_int: int = @expert_size> ()",
        "size = Reshape (size_0d, last)",
        "zero_f32 = Constant <value_float = 0.0> ()",
        "zero = CastLike (zero_f32, hidden)",
        "selected_e1 = Unsqueeze (selected, last)",
        "expert_shape = Shape (selected)",
        "grouped_shape = Concat <axis = 0> (expert_shape, size)",
    ]
    if not variant.ragged:
        return [
            *lines,
            "grouped = Reshape (hidden, grouped_shape)",
            "grouped_masked = Where (selected_e1, grouped, zero)",
            "hidden_shape = Shape (hidden)",
            "masked = Reshape (grouped_masked, hidden_shape)",
        ]
    return [
        *lines,
        "lead = Shape <start = 0, end = -1> (selected)",
        "experts = Shape <start = -1> (selected)",
        "neurons = Shape <start = -1> (hidden)",
        "padded = Mul (experts, size)",
        "padded_shape = Concat <axis = 0> (lead, padded)",
        "spread = Expand (selected_e1, grouped_shape)",
        "spread_flat = Reshape (spread, padded_shape)",
        "first = Constant <value_ints = [0]> ()",
        "neuron_selected = Slice (spread_flat, first, neurons, last)",
        "masked = Where (neuron_selected, hidden, zero)",
    ]


def _down(variant: Variant) -> list[str]:
    if "b_down" not in variant.biases:
        return ["y = MatMul (masked, w_down)"]
    return ["y_mm = MatMul (masked, w_down)", "y = Add (y_mm, b_down)"]
