"""The control that keeps every result honest: the same training without any FFN.

On a task where it loses nothing, high sparsity proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.passes.ir import FfnSite, Fusion
from lte_compile.training.config import Phase


@method("ffn-free", title="Without FFNs", granularity=Granularity.FFN, needs=Needs.TRAINING, only_density=0.0)
def ffn_free(bench: Workbench) -> AtDensity:
    model = remove_ffns(bench.start_copy(), bench.sites)
    bench.train(model, "ffn-free", [Phase(name="without FFNs", steps=bench.steps)])

    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        yield model
        bench.forget("ffn-free")

    return at


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
