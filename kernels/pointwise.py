"""The element-wise operations that a region program (lte_compile.kernels.program) may use: one table, one row each.

A row serves every place that has to know the operation: the reference (`apply`), its gradients, and the GPU kernel
(`triton`, with {0}, {1} ... for the operands; names without `tl.` are those of lte_compile.kernels.triton_math).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Value = Tensor | float
Gradient = Callable[..., Tensor]

FLOAT, BOOL = "f", "b"


@dataclass(frozen=True)
class PointwiseOp:
    """`gradients[i](grad, result, *operands)` is operand i's; None where there is none or it is zero everywhere.

    `takes` and `gives` are the kinds of operands and result: "f" floating, "b" boolean.
    """

    apply: Callable[..., Any]
    triton: str
    gradients: tuple[Gradient | None, ...] = ()
    takes: str = "f"
    gives: str = FLOAT

    @property
    def arity(self) -> int:
        return len(self.takes)


def _maximum(a: Value, b: Value) -> Tensor:
    return torch.maximum(*_tensors(a, b))


def _minimum(a: Value, b: Value) -> Tensor:
    return torch.minimum(*_tensors(a, b))


def _clamp_min(a: Value, b: Value) -> Tensor:
    value, bound = _tensors(a, b)
    return torch.clamp(value, min=bound)


def _clamp_max(a: Value, b: Value) -> Tensor:
    value, bound = _tensors(a, b)
    return torch.clamp(value, max=bound)


def _tensors(a: Value, b: Value) -> tuple[Tensor, Tensor]:
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    return tuple(v if isinstance(v, Tensor) else like.new_full((), v) for v in (a, b))  # type: ignore[return-value]


def _keep(grad: Tensor, condition: Any) -> Tensor:
    return torch.where(condition, grad, 0.0)


def _larger(grad: Tensor, mine: Value, other: Value) -> Tensor:
    """The gradient of the larger operand; ties share it, and where one is NaN both have it, as in torch."""
    return torch.where(operator.lt(mine, other), 0.0, torch.where(operator.eq(mine, other), grad * 0.5, grad))


def _unary(apply: Callable[..., Any], triton: str, gradient: Gradient | None) -> PointwiseOp:
    return PointwiseOp(apply, triton, (gradient,))


def _binary(apply: Callable[..., Any], triton: str, *gradients: Gradient) -> PointwiseOp:
    return PointwiseOp(apply, triton, gradients, takes="ff")


def _comparison(apply: Callable[..., Any], sign: str) -> PointwiseOp:
    return PointwiseOp(apply, f"{{0}} {sign} {{1}}", (None, None), takes="ff", gives=BOOL)


_NAN = "propagate_nan=tl.PropagateNan.ALL"  # as torch does; Triton's default drops NaN
_TWO_OVER_ROOT_PI = 1.1283791670955126

POINTWISE_OPS: Final[Mapping[str, PointwiseOp]] = {
    "add": _binary(operator.add, "{0} + {1}", lambda g, y, a, b: g, lambda g, y, a, b: g),
    "sub": _binary(operator.sub, "{0} - {1}", lambda g, y, a, b: g, lambda g, y, a, b: -g),
    "mul": _binary(operator.mul, "{0} * {1}", lambda g, y, a, b: g * b, lambda g, y, a, b: g * a),
    "div": _binary(operator.truediv, "{0} / {1}", lambda g, y, a, b: g / b, lambda g, y, a, b: -g * y / b),
    "maximum": _binary(
        _maximum,
        f"tl.maximum({{0}}, {{1}}, {_NAN})",
        lambda g, y, a, b: _larger(g, a, b),
        lambda g, y, a, b: _larger(g, b, a),
    ),
    "minimum": _binary(
        _minimum,
        f"tl.minimum({{0}}, {{1}}, {_NAN})",
        lambda g, y, a, b: _larger(g, b, a),
        lambda g, y, a, b: _larger(g, a, b),
    ),
    # Clamps pass the whole gradient at their bound, where maximum and minimum share it.
    "clamp_min": _binary(
        _clamp_min,
        f"tl.maximum({{0}}, {{1}}, {_NAN})",
        lambda g, y, a, b: _keep(g, a >= b),
        lambda g, y, a, b: _keep(g, a < b),
    ),
    "clamp_max": _binary(
        _clamp_max,
        f"tl.minimum({{0}}, {{1}}, {_NAN})",
        lambda g, y, a, b: _keep(g, a <= b),
        lambda g, y, a, b: _keep(g, a > b),
    ),
    "relu": _unary(torch.relu, f"tl.maximum({{0}}, 0.0, {_NAN})", lambda g, y, a: torch.where(a <= 0, 0.0, g)),
    "neg": _unary(operator.neg, "-{0}", lambda g, y, a: -g),
    "abs": _unary(torch.abs, "tl.abs({0})", lambda g, y, a: g * torch.sign(a)),
    "sign": _unary(torch.sign, "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))", None),
    "floor": _unary(torch.floor, "tl.floor({0})", None),
    "ceil": _unary(torch.ceil, "tl.ceil({0})", None),
    "exp": _unary(torch.exp, "tl.exp({0})", lambda g, y, a: g * y),
    "expm1": _unary(torch.expm1, "expm1({0})", lambda g, y, a: g * (y + 1)),
    "log": _unary(torch.log, "tl.log({0})", lambda g, y, a: g / a),
    "log1p": _unary(torch.log1p, "log1p({0})", lambda g, y, a: g / (a + 1)),
    "sqrt": _unary(torch.sqrt, "tl.sqrt({0})", lambda g, y, a: g / (2 * y)),
    "rsqrt": _unary(torch.rsqrt, "tl.rsqrt({0})", lambda g, y, a: -0.5 * g * y * y * y),
    "reciprocal": _unary(torch.reciprocal, "1.0 / {0}", lambda g, y, a: -g * y * y),
    "sin": _unary(torch.sin, "tl.sin({0})", lambda g, y, a: g * torch.cos(a)),
    "cos": _unary(torch.cos, "tl.cos({0})", lambda g, y, a: -g * torch.sin(a)),
    "tanh": _unary(torch.tanh, "tanh({0})", lambda g, y, a: g * (1 - y * y)),
    "sigmoid": _unary(torch.sigmoid, "tl.sigmoid({0})", lambda g, y, a: g * y * (1 - y)),
    "erf": _unary(torch.erf, "tl.erf({0})", lambda g, y, a: g * _TWO_OVER_ROOT_PI * torch.exp(-a * a)),
    "gt": _comparison(operator.gt, ">"),
    "ge": _comparison(operator.ge, ">="),
    "lt": _comparison(operator.lt, "<"),
    "le": _comparison(operator.le, "<="),
    "eq": _comparison(operator.eq, "=="),
    "ne": _comparison(operator.ne, "!="),
    "logical_and": PointwiseOp(torch.logical_and, "{0} & {1}", (None, None), takes="bb", gives=BOOL),
    "logical_or": PointwiseOp(torch.logical_or, "{0} | {1}", (None, None), takes="bb", gives=BOOL),
    "logical_not": PointwiseOp(torch.logical_not, "{0} == 0", (None,), takes="b", gives=BOOL),
    "where": PointwiseOp(
        torch.where,
        "tl.where({0}, {1}, {2})",
        (None, lambda g, y, a, b, c: _keep(g, a), lambda g, y, a, b, c: torch.where(a, 0.0, g)),
        takes="bff",
    ),
}
