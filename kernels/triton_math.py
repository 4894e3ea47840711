# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Functions that Triton lacks or computes with cancellation near zero, in fp32 to a few units in the last place."""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """e^x - 1: its Taylor series to x^8 where |x| < 1/2 (the rest is below 2^-25 of it), the difference elsewhere."""
    small = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = 1.0 + small * 0.125
    series = 1.0 + small * series * 0.14285714285714285
    series = 1.0 + small * series * 0.16666666666666666
    series = 1.0 + small * series * 0.2
    series = 1.0 + small * series * 0.25
    series = 1.0 + small * series * 0.3333333333333333
    series = 1.0 + small * series * 0.5
    return tl.where(tl.abs(x) < 0.5, small * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): 2 artanh(x / (2 + x)) as a series where |x| < 1/2 (the rest is below 2^-25 of it)."""
    small = tl.minimum(tl.maximum(x, -0.5), 0.5)
    ratio = small / (small + 2.0)
    square = ratio * ratio
    series = 0.06666666666666667 + square * 0.058823529411764705
    series = 0.07692307692307693 + square * series
    series = 0.09090909090909091 + square * series
    series = 0.1111111111111111 + square * series
    series = 0.14285714285714285 + square * series
    series = 0.2 + square * series
    series = 0.3333333333333333 + square * series
    series = 1.0 + square * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * ratio * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """(e^2x - 1) / (e^2x + 1), written with e^-2|x| - 1, which neither overflows nor cancels."""
    t = expm1(-2.0 * tl.abs(x))
    y = -t / (t + 2.0)
    return tl.where(x < 0.0, -y, y)
