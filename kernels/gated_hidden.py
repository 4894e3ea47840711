"""What lies between the projections of an FFN with gated experts, and its gradients: by Triton where it serves.

Shape suffixes: F neurons, E experts; any leading dimensions come before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lte_compile.kernels.experts import scale_by_gates, sum_per_expert
from lte_compile.kernels.hidden import hidden_gradients, hidden_of

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One expert's neurons of one token have to fit a program's registers.
MAX_TRITON_EXPERT = 2048


class GatedRegion(NamedTuple):
    """The hidden function (kernels.hidden), and which neurons each expert owns (kernels.experts)."""

    activation: str
    constants: Sequence[Tensor]
    expert_size: int
    offsets_E1: Tensor | None


class Wanted(NamedTuple):
    """Which results of `gated_hidden_gradients` anybody reads."""

    gated: bool
    hidden: bool  # the gradients of up and gate
    gates: bool
    constants: bool = False


class GatedGradients(NamedTuple):
    """The gated hidden value anew, and the gradients of what it was made of; None (or none) where not wanted."""

    gated_F: Tensor | None
    up_F: Tensor | None
    gate_F: Tensor | None
    gates_E: Tensor | None
    constants: tuple[Tensor, ...]


def gated_hidden(
    up_F: Tensor, gate_F: Tensor | None, gates_E: Tensor, region: GatedRegion, *, skip: bool = False
) -> Tensor:
    """hidden(up, gate) times the gate of each neuron's expert, [..., F] in up's dtype.

    `skip`: up and gate are unset where the gate is zero; the result is zero there. Only where a kernel serves.
    """
    if why_not_triton(up_F, gates_E, region) is not None:
        hidden_F = hidden_of(region.activation, region.constants, up_F, gate_F)
        return scale_by_gates(hidden_F, gates_E, region.expert_size, region.offsets_E1)
    from lte_compile.kernels import triton_gated_hidden as triton  # triton exists on Linux only

    up_F, gates_E = up_F.contiguous(), gates_E.contiguous()
    gate_F = None if gate_F is None else gate_F.contiguous()
    constants = [constant.contiguous() for constant in region.constants]
    return triton.gated_hidden(up_F, gate_F, gates_E, region.activation, region.expert_size, constants, skip=skip)


def gated_hidden_gradients(
    grad_F: Tensor,
    up_F: Tensor,
    gate_F: Tensor | None,
    gates_E: Tensor,
    region: GatedRegion,
    wanted: Wanted,
    *,
    overwrite: bool,
    skip: bool = False,
) -> GatedGradients:
    """From the gradient of the gated hidden value. The gates' is summed in fp32 at least.

    `overwrite`: nobody reads `grad_F` again, and up's gradient may take its place. `skip`: as in `gated_hidden`; the
    gradients of up and gate are zero there.
    """
    if wanted.constants or why_not_triton(up_F, gates_E, region) is not None:
        return _torch_gradients(grad_F, up_F, gate_F, gates_E, region, wanted)
    from lte_compile.kernels import triton_gated_hidden as triton

    gate_F = None if gate_F is None else gate_F.contiguous()
    found = triton.gated_hidden_backward(
        grad_F.contiguous(),
        up_F.contiguous(),
        gate_F,
        gates_E.contiguous(),
        region.activation,
        region.expert_size,
        [constant.contiguous() for constant in region.constants],
        wanted[:3],
        overwrite=overwrite,
        skip=skip,
    )
    return GatedGradients(*found, ())


def _torch_gradients(
    grad_F: Tensor, up_F: Tensor, gate_F: Tensor | None, gates_E: Tensor, region: GatedRegion, wanted: Wanted
) -> GatedGradients:
    """Also those of a region program's constants, which add over tokens."""
    activation, constants, size, offsets = region
    hidden_F = hidden_of(activation, constants, up_F, gate_F) if wanted.gated or wanted.gates else None
    gated_F = scale_by_gates(hidden_F, gates_E, size, offsets) if hidden_F is not None and wanted.gated else None
    grad_gates_E = None
    if hidden_F is not None and wanted.gates:
        products_F = grad_F.to(gates_E.dtype) * hidden_F
        grad_gates_E = sum_per_expert(products_F, gates_E.shape[-1], size, offsets).to(gates_E.dtype)
        del products_F
    del hidden_F  # [..., F] values of many tokens are large: no more of them at once than needed
    if not (wanted.hidden or wanted.constants):
        return GatedGradients(gated_F, None, None, grad_gates_E, ())
    grad_hidden_F = scale_by_gates(grad_F, gates_E, size, offsets)
    of_hidden = hidden_gradients(activation, constants, grad_hidden_F, up_F, gate_F)
    return GatedGradients(gated_F, of_hidden.up_F, of_hidden.gate_F, grad_gates_E, of_hidden.constants)


def why_not_triton(up_F: Tensor, gates_E: Tensor, region: GatedRegion) -> str | None:
    """Why torch computes these values and not a Triton kernel; None if a kernel does."""
    if up_F.device.type != "cuda":
        return f"needs a CUDA device; the projections are on {up_F.device.type}"
    if not has_triton():
        return "triton is not installed"
    if up_F.dtype not in TRITON_DTYPES or gates_E.dtype not in TRITON_DTYPES:
        return f"serves float32, float16 and bfloat16; got {up_F.dtype} and gates in {gates_E.dtype}"
    if region.offsets_E1 is not None:
        return "serves experts of one size; expert_offsets were given"
    if min(region.expert_size, up_F.shape[-1]) > MAX_TRITON_EXPERT:
        return f"experts of {region.expert_size} neurons; serves up to {MAX_TRITON_EXPERT}"
    if any(constant.device != up_F.device for constant in region.constants):
        return "a constant of the hidden region is on another device"
    return None


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None
