"""Memory layout of tensors: neuron-major down-projections, tokens as rows, and results that are nobody's view.

Shape suffixes: D model width, F neurons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def neuron_major(weight_DF: Tensor) -> Tensor:
    """The same [D, F] values, F slowest in memory: `.t()` is contiguous. Itself if it is so already."""
    _check_matrix(weight_DF)
    return weight_DF if is_neuron_major(weight_DF) else weight_DF.t().contiguous().t()


def is_neuron_major(weight_DF: Tensor) -> bool:
    """Whether each neuron's D weights of a down-projection [D, F] are contiguous, neuron after neuron."""
    _check_matrix(weight_DF)
    return weight_DF.t().is_contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """[tokens, columns] of [..., columns], a view where it can be. `reshape(-1, 0)` would not know how many tokens."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def own(result: Tensor) -> Tensor:
    """`result` as an op may return it: models add to what an FFN returns in place, which autograd forbids for a view
    made inside of a custom op."""
    alias: Tensor = torch.ops.aten._unsafe_view(result, result.shape)
    return alias


def _check_matrix(weight_DF: Tensor) -> None:
    if weight_DF.ndim != 2:
        raise ValueError(f"a down-projection is a matrix [width, neurons]; got shape {list(weight_DF.shape)}")
