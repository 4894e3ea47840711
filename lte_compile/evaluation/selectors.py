"""Selectors: what is computed of a dense model's FFNs, decided by a function of their inputs and hidden values.

Routers (lte_compile.routing.router) decide by the input alone, which saves work, and belong to the model. A selector
may look at the hidden value first, as an oracle does, or drop inputs; it is put into a model for a while:

    with installed(model, [TopNeurons(site, 0.3) for site in sites]):
        model(**batch)

Shapes: D model width, F neurons, E experts, T any leading token dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lte_compile.evaluation.costs import Reads
from lte_compile.kernels.experts import count_experts
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.attach import follow_ffn, follow_other_projections


class SelectionSink(Protocol):
    """Whoever counts what selectors keep (lte_compile.evaluation.meter)."""

    def see_gates(self, selector: Selector, module: nn.Module, gates_TE: Tensor) -> None: ...
    def see_inputs(self, selector: Selector, module: nn.Module, kept_TD: Tensor) -> None: ...


class Selector(nn.Module):
    """What is kept of one FFN. This one keeps everything; others override `gates`, or `kept_inputs` too.

    Args:
        site: the FFN.
        expert_size: neurons that share a gate.
    """

    reads: ClassVar[Reads] = Reads.NEURONS
    drops_inputs: ClassVar[bool] = False
    weights_read: ClassVar[int] = 0  # entries of matrices that choosing takes beside the FFN's own

    def __init__(self, site: FfnSite, expert_size: int = 1) -> None:
        super().__init__()
        self.site = site
        self.expert_size = expert_size
        self.sink: SelectionSink | None = None

    @property
    def expert_sizes(self) -> Tensor:
        """Neurons per gate, int64 [E]; the last may be smaller."""
        experts = count_experts(self.site.hidden, self.expert_size)
        sizes_E = torch.full((experts,), self.expert_size)
        sizes_E[-1] -= experts * self.expert_size - self.site.hidden
        return sizes_E

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        """What the hidden value is scaled by, [T, E], zero for what is not computed; x is as the model gave it."""
        return hidden_TF.new_ones(*hidden_TF.shape[:-1], len(self.expert_sizes))

    def kept_inputs(self, x_TD: Tensor) -> Tensor:
        """Which inputs gate and up projection read, bool [T, D]; asked if `drops_inputs`."""
        return torch.ones_like(x_TD, dtype=torch.bool)


def selectors(model: nn.Module) -> Iterator[Selector]:
    """Those that are installed in the model now."""
    return iter(model.__dict__.get(_INSTALLED, ()))


@contextmanager
def installed(model: nn.Module, chosen: Sequence[Selector]) -> Iterator[nn.Module]:
    """Inside the block, every selector decides for its FFN.

    Raises:
        ValueError: selectors are installed already.
    """
    if any(selectors(model)):
        raise ValueError("this model has selectors already; two selections cannot be nested")
    with ExitStack() as stack:
        model.__dict__[_INSTALLED] = tuple(chosen)  # not a child: nn.Sequential would run it
        stack.callback(model.__dict__.pop, _INSTALLED)
        for selector in chosen:
            flow = _Flow(selector)
            stack.callback(follow_ffn(model, selector.site, flow.see_input, flow.see_hidden))
            if selector.drops_inputs:
                stack.callback(follow_other_projections(model, selector.site, flow.see_same_input))
        yield model


_INSTALLED = "_lte_selectors"  # under which the model knows them while they are installed


class _Flow:
    """One FFN's input on its way to the selector, and back without what is dropped."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.x_TD = torch.empty(0)

    def see_input(self, module: nn.Module, x_TD: Tensor) -> Tensor | None:
        self.x_TD = x_TD
        if not self.selector.drops_inputs:
            return None
        kept_TD = self.selector.kept_inputs(x_TD)
        if self.selector.sink is not None:
            self.selector.sink.see_inputs(self.selector, module, kept_TD)
        return x_TD * kept_TD

    def see_same_input(self, module: nn.Module, x_TD: Tensor) -> Tensor:
        return x_TD * self.selector.kept_inputs(x_TD)

    def see_hidden(self, module: nn.Module, operand_TF: Tensor) -> Tensor:
        site = self.selector.site
        rest = operand_TF.shape[-1] - site.down_start - site.hidden
        before, hidden_TF, after = operand_TF.split_with_sizes([site.down_start, site.hidden, rest], dim=-1)
        x_TD = self.x_TD.reshape(*hidden_TF.shape[:-1], self.x_TD.shape[-1])  # the parent may have flattened tokens
        gates_TE = self.selector.gates(x_TD, hidden_TF)
        if self.selector.sink is not None:
            self.selector.sink.see_gates(self.selector, module, gates_TE)
        gated_TF = torch.ops.lte.gate_hidden(hidden_TF, gates_TE, self.selector.expert_size)
        return torch.cat([before, gated_TF, after], dim=-1)
