"""What the FFN ops share: the weights of one feed-forward network, their checks, and its hidden value.

Shape suffixes: D model width, F neurons; any leading dimensions come before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.hidden import check_hidden, hidden_of


class FfnWeights(NamedTuple):
    """One FFN in nn.Linear orientation; gated where `gate` is given. kernels.hidden says what lies between them.

    The order is that of the ops' arguments.
    """

    up_FD: Tensor
    gate_FD: Tensor | None
    down_DF: Tensor
    up_bias_F: Tensor | None
    gate_bias_F: Tensor | None
    down_bias_D: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the projections, biases not counted."""
        gate_bytes = 0 if self.gate_FD is None else self.gate_FD.nbytes
        return self.up_FD.nbytes + gate_bytes + self.down_DF.nbytes


def check_ffn(x_D: Tensor, weights: FfnWeights, activation: str, constants: Sequence[Tensor]) -> None:
    """ValueError unless x, weights, biases and hidden function fit one another and share one floating dtype.

    The hidden function's constants may be of any floating dtype.
    """
    up, gate, down, up_bias, gate_bias, down_bias = weights
    check_hidden(activation, constants, up.shape[0] if up.ndim else 0, gated=gate is not None)
    if x_D.ndim < 1 or up.ndim != 2 or up.shape[1] != x_D.shape[-1]:
        raise ValueError(
            f"w_up must be [neurons, width] for x [..., width]; got {list(up.shape)} and {list(x_D.shape)}"
        )
    neurons, out_width = up.shape[0], down.shape[0] if down.ndim else "width"
    _check_shape("w_gate", gate, (neurons, up.shape[1]))
    _check_shape("w_down", down, (out_width, neurons))
    _check_shape("b_up", up_bias, (neurons,))
    _check_shape("b_gate", gate_bias, (neurons,))
    _check_shape("b_down", down_bias, (out_width,))
    if gate is None and gate_bias is not None:
        raise ValueError("b_gate was given without w_gate")
    dtypes = {t.dtype for t in weights if t is not None}
    if len(dtypes) > 1 or not up.is_floating_point():
        raise ValueError(f"the FFN's weights and biases need one floating dtype; got {sorted(map(str, dtypes))}")
    if not x_D.is_floating_point():
        raise ValueError(f"x must be floating point; got {x_D.dtype}")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int | str, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}]; got {list(tensor.shape)}")


def hidden_value(x_D: Tensor, weights: FfnWeights, activation: str, constants: Sequence[Tensor]) -> Tensor:
    """The value [..., F] that the down-projection reads, before any gate."""
    up_F = F.linear(x_D, weights.up_FD, weights.up_bias_F)
    gate_F = None if weights.gate_FD is None else F.linear(x_D, weights.gate_FD, weights.gate_bias_F)
    return hidden_of(activation, constants, up_F, gate_F)


def project_down(hidden_F: Tensor, weights: FfnWeights) -> Tensor:
    """[..., F] -> [..., D]. The bias is added once and never gated."""
    return F.linear(hidden_F, weights.down_DF, weights.down_bias_D)
