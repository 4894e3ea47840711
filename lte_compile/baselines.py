"""What LTE is compared with: oracle selection without training, and the same training without any FFN.

Shapes: T tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lte_compile.passes.ir import FfnSite, Fusion


class _Zeros(nn.Module):
    """In place of an up or gate projection: what it gives does not matter, only its width."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(()).expand(*x_TD.shape[:-1], self.hidden)


class _BiasOnly(nn.Module):
    """In place of a down-projection: what an FFN gives when no expert is selected."""

    def __init__(self, width: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.width = width
        self.bias = bias

    def forward(self, hidden_TF: Tensor) -> Tensor:
        zeros_TD = hidden_TF.new_zeros(()).expand(*hidden_TF.shape[:-1], self.width)
        return zeros_TD if self.bias is None else zeros_TD + self.bias


def remove_ffns(model: nn.Module, sites: Sequence[FfnSite]) -> nn.Module:
    """Take the FFNs out of a dense model, in place: as if no expert were ever selected. Only the down biases stay.

    Trained like LTE, this is the control that says what the FFNs are worth on a task at all.
    """
    for site in sites:
        projections = {name.rpartition(".")[0] for name in (site.up, site.gate) if name}
        bias = model.get_parameter(site.down_bias) if site.down_bias else None
        width = site.hidden if site.fusion is Fusion.SEPARATE else 2 * site.hidden
        for name in projections:
            model.set_submodule(name, _Zeros(width))
        model.set_submodule(site.down.rpartition(".")[0], _BiasOnly(site.width, bias))
    return model


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
        smallest_T1 = hidden_TF.abs().topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return (hidden_TF * (hidden_TF.abs() >= smallest_T1), *args[1:])

    with ExitStack() as stack:
        for site in sites:
            down = model.get_submodule(site.down.rpartition(".")[0])
            stack.callback(down.register_forward_pre_hook(keep_largest).remove)
        yield
