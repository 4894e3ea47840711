"""The control that keeps every result honest: the same training without any FFN.

On a task where it loses nothing, high sparsity proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.passes.ir import FfnSite, Fusion
from lte_compile.training.config import Phase


@method("ffn-free", title="Without FFNs", granularity=Granularity.FFN, needs=Needs.TRAINING, only_density=0.0)
def ffn_free(bench: Workbench) -> AtDensity:
    model = bench.start_copy()
    gone = [site for site in bench.sites if _stands_alone(model, site)]
    silenced = [NoNeurons(site) for site in bench.sites if site not in gone]
    remove_ffns(model, gone)
    with installed(model, silenced):
        bench.train(model, "ffn-free", [Phase(name="without FFNs", steps=bench.steps)])

    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        with installed(model, silenced):
            yield model
        bench.forget("ffn-free")

    return at


class NoNeurons(Selector):
    """For an FFN that cannot be taken out of the forward that it is written in."""

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TF)


class _Gone(nn.Module):
    """In place of a projection: what an up or gate projection gives does not matter, only its width."""

    weight = None  # T5 asks for its dtype

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # nn.TransformerEncoderLayer reads weights instead of calling its layers, unless one of them has a hook.
        self.register_forward_pre_hook(_see_nothing)

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(()).expand(*x_TD.shape[:-1], self.width)


class _BiasOnly(_Gone):
    """In place of a down-projection: what an FFN gives when no expert is selected."""

    def __init__(self, width: int, bias: nn.Parameter | None) -> None:
        super().__init__(width)
        self.bias = bias

    def forward(self, hidden_TF: Tensor) -> Tensor:
        zeros_TD = super().forward(hidden_TF)
        return zeros_TD if self.bias is None else zeros_TD + self.bias


def _see_nothing(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    return None


def remove_ffns(model: nn.Module, sites: Sequence[FfnSite]) -> nn.Module:
    """Take the FFNs out of a dense model, in place: as if no expert were ever selected. Only the down biases stay.

    Trained like LTE, this is the control that says what the FFNs are worth on a task at all.

    Raises:
        ValueError: an FFN whose projections are no modules of their own.
    """
    if within := [site.down for site in sites if not _stands_alone(model, site)]:
        raise ValueError(f"{within[0]} is no weight of a module that does nothing else, so it cannot be taken out")
    for site in sites:
        projections = {name.rpartition(".")[0] for name in (site.up, site.gate) if name}
        bias = model.get_parameter(site.down_bias) if site.down_bias else None
        width = site.hidden if site.fusion is Fusion.SEPARATE else 2 * site.hidden
        for name in projections:
            model.set_submodule(name, _Gone(width))
        model.set_submodule(site.down.rpartition(".")[0], _BiasOnly(site.width, bias))
    return model


def _stands_alone(model: nn.Module, site: FfnSite) -> bool:
    """Whether its projections are modules that do nothing else, and are called to project."""
    if any(place.first is None or place.down is None or place.wrapper for place in site.places):
        return False
    first = site.hidden * site.width * (1 if site.fusion is Fusion.SEPARATE else 2)
    sizes = {site.up: first, site.gate or site.up: first, site.down: site.hidden * site.width}
    return all(_is_matrix(model, name, size) for name, size in sizes.items())


def _is_matrix(model: nn.Module, name: str, entries: int) -> bool:
    """Whether the weight is a matrix of that size, of a module with nothing else but a bias."""
    weight, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    names = {own for own, _ in owner.named_parameters()}
    return weight.dim() == 2 and weight.numel() == entries and names <= {"weight", "bias"}
