"""lte::expert_ffn: an FFN whose neurons are scaled by the gate of their expert.

FFN(x) = sum over experts of gate_e * E_e(x) (arXiv 2402.06126, equation 3), with the down-projection's bias added once.
Training saves what lte::expert_ffn_projections returns beside the result; lte::expert_ffn_backward starts from there.
Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.expert_ffn_training import check_expert_ffn, projected
from lte_compile.kernels.experts import scale_by_gates
from lte_compile.kernels.ffn import FfnWeights, hidden_value, project_down
from lte_compile.kernels.gated_hidden import GatedRegion

WEIGHT_NAMES = frozenset({"w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down"})

_LIBRARY = torch.library.Library("lte", "FRAGMENT")  # type: ignore[no-untyped-call]  # registrations live as long as this object
# `activation` is a name of ACTIVATIONS, or a region program (kernels/program.py) that reads `constants`.
# `density` is the share of experts expected to have another gate than zero; it guides the choice of kernel.
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "expert_ffn(Tensor x, Tensor gates, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_up, Tensor? b_gate, "
    "Tensor? b_down, str activation, int expert_size, Tensor? expert_offsets=None, Tensor[]? constants=None, "
    "float? density=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def expert_ffn_reference(
    x_D: Tensor,
    gates_E: Tensor,
    weights: FfnWeights,
    activation: str,
    expert_size: int,
    offsets_E1: Tensor | None = None,
    constants: Sequence[Tensor] = (),
) -> Tensor:
    """y [..., D] of x [..., D] and gates [..., E]; plain torch, differentiable."""
    hidden_F = hidden_value(x_D, weights, activation, constants)
    return project_down(scale_by_gates(hidden_F, gates_E, expert_size, offsets_E1), weights)


def expert_ffn_forward(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    region = GatedRegion(activation, constants or (), expert_size, expert_offsets)
    return projected(x, gates, weights, region, density)[0]


@torch.library.register_fake("lte::expert_ffn", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    check_expert_ffn(x, gates, weights, GatedRegion(activation, constants or (), expert_size, expert_offsets))
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


_TENSORS, _GATES = 8, 1  # x, gates and the FFN's six come first


class _Training(torch.autograd.Function):
    """A custom op's own autograd can save inputs and outputs; this one saves the projections without returning them.

    They are the choice between memory and time: computing them anew would save 2 T F values (those of up and gate) and
    cost two of the nine matrix products of a training step, on a CPU as on a GPU. Whoever wants less memory checkpoints
    the layer, and then saves x alone. The hidden value is never saved: one pass over the projections has it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        expert_size: int,
        density: float | None,
        offsets: Tensor | None,
        *tensors_and_constants: Tensor | None,
    ) -> Tensor:
        tensors, constants = tensors_and_constants[:_TENSORS], list(tensors_and_constants[_TENSORS:])
        wanted = ctx.needs_input_grad[4:]
        if wanted[_GATES] or any(wanted[_TENSORS:]):
            density = None  # gates of zero have a gradient too, and the constants' read every value
        call = torch.ops.lte.expert_ffn_projections
        y, *projections = call(*tensors, activation, expert_size, offsets, constants, density)
        ctx.activation, ctx.expert_size, ctx.density = activation, expert_size, density
        ctx.num_projections = len(projections)
        ctx.save_for_backward(offsets, *projections, *tensors_and_constants)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, *saved = ctx.saved_tensors
        projections, tensors = saved[: ctx.num_projections], saved[ctx.num_projections :]
        wanted = list(ctx.needs_input_grad[4:])
        rest = (ctx.activation, ctx.expert_size, offsets, tensors[_TENSORS:], wanted, *projections)
        call = torch.ops.lte.expert_ffn_backward
        grads = iter(call(grad, *tensors[:_TENSORS], *rest, density=ctx.density))
        return (None,) * 4 + tuple(next(grads) if want else None for want in wanted)


def _autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    """lte::expert_ffn where gradients may be wanted."""
    *tensors, activation, expert_size = args[: _TENSORS + 2]
    given = args[_TENSORS + 2 :]  # the dispatcher drops trailing arguments that equal their defaults
    offsets, constants, density = given + (None,) * (3 - len(given))
    inputs = (*tensors, *(constants or ()))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Training.apply(activation, expert_size, density, offsets, *inputs)  # type: ignore[no-any-return, no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        op = torch.ops.lte.expert_ffn.default
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)  # type: ignore[no-any-return]


_LIBRARY.impl("expert_ffn", expert_ffn_forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("expert_ffn", _autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
expert_ffn = torch.ops.lte.expert_ffn


register_autocast("expert_ffn", cast=WEIGHT_NAMES | {"x"})
