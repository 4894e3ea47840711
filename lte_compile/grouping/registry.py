"""Grouping as an interface: one request, one registry, one function that checks both ends.

Shapes: F neurons, D model width, N traced tokens, S expert size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lte_compile.config import Grouping


@dataclass(frozen=True, kw_only=True)
class GroupingRequest:
    """What a grouping method may look at.

    Args:
        method: a `Grouping`, or the name of a method registered with `grouping_method`.
        weights_FD: rows of the up projection (of the gate projection for gated FFNs), one per neuron; any float dtype.
        expert_size: neurons per expert, S. When F is no multiple of S, the last expert holds the remaining F mod S.
        seed: the same request with the same seed gives the same permutation on the same device.
        activations_NF: traced hidden activations, one row per token; only co-activation reads them.
        name: how error messages call this FFN.
    """

    method: Grouping | str
    weights_FD: Tensor
    expert_size: int
    seed: int = 0
    activations_NF: Tensor | None = None
    name: str = "this FFN"


GroupingMethod: TypeAlias = Callable[[GroupingRequest], Tensor]
GROUPING_METHODS: dict[str, GroupingMethod] = {}


def grouping_method(name: str) -> Callable[[GroupingMethod], GroupingMethod]:
    """Register `method(request) -> permutation_F` under a name; the requests it gets are checked and on one device."""

    def register(method: GroupingMethod) -> GroupingMethod:
        if name in GROUPING_METHODS:
            raise ValueError(f"a grouping called {str(name)!r} is registered already; choose another name")
        GROUPING_METHODS[str(name)] = method
        return method

    return register


def group_neurons(request: GroupingRequest) -> Tensor:
    """Order neurons so that consecutive chunks of `expert_size` are the experts.

    Returns:
        permutation_F, int64 on the weights' device: position p of the permuted layer takes neuron permutation_F[p].

    Raises:
        ValueError: unknown method, an expert size that does not fit, weights or activations that are missing,
            of the wrong shape or not finite.
    """
    if request.method not in GROUPING_METHODS:
        known = ", ".join(sorted(GROUPING_METHODS))
        raise ValueError(f"grouping must be one of {known}; got {str(request.method)!r}")
    _check_weights(request)
    _check_activations(request)
    with torch.no_grad():
        permutation_F = GROUPING_METHODS[request.method](_detached(request))
    _check_permutation(permutation_F, request)
    return permutation_F


def _check_weights(request: GroupingRequest) -> None:
    weights_FD, size, name = request.weights_FD, request.expert_size, request.name
    if weights_FD.ndim != 2 or not weights_FD.is_floating_point():
        shape = list(weights_FD.shape)
        raise ValueError(f"{name}: weights must be a floating [neurons, width] matrix; got {weights_FD.dtype} {shape}")
    check_expert_size(size, weights_FD.shape[0], name)
    if not is_finite(weights_FD):
        raise ValueError(f"the weights of {name} hold NaN or infinity; neurons cannot be grouped by them")


def check_expert_size(size: int, neurons: int, name: str) -> None:
    """A ValueError unless `neurons` can form at least one expert of `size`."""
    if size < 1:
        raise ValueError(f"expert_size must be at least 1; got {size} for {name}")
    if size > neurons:
        raise ValueError(f"expert_size {size} is larger than the {neurons} neurons of {name}; choose at most {neurons}")


def _check_activations(request: GroupingRequest) -> None:
    activations_NF, neurons = request.activations_NF, request.weights_FD.shape[0]
    if activations_NF is None:
        return
    if activations_NF.ndim != 2 or activations_NF.shape[1] != neurons or activations_NF.shape[0] < 1:
        raise ValueError(
            f"{request.name}: activations must be [tokens, {neurons}] with at least one token; "
            f"got {list(activations_NF.shape)}"
        )
    if not is_finite(activations_NF):
        raise ValueError(f"the activations of {request.name} hold NaN or infinity; trace them again in float32")


def is_finite(values: Tensor) -> bool:
    """One pass without a mask in memory: the extremes are NaN or infinite if anything is."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())


def _detached(request: GroupingRequest) -> GroupingRequest:
    weights_FD = request.weights_FD.detach()
    if request.activations_NF is None:
        return replace(request, weights_FD=weights_FD)
    return replace(request, weights_FD=weights_FD, activations_NF=request.activations_NF.detach().to(weights_FD.device))


def _check_permutation(permutation_F: Tensor, request: GroupingRequest) -> None:
    """A registered method is foreign code: a wrong answer must not reach the weights."""
    identity_F = torch.arange(request.weights_FD.shape[0], device=permutation_F.device)
    if permutation_F.shape != identity_F.shape or not torch.equal(permutation_F.sort().values, identity_F):
        neurons = f"the {len(identity_F)} neurons of {request.name}"
        raise ValueError(f"grouping {str(request.method)!r} returned no permutation of {neurons}")
