"""Putting routers where they belong: hooks on the modules whose calls they follow, or nodes in a flattened graph."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from torch import fx, nn

from lte_compile.capture import Inputs, capture_graph_module
from lte_compile.passes.insert import InsertRouter, router_path
from lte_compile.passes.ir import FfnSite
from lte_compile.routing import Router, attach_router


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


def host_modules(site: FfnSite) -> tuple[str, str]:
    """Names of the modules whose calls a hook-based rewrite rests on."""
    return site.first_projection.rpartition(".")[0], site.down.rpartition(".")[0]


def is_flattened(model: fx.GraphModule, site: FfnSite) -> bool:
    """Whether the graph reads the site's weights itself instead of calling the modules that own them."""
    called = {node.target for node in model.graph.find_nodes(op="call_module")}
    return not called.issuperset(host_modules(site))


def _insert(model: fx.GraphModule, routers: Sequence[Router], example_inputs: Inputs | None) -> None:
    before = deepcopy(model.graph)
    insert = InsertRouter(
        routers={router.site.down: router for router in routers}, expert_size=routers[0].config.expert_size
    )
    report = insert(capture_graph_module(model, example_inputs))
    inserted = set(model.modules())
    missing = [router.site.down for router in routers if router not in inserted]
    if not missing:
        return
    model.graph = before
    for router in routers:
        if router_path(router.site) in dict(model.named_modules()):
            model.delete_submodule(router_path(router.site))
    reasons = {refusal.parameter: refusal.reason for refusal in report.refusals}
    raise ValueError(f"no router fits into the graph at {missing[0]}: {reasons.get(missing[0], 'no FFN is there')}")
