"""What LTE is compared with: oracle selection without training, and the same training without any FFN.

Shapes: T tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.config import Stage
from lte_compile.kernels.selection import Gradient, selection_rule
from lte_compile.passes.ir import FfnSite
from lte_compile.train_config import Phase


@selection_rule("none", gradient=Gradient.NONE)
def none(scores: Tensor, tau: float) -> Tensor:
    """No expert, ever: what is left of a model without its FFNs. The control that says what they are worth."""
    return torch.zeros_like(scores)


def ffn_free_phase(steps: int) -> Phase:
    """Training of a transformed model in which no expert is ever selected."""
    return Phase(name="FFN-free control", steps=steps, stage=Stage.HARD, selection="none")


@contextmanager
def oracle_selection(model: nn.Module, sites: Sequence[FfnSite], density: float) -> Iterator[None]:
    """Keep, per token and FFN, the share `density` of neurons with the largest |hidden activation|; zero the rest.

    The oracle has computed them all first: an upper bound for selection without training ("KLA" in the paper).
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1]; got {density!r}")

    def keep_largest(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TF = args[0]
        kept = max(1, round(density * hidden_TF.shape[-1]))
        smallest_T1 = hidden_TF.abs().topk(kept, dim=-1).values[..., -1:]
        return (hidden_TF * (hidden_TF.abs() >= smallest_T1), *args[1:])

    with ExitStack() as stack:
        for site in sites:
            down = model.get_submodule(site.down.rpartition(".")[0])
            stack.callback(down.register_forward_pre_hook(keep_largest).remove)
        yield
