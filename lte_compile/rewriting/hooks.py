"""How gates get from a router to the hidden value: hooks on the modules that project, listeners where a forward does.

`ComputeGates` sees the FFN's input at its first projection, `ApplyGates` the hidden value at its down-projection, and a
`Handover` carries the gates between them. Both are forward pre-hooks of modules that do nothing but project; `listen`
is for a forward's own products (lte_compile.rewriting.operands).

Shapes: D model width, F neurons, E experts, T any leading token dimensions.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.rewriting.handover import Handover


class ComputeGates:
    """At the first projection: its input is the FFN's input, so the router reads it here.

    The router is the module's child of that name; `shared` stands in where several modules share one FFN's weights.
    """

    def __init__(self, handover: Handover, name: str = "router", shared: nn.Module | None = None) -> None:
        self.handover = handover
        self.name = name
        self.shared = shared

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TD = args[0] if args else next(iter(kwargs.values()))
        self.listen(module, x_TD.movedim(1, -1) if is_convolution(module) else x_TD)

    def listen(self, module: nn.Module, x_TD: Tensor) -> Tensor:
        router: Any = getattr(module, self.name) if self.shared is None else self.shared
        self.handover.put(router(x_TD))
        return x_TD


class ApplyGates:
    """At the down-projection: scales the hidden value among its input's columns [start, start + hidden) by the gates.

    `outer` is for a module around the down-projection that hands its input on, to low-rank updates too; the
    down-projection's own hook then lets the gated value pass.
    """

    def __init__(
        self,
        handover: Handover,
        expert_size: int,
        hidden: int,
        *,
        start: int = 0,
        outer: bool = False,
        keep: bool = False,
    ) -> None:
        self.handover = handover
        self.expert_size = expert_size
        self.hidden = hidden
        self.start = start
        self.outer = outer
        self.keep = keep  # the hidden value is read several times

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.handover.is_applied:
            if not self.outer:
                self.handover.clear()
            return args, kwargs
        name, hidden = (None, args[0]) if args else next(iter(kwargs.items()))
        channels_first = is_convolution(module)
        gated = self.listen(module, hidden.movedim(1, -1) if channels_first else hidden)
        if self.outer:
            self.handover.mark_applied()
        gated = gated.movedim(-1, 1) if channels_first else gated
        return ((gated, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: gated})

    def listen(self, module: nn.Module, input_TF: Tensor) -> Tensor:
        gates_TE = self.handover.take(keep=self.keep)
        rest = input_TF.shape[-1] - self.start - self.hidden
        if not self.start and not rest:
            return _gate(input_TF, gates_TE, self.expert_size)
        sizes = [self.start, self.hidden, rest]
        before, hidden_TF, after = input_TF.split_with_sizes(sizes, dim=-1)
        gated_TF = _gate(hidden_TF, gates_TE, self.expert_size)
        parts = [*([before] if self.start else []), gated_TF, *([after] if rest else [])]
        return torch.cat(parts, dim=-1)

    def as_outer(self) -> ApplyGates:
        return ApplyGates(self.handover, self.expert_size, self.hidden, start=self.start, outer=True)


class ForgetGates:
    """After the module that runs the whole FFN, also when it raised: no gates are left for another call."""

    def __init__(self, handover: Handover, *, strict: bool) -> None:
        self.handover = handover
        self.strict = strict  # gates that nobody took are an error

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        left = self.handover.is_pending
        self.handover.clear()
        if left and self.strict and output is not None:  # None: the call raised, and says why itself
            raise RuntimeError(
                f"{type(module).__name__} computed gates that its down-projection did not get: the FFN was not run to "
                "its end, or its code multiplies by another tensor than the one that lte_compile.transform saw"
            )


def is_convolution(module: nn.Module) -> bool:
    """Whether its width is axis 1, not the last."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _gate(hidden_TF: Tensor, gates_TE: Tensor, expert_size: int) -> Tensor:
    if gates_TE.shape[:-1] != hidden_TF.shape[:-1]:  # the parent flattened tokens between the two projections
        gates_TE = gates_TE.reshape(*hidden_TF.shape[:-1], gates_TE.shape[-1])
    gated_TF: Tensor = torch.ops.lte.gate_hidden(hidden_TF, gates_TE, expert_size)
    return gated_TF


def gate_wrapper(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    """Let a peft layer that takes `module` as its base layer gate its own input, which its adapter reads too."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # loaded if there is a layer of its classes
    if name != "base_layer" or module is None or peft is None or not isinstance(wrapper, peft.BaseTunerLayer):
        return
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, ApplyGates):
            wrapper.register_forward_pre_hook(hook.as_outer(), with_kwargs=True)


# peft replaces layers after transform too. It tells nobody; the only sign is that the new layer gets the old as child.
register_module_module_registration_hook(gate_wrapper)
