"""torch.compile for training: one compiled function for all the layers that a model repeats.

    with compiled_layers(model):
        loss = model(**batch).loss      # the first layer compiles, the others use what it compiled

Compiling a whole transformer takes as many times longer as it has layers. Here Dynamo sees one layer; hooks that are on
the layer itself (FSDP's), and all that is outside of layers, run as before. Scores that routers show to an open
`trace_routers` leave the compiled function as results and are recorded outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from itertools import chain
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.routing.router import Router, routers

Forward: TypeAlias = Callable[..., Any]
# Steps that may compile. Batches of two shapes make Dynamo compile for any shape, which runs slower; a shape that comes
# once, or first comes later, such as that of an epoch's last batch, is not worth the wait and runs eagerly.
COMPILING_STEPS = 8
BACKEND = "inductor"  # of layers with routers
DENSE_BACKEND = "inductor"


class Accelerated:
    """Compiled layers of a model and its teacher during a phase's steps, and only there.

    `coarse`: what is left in float32 may be multiplied in TF32.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, *, enabled: bool, coarse: bool = False) -> None:
        self.compiled = [_Compiled(model, with_gradients=True)] if enabled else []
        if enabled and teacher is not None:
            self.compiled.append(_Compiled(teacher, with_gradients=False))
        self.coarse = coarse
        self.steps = 0
        self.seen: set[Hashable] = set()

    @contextmanager
    def step(self, shape: Hashable = None) -> Iterator[None]:
        """One step on a batch of this shape, compiled from its second time on.

        None is for batches with padding: they come in too many lengths, and run eagerly.
        """
        is_known = shape in self.seen
        self.seen.add(shape)
        if shape is None or not is_known or not self.compiled:
            yield
            return
        self.steps += 1
        stance = "default" if self.steps <= COMPILING_STEPS else "eager_on_recompile"
        with ExitStack() as stack:
            for compiled in self.compiled:
                stack.enter_context(compiled.installed())
            if self.coarse:
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
            stack.enter_context(torch.compiler.set_stance(stance))
            yield


def repeated_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The outermost layers of one class that the model holds in lists; the model itself if there are none."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer before inner
        if isinstance(module, nn.ModuleList) and module not in inside:
            kinds = Counter(type(layer) for layer in module)
            layers = [layer for layer in module if kinds[type(layer)] > 1]
            found += layers
            inside.update(inner for layer in layers for inner in layer.modules())
    return tuple(found) or (model,)


class _Compiled:
    """The repeated layers of one model, with the function that all of them share."""

    def __init__(self, model: nn.Module, *, with_gradients: bool) -> None:
        # A forward of the instance's own is a function of this layer alone.
        layers = [layer for layer in repeated_layers(model) if "forward" not in vars(layer)]
        settings = frozenset((type(router), router.rule, router.threshold) for router in routers(model))
        backend = BACKEND if settings else DENSE_BACKEND
        compiled = _compiled(backend, with_gradients, frozenset(map(type, layers)), settings)
        self.forwards = [_CompiledForward(layer, compiled, with_gradients) for layer in layers]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Names, parameters and state dicts stay as they are."""
        with ExitStack() as stack:
            stack.enter_context(_one_expectation([r for forward in self.forwards for r in forward.routers]))
            for forward in self.forwards:
                stack.callback(delattr, forward.layer, "forward")
                forward.layer.forward = forward.wrapped
                stack.enter_context(_no_calls_after_errors(forward.layer))
            yield


@contextmanager
def _one_expectation(found: Sequence[Router]) -> Iterator[None]:
    """All routers expect the density of all: with one of its own in every layer, none would share compiled code."""
    before = [router.score_quantiles for router in found]
    pooled = tuple(sorted(chain.from_iterable(before)))
    for router in found:
        router.score_quantiles = pooled
    try:
        yield
    finally:
        for router, quantiles in zip(found, before, strict=True):
            router.score_quantiles = quantiles


@contextmanager
def _no_calls_after_errors(layer: nn.Module) -> Iterator[None]:
    """Forward hooks run after a call that returned, not after one that raised.

    Dynamo guards which hooks run always by their numbers, which no other layer's hooks have.
    """
    numbers = [module._forward_hooks_always_called for module in layer.modules()]
    before = [dict(of_module) for of_module in numbers]
    for of_module in numbers:
        of_module.clear()
    try:
        yield
    finally:
        for of_module, always in zip(numbers, before, strict=True):
            of_module.update(always)


def _call(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@lru_cache(maxsize=16)
def _compiled(backend: Any, *kind: Hashable) -> Forward:
    """A compiled `_call` for each kind of layers: the next training of such a model needs no compiling.

    With code of its own, because Dynamo keeps what it compiled, and limits how often it does, by code object.
    """
    own: Forward = torch.compile(FunctionType(_call.__code__.replace(), globals(), _call.__name__), backend=backend)
    return own


class _Scores:
    """Takes the place of a trace while a compiled layer runs."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, ...] = ()

    def record(self, router: Router, scores_TE: Tensor) -> None:
        self.seen = (*self.seen, scores_TE)


class _CompiledForward:
    """A layer's forward through the shared compiled function."""

    def __init__(self, layer: nn.Module, compiled: Forward, with_gradients: bool) -> None:
        self.layer = layer
        self.eager = layer.forward
        self.compiled = compiled
        self.routers = tuple(routers(layer))
        self.needs_no_mask = False

        @wraps(self.eager)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            is_wanted = torch.is_grad_enabled() == with_gradients
            return self.run(args, kwargs) if is_wanted else self.eager(*args, **kwargs)

        self.wrapped = wrapped

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        kwargs = self._without_needless_mask(kwargs)
        watched = [(router, router.sink, _Scores()) for router in self.routers if router.sink is not None]
        with ExitStack() as stack:
            for router, sink, scores in watched:
                router.sink = scores
                stack.callback(setattr, router, "sink", sink)
            output = self.compiled(self.layer, args, kwargs)
        for router, sink, scores in watched:
            for scores_TE in scores.seen:
                sink.record(router, scores_TE)
        return output

    def _without_needless_mask(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Transformers leaves out masks that mask nothing, but cannot look while a CUDA graph is recorded: the same
        call did without before."""
        if kwargs.get("attention_mask") is not None and _is_recording():
            return {**kwargs, "attention_mask": None} if self.needs_no_mask else kwargs
        self.needs_no_mask = kwargs.get("attention_mask", self) is None
        return kwargs


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
