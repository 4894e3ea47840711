"""The function from an FFN's projections to its hidden value: a named activation, or a region program over constants.

Named: act(gate) * up in a gated FFN, act(up) in a plain one. Shape suffixes: F neurons; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lte_compile.kernels.activations import find_activation
from lte_compile.kernels.program import check_constants, is_program, parse_program, program_gradients, run_program


class HiddenGradients(NamedTuple):
    """Of up [..., F], gate [..., F] (None in a plain FFN) and each constant, in their dtypes."""

    up_F: Tensor
    gate_F: Tensor | None
    constants: tuple[Tensor, ...]


def check_hidden(activation: str, constants: Sequence[Tensor], num_neurons: int, *, gated: bool) -> None:
    """ValueError unless `activation` is a name or a program for this kind of FFN, with the constants it reads."""
    if not is_program(activation):
        find_activation(activation)
        if constants:
            raise ValueError(f"activation {activation!r} reads no constants; got {len(constants)}")
        return
    program = parse_program(activation)
    if program.gated != gated:
        kind, given = ("gated", "without") if program.gated else ("plain", "with")
        raise ValueError(f"the region program is that of a {kind} FFN; it was given {given} w_gate")
    check_constants(program, constants, num_neurons)


def hidden_of(activation: str, constants: Sequence[Tensor], up_F: Tensor, gate_F: Tensor | None) -> Tensor:
    """The hidden value [..., F], before any expert's gate."""
    if is_program(activation):
        return run_program(parse_program(activation), up_F, gate_F, constants)
    act = find_activation(activation).apply
    return act(up_F) if gate_F is None else act(gate_F) * up_F


def hidden_gradients(
    activation: str, constants: Sequence[Tensor], grad_F: Tensor, up_F: Tensor, gate_F: Tensor | None
) -> HiddenGradients:
    if is_program(activation):
        return _program_gradients(activation, constants, grad_F, up_F, gate_F)
    act = find_activation(activation)
    if gate_F is None:
        return HiddenGradients(act.backward(grad_F, up_F), None, ())
    return HiddenGradients(grad_F * act.apply(gate_F), act.backward(grad_F * up_F, gate_F), ())


def _program_gradients(
    activation: str, constants: Sequence[Tensor], grad_F: Tensor, up_F: Tensor, gate_F: Tensor | None
) -> HiddenGradients:
    program = parse_program(activation)
    grads = program_gradients(program, grad_F, up_F, gate_F, constants)
    of_constants = zip(program.constant_names, constants, strict=True)
    return HiddenGradients(
        grads["up"].to(up_F.dtype),
        None if gate_F is None else grads["gate"].to(gate_F.dtype),
        tuple(grads[name].reshape(constant.shape).to(constant.dtype) for name, constant in of_constants),
    )


def constants_of_neurons(activation: str, constants: Sequence[Tensor], neurons_R: slice | Tensor) -> tuple[Tensor, ...]:
    """The constants of some neurons: a slice of them as views, or the ones at given indices as copies."""
    if not constants:
        return ()
    names = parse_program(activation).constant_names

    def rows(constant_F: Tensor) -> Tensor:
        return constant_F[neurons_R] if isinstance(neurons_R, slice) else torch.index_select(constant_F, 0, neurons_R)

    return tuple(rows(c) if name[0] == "n" else c for name, c in zip(names, constants, strict=True))
