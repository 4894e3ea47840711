"""Router losses under gradient checkpointing, which runs a layer again during the backward pass.

Non-reentrant checkpointing keeps the graph of the first run, and nothing needs doing. The reentrant kind runs the layer
first without gradients; scores recorded then would be constants. They are recorded as leaves instead. Autograd gets to
the losses computed from them before it gets to the layers, so when a layer runs again its leaf has its gradient, which
`rejoin_losses` adds to that of the scores.

Shapes: T token positions, E experts.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

# Leaves whose layers have not run again yet. Weak: a leaf lives as long as the losses that need it. Beside the routers
# rather than on them, because weak references can be neither copied nor pickled.
_pending: WeakKeyDictionary[nn.Module, list[ref[Tensor]]] = WeakKeyDictionary()


def recomputing() -> bool:
    """True inside a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def as_leaf(router: nn.Module, scores_TE: Tensor) -> Tensor:
    """Scores computed without gradients, as what a loss can be computed from."""
    leaf_TE = scores_TE.detach().requires_grad_()
    alive = [reference for reference in _pending.get(router, ()) if reference() is not None]
    _pending[router] = [*alive, ref(leaf_TE)]
    return leaf_TE


def rejoin_losses(router: nn.Module, scores_TE: Tensor) -> Tensor:
    """The same scores, in a layer's second run, with the gradient of losses that were computed from its first run's."""
    alive = [(r, leaf_TE) for r in _pending.get(router, ()) if (leaf_TE := r()) is not None]
    same_shape = [(r, leaf_TE) for r, leaf_TE in alive if leaf_TE.shape == scores_TE.shape]
    if not same_shape or not scores_TE.requires_grad:
        return scores_TE
    # A router may run several times in a pass; the second runs come in another order, with the same values.
    with torch.no_grad():
        taken, leaf_TE = min(same_shape, key=lambda pair: float((pair[1] - scores_TE).abs().sum()))
    _pending[router] = [reference for reference, _ in alive if reference is not taken]
    joined_TE: Tensor = _AddGradientOf.apply(scores_TE, leaf_TE)  # type: ignore[no-untyped-call]
    return joined_TE


class _AddGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, leaf_TE: Tensor) -> Tensor:
        ctx.leaf_TE = leaf_TE
        return scores_TE.view_as(scores_TE)

    @staticmethod
    def backward(ctx: Any, *grads_TE: Tensor) -> tuple[Tensor, None]:
        (grad_TE,) = grads_TE
        return (grad_TE if ctx.leaf_TE.grad is None else grad_TE + ctx.leaf_TE.grad), None
