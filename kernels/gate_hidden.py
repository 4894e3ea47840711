"""lte::gate_hidden: the anchor, an FFN's hidden value times the gate of each neuron's expert.

Shape suffixes: F neurons, E experts, S neurons per expert; any leading dimensions come before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.experts import check_experts, check_offsets, scale_by_gates
from lte_compile.kernels.gated_hidden import GatedRegion, Wanted, gated_hidden, gated_hidden_gradients
from lte_compile.kernels.layout import own


def gate_hidden_reference(hidden_F: Tensor, gates_E: Tensor, expert_size: int, offsets_E1: Tensor | None) -> Tensor:
    """hidden [..., F] scaled by gates [..., E], in hidden's dtype. Gates may be of a wider dtype than hidden."""
    return scale_by_gates(hidden_F, gates_E, expert_size, offsets_E1).contiguous()


def _check(hidden_F: Tensor, gates_E: Tensor, expert_size: int, offsets_E1: Tensor | None) -> None:
    if hidden_F.ndim < 1 or gates_E.ndim != hidden_F.ndim:
        raise ValueError(
            f"hidden [..., neurons] and gates [..., experts] need the same leading dimensions; "
            f"got {list(hidden_F.shape)} and {list(gates_E.shape)}"
        )
    if not (hidden_F.is_floating_point() and gates_E.is_floating_point()):
        raise ValueError(f"hidden and gates must be floating point; got {hidden_F.dtype} and {gates_E.dtype}")
    check_experts(hidden_F.shape[-1], gates_E.shape[-1], expert_size, offsets_E1)


@torch.library.custom_op("lte::gate_hidden", mutates_args=())
def gate_hidden(hidden: Tensor, gates: Tensor, expert_size: int, expert_offsets: Tensor | None = None) -> Tensor:
    _check(hidden, gates, expert_size, expert_offsets)
    if hidden.shape[:-1] != gates.shape[:-1]:
        raise ValueError(f"hidden {list(hidden.shape)} and gates {list(gates.shape)} need the same leading dimensions")
    check_offsets(expert_offsets, hidden.shape[-1])
    region = GatedRegion("identity", (), expert_size, expert_offsets)
    return own(gated_hidden(hidden, None, gates, region).contiguous())


@gate_hidden.register_fake
def _(hidden: Tensor, gates: Tensor, expert_size: int, expert_offsets: Tensor | None = None) -> Tensor:
    _check(hidden, gates, expert_size, expert_offsets)
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("lte::gate_hidden_backward", mutates_args=())
def gate_hidden_backward(
    grad: Tensor,
    hidden: Tensor,
    gates: Tensor,
    expert_size: int,
    expert_offsets: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (hidden, gates), those that `wanted` marks. The gates' is summed over their neurons in fp32."""
    region = GatedRegion("identity", (), expert_size, expert_offsets)
    found = gated_hidden_gradients(grad, hidden, None, gates, region, Wanted(False, *wanted), overwrite=False)
    return [gradient.contiguous() for gradient in (found.up_F, found.gates_E) if gradient is not None]


@gate_hidden_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    gates: Tensor,
    expert_size: int,
    expert_offsets: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip((hidden, gates), wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, gates, ctx.expert_size, offsets = inputs
    keep_hidden = hidden if ctx.needs_input_grad[1] else None  # only the gates' gradient reads it
    ctx.save_for_backward(keep_hidden, gates, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, gates, offsets = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    stand_in = grad if hidden is None else hidden  # same shape and dtype; its values are not read
    grads = iter(torch.ops.lte.gate_hidden_backward(grad, stand_in, gates, ctx.expert_size, offsets, wanted))
    return *(next(grads) if want else None for want in wanted), None, None


gate_hidden.register_autograd(_backward, setup_context=_setup_context)
register_autocast("gate_hidden", cast=frozenset({"hidden"}))
register_autocast("gate_hidden_backward")
