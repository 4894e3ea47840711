"""The matrix products of an FFN with gated experts: over all tokens, or over the tokens that each expert serves.

The second way is for training with few active experts on a GPU. It computes the same values where a gate is not zero
and leaves the others unset; whoever reads its results skips those.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.gated_hidden import GatedRegion, why_not_triton
from lte_compile.kernels.layout import is_neuron_major

if TYPE_CHECKING:
    from lte_compile.kernels.token_lists import TokenLists

Pair = tuple[Tensor, Tensor | None]

# Up to which expected share of active experts a product over lists is faster than the dense one, for one matrix and for
# two that share the tokens' rows; measured for 4096 x 11008 and 1024 to 8192 tokens (docs/kernels.md).
ONE_BELOW = 0.25
TWO_BELOW = 0.45
TWO_GRADIENTS_BELOW = 0.35
# An expert's list should fill a tile of tokens; below this, most of a tile is empty.
MIN_LISTED_TOKENS = 1024
# Multiplications of one projection. Smaller products take some ten microseconds, and lists cost that too: at a density
# of .2, 768 x 3072 by 4096 tokens takes as long with lists as without, and by 1024 tokens 20 % longer.
MIN_LISTED_WORK = 2**34


class Products(Protocol):
    @property
    def skips(self) -> bool:
        """Whether values [T, F] at gates of zero are unset."""

    def into_hidden(self, x_TD: Tensor, weights: FfnWeights) -> Pair:
        """(up, gate) [T, F]; gate is None in a plain FFN."""

    def back_through_down(self, grad_TD: Tensor, down_DF: Tensor) -> Tensor:
        """The gradient [T, F] of what the down-projection read."""

    def down_gradient(self, grad_TD: Tensor, gated_TF: Tensor, down_DF: Tensor) -> Tensor:
        """The down-projection's gradient [D, F], stored as the weight is: else autograd would copy it to be so."""

    def into_hidden_gradients(self, grads_TF: Sequence[Tensor], x_TD: Tensor) -> list[Tensor]:
        """The gradients [F, D] of up, of gate, or of both."""


class DenseProducts:
    skips = False

    def into_hidden(self, x_TD: Tensor, weights: FfnWeights) -> Pair:
        up_TF = F.linear(x_TD, weights.up_FD, weights.up_bias_F)
        return up_TF, None if weights.gate_FD is None else F.linear(x_TD, weights.gate_FD, weights.gate_bias_F)

    def back_through_down(self, grad_TD: Tensor, down_DF: Tensor) -> Tensor:
        return grad_TD @ down_DF

    def down_gradient(self, grad_TD: Tensor, gated_TF: Tensor, down_DF: Tensor) -> Tensor:
        if is_neuron_major(down_DF):
            return (gated_TF.t() @ grad_TD).t()
        return grad_TD.t() @ gated_TF

    def into_hidden_gradients(self, grads_TF: Sequence[Tensor], x_TD: Tensor) -> list[Tensor]:
        return [grad_TF.t() @ x_TD for grad_TF in grads_TF]


class ListedProducts:
    """Each product over lists as far as that pays off at this density."""

    skips = True

    def __init__(self, lists: TokenLists, expert_size: int, density: float) -> None:
        self._lists = lists
        self._size = expert_size
        self._density = density
        self._dense = DenseProducts()

    def into_hidden(self, x_TD: Tensor, weights: FfnWeights) -> Pair:
        return self._rows(x_TD, (weights.up_FD, weights.gate_FD), (weights.up_bias_F, weights.gate_bias_F))

    def back_through_down(self, grad_TD: Tensor, down_DF: Tensor) -> Tensor:
        if self._density >= ONE_BELOW:
            return self._dense.back_through_down(grad_TD, down_DF)
        return self._rows(grad_TD, (down_DF.t(), None), (None, None))[0]

    def down_gradient(self, grad_TD: Tensor, gated_TF: Tensor, down_DF: Tensor) -> Tensor:
        if self._density >= ONE_BELOW:
            return self._dense.down_gradient(grad_TD, gated_TF, down_DF)
        out_DF = torch.empty_like(down_DF)
        self._outer((gated_TF, None), grad_TD, (out_DF.t(), None))
        return out_DF

    def into_hidden_gradients(self, grads_TF: Sequence[Tensor], x_TD: Tensor) -> list[Tensor]:
        if self._density >= (TWO_GRADIENTS_BELOW if len(grads_TF) == 2 else ONE_BELOW):
            return self._dense.into_hidden_gradients(grads_TF, x_TD)
        outs_FD = [x_TD.new_empty(grad_TF.shape[1], x_TD.shape[1]) for grad_TF in grads_TF]
        if len(outs_FD) == 2:
            self._outer((grads_TF[0], grads_TF[1]), x_TD, (outs_FD[0], outs_FD[1]))
        elif outs_FD:
            self._outer((grads_TF[0], None), x_TD, (outs_FD[0], None))
        return outs_FD

    def _rows(self, rows_TD: Tensor, weights_FD: Pair, biases_F: tuple[Tensor | None, Tensor | None]) -> Pair:
        from lte_compile.kernels.triton_listed_training import listed_rows  # triton exists on Linux only

        return listed_rows(rows_TD.contiguous(), self._lists, weights_FD, biases_F, self._size)

    def _outer(self, values_TF: Pair, rows_TD: Tensor, outs_FD: Pair) -> None:
        from lte_compile.kernels.triton_listed_training import listed_outer

        listed_outer(values_TF, rows_TD.contiguous(), self._lists, outs_FD, self._size)


def choose_products(
    x_TD: Tensor, gates_TE: Tensor, weights: FfnWeights, region: GatedRegion, density: float | None
) -> Products:
    """By what is expected, never by the gates' values: asking those would wait for the device."""
    if density is None or why_not_listed(x_TD, gates_TE, weights, region, density) is not None:
        return DenseProducts()
    from lte_compile.kernels.triton_listed_training import list_active

    return ListedProducts(list_active(gates_TE), region.expert_size, density)


def why_not_listed(
    x_TD: Tensor, gates_TE: Tensor, weights: FfnWeights, region: GatedRegion, density: float | None
) -> str | None:
    """Why products run over all tokens; None if over each expert's."""
    if density is None:
        return "no density is expected of the gates; lte_compile.calibrate measures it"
    limit = ONE_BELOW if weights.gate_FD is None else TWO_BELOW
    if density >= limit:
        return f"{density:.0%} of the experts are expected to be active; pays off below {limit:.0%}"
    if x_TD.dtype not in (torch.float16, torch.bfloat16):
        return f"serves float16 and bfloat16; got {x_TD.dtype}"
    tokens, (neurons, width) = x_TD.shape[0], weights.up_FD.shape
    if tokens < MIN_LISTED_TOKENS or tokens * neurons * width < MIN_LISTED_WORK:
        return f"{tokens} tokens and {neurons} x {width} weights are too small for it to pay off"
    if weights.gate_FD is not None and weights.gate_FD.stride() != weights.up_FD.stride():
        return "up and gate are stored in different layouts"
    return why_not_triton(x_TD, gates_TE, region)
