"""Putting routers where they belong: hooks on the modules whose calls they follow, or nodes in a flattened graph.

A transformed FFN keeps its modules and the forwards around them. The module of the first projection gains a child
`router` and a forward pre-hook that computes the gates from its own input; the down-projection gains a pre-hook that
scales its input by them through the anchor op `lte::gate_hidden`. Hooks rather than swapped classes: the leaf's type,
pickling and deepcopy stay as they were, and torch.nn.TransformerEncoderLayer's fused path, which would bypass the
rewrite, turns itself off when it sees one. Where a forward multiplies by a parameter itself, a listener to its products
stands in for the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from torch import Tensor, fx, nn

from lte_compile.capture.capture import Inputs, capture_graph_module
from lte_compile.passes.insert import InsertRouter
from lte_compile.passes.ir import FfnSite, Place
from lte_compile.rewriting.handover import Handover
from lte_compile.rewriting.hooks import ApplyGates, ComputeGates, ForgetGates, gate_wrapper, is_convolution
from lte_compile.rewriting.operands import Listener, listen
from lte_compile.routing.router import Router

Watcher = Callable[[nn.Module, Tensor], Tensor | None]  # what it returns, if anything, takes the operand's place


def attach_routers(model: nn.Module, routers: Sequence[Router], example_inputs: Inputs | None = None) -> None:
    """Attach each router to its site. `example_inputs` are for GraphModules without fake values.

    Raises:
        ValueError: a flattened graph computes a site in a way that no router can be inserted into; it is unchanged.
    """
    flattened = [router for router in routers if isinstance(model, fx.GraphModule) and is_flattened(model, router.site)]
    if flattened and isinstance(model, fx.GraphModule):
        _insert(model, flattened, example_inputs)
    for router in routers:
        if router not in flattened:
            attach_router(model, router)


def attach_router(model: nn.Module, router: Router) -> None:
    """Put `router` into the model and hook both projections wherever they run. Parameters stay untouched."""
    site = router.site
    host, _, name = site.router_path.rpartition(".")
    model.get_submodule(host).add_module(name, router)
    handover = Handover()
    for place in site.places or (usual_place(site),):
        shared = None if (place.scope if place.first is None else place.first) == host else router
        compute = ComputeGates(handover, name, shared)
        reads_twice = place.down is None and bool(site.down_low_rank)
        apply = ApplyGates(handover, router.config.expert_size, site.hidden, start=site.down_start, keep=reads_twice)
        _follow_input(model, site, place, compute)
        _follow_hidden(model, site, place, apply)
        forget = ForgetGates(handover, strict=not reads_twice)
        model.get_submodule(place.scope).register_forward_hook(forget, always_call=True)


def follow_ffn(model: nn.Module, site: FfnSite, see_input: Watcher, see_hidden: Watcher) -> Callable[[], None]:
    """Show an FFN's inputs [..., D] and what its down-projection reads, before any gates; returns a function to stop.

    The hidden value is that input's columns from `site.down_start` on. Both come with the module that was called.
    """
    with ExitStack() as stack:
        for place in site.places or (usual_place(site),):
            stack.callback(_follow_operand(model, place, place.first, site.first_projection, see_input))
            stack.callback(_follow_operand(model, place, _outermost(place), site.down, see_hidden))
        return stack.pop_all().close


def follow_other_projections(model: nn.Module, site: FfnSite, see_input: Watcher) -> Callable[[], None]:
    """Show `see_input` what the projections read that `follow_ffn` leaves out: the later one of gate and up, if any."""
    later = {site.up, site.gate or site.up} - {site.first_projection}
    with ExitStack() as stack:
        for place in site.places or (usual_place(site),):
            for weight in later:
                path = None if place.first is None else weight.rpartition(".")[0]
                stack.callback(_follow_operand(model, place, path, weight, see_input))
        return stack.pop_all().close


def _follow_operand(model: nn.Module, place: Place, path: str | None, weight: str, see: Watcher) -> Callable[[], None]:
    """Show what the module at `path` is called with, or, without one, what the place multiplies by `weight`."""
    if path is None:
        scope = model.get_submodule(place.scope)
        return listen(scope, name_within(model, place.scope, weight), _listener(see), first=True)
    module = model.get_submodule(path)
    return module.register_forward_pre_hook(_pre_hook(see), with_kwargs=True, prepend=True).remove


def _outermost(place: Place) -> str | None:
    """What is called with the hidden value first: peft's layers are around their `base_layer`."""
    path = place.wrapper or place.down
    return None if path is None else path.removesuffix(".base_layer")


def _listener(see: Watcher) -> Listener:
    def hear(module: nn.Module, operand: Tensor) -> Tensor:
        changed = see(module, operand)
        return operand if changed is None else changed

    return hear


def _pre_hook(see: Watcher) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, given = (None, args[0]) if args else next(iter(kwargs.items()))
        channels_first = is_convolution(module)
        changed = see(module, given.movedim(1, -1) if channels_first else given)
        if changed is None:
            return None
        changed = changed.movedim(-1, 1) if channels_first else changed
        return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})

    return hook


def usual_place(site: FfnSite) -> Place:
    """The place of an FFN whose weights are those of modules that are called to project."""
    first, down = host_modules(site)
    return Place(scope=common_path(first, down), first=first, down=down)


def common_path(first: str, second: str) -> str:
    """The innermost module that contains both."""
    shared = []
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def router_host(site: FfnSite) -> str:
    """The module that gets the site's router as a child: what the first hook is on."""
    place = next(iter(site.places), usual_place(site))
    return place.scope if place.first is None else place.first


def _follow_input(model: nn.Module, site: FfnSite, place: Place, compute: ComputeGates) -> None:
    if place.first is not None:
        model.get_submodule(place.first).register_forward_pre_hook(compute, with_kwargs=True)
        return
    scope = model.get_submodule(place.scope)
    listen(scope, name_within(model, place.scope, site.first_projection), compute.listen)


def _follow_hidden(model: nn.Module, site: FfnSite, place: Place, apply: ApplyGates) -> None:
    if place.down is None:
        scope = model.get_submodule(place.scope)
        for name in (site.down, *site.down_low_rank):
            listen(scope, name_within(model, place.scope, name), apply.listen)
        return
    down = model.get_submodule(place.down)
    down.register_forward_pre_hook(apply, with_kwargs=True)
    if place.wrapper is not None:
        model.get_submodule(place.wrapper).register_forward_pre_hook(apply.as_outer(), with_kwargs=True)
    parent, _, name = place.down.rpartition(".")
    if parent != place.wrapper:
        gate_wrapper(model.get_submodule(parent), name, down)


def name_within(model: nn.Module, scope: str, parameter: str) -> str:
    """The name that a parameter of the model has in one of its modules, which may know it by another than its first."""
    wanted = model.get_parameter(parameter)
    names = model.get_submodule(scope).named_parameters(remove_duplicate=False)
    found = [name for name, tensor in names if tensor is wanted]
    assert found, (scope, parameter)
    own = parameter.removeprefix(f"{scope}.")
    return own if own in found else found[0]


def host_modules(site: FfnSite) -> tuple[str, str]:
    """Names of the modules that own the weights of the first and of the down-projection."""
    return site.first_projection.rpartition(".")[0], site.down.rpartition(".")[0]


def is_flattened(model: fx.GraphModule, site: FfnSite) -> bool:
    """Whether the graph reads the site's weights itself instead of calling the modules that own them."""
    called = {node.target for node in model.graph.find_nodes(op="call_module")}
    return not called.issuperset(host_modules(site))


def _insert(model: fx.GraphModule, routers: Sequence[Router], example_inputs: Inputs | None) -> None:
    before = deepcopy(model.graph)
    insert = InsertRouter(
        routers={router.site.down: router for router in routers},
        expert_size=routers[0].config.expert_size,
        paths={router.site.down: router.site.router_path for router in routers},
    )
    report = insert(capture_graph_module(model, example_inputs))
    inserted = set(model.modules())
    missing = [router.site.down for router in routers if router not in inserted]
    if not missing:
        return
    model.graph = before
    for router in routers:
        if router.site.router_path in dict(model.named_modules()):
            model.delete_submodule(router.site.router_path)
    reasons = {refusal.parameter: refusal.reason for refusal in report.refusals}
    raise ValueError(f"no router fits into the graph at {missing[0]}: {reasons.get(missing[0], 'no FFN is there')}")
