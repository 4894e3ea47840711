"""transform: find a model's FFNs, group their neurons into experts, attach routers. In place; the function is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lte_compile.attach import attach_routers, host_modules
from lte_compile.calibration import down_norms
from lte_compile.capture import Inputs, as_call
from lte_compile.config import TransformConfig
from lte_compile.grouping import GroupingRequest, group_neurons
from lte_compile.hf_registration import remember_plan
from lte_compile.inspection import inspect, require_sites
from lte_compile.modes import eval_mode
from lte_compile.passes.ir import FfnSite
from lte_compile.permutation import lay_out_neuron_major, permute_neurons, projection_rows
from lte_compile.router_init import centroid_router
from lte_compile.routing import Router, routers


@dataclass(frozen=True)
class _PlannedSite:
    """Everything about one site that is decided before the model is touched."""

    site: FfnSite
    order_F: Tensor
    router: Router


def transform(
    model: nn.Module | torch.export.ExportedProgram,
    config: TransformConfig | None = None,
    example_inputs: Inputs | None = None,
    *,
    activations: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Rewrite every FFN of `model` into a router plus experts, in place, in stage "dense": outputs stay as they were.

    Neurons are reordered so that each expert's are adjacent and a `router` is added under each FFN's first projection;
    class, parameter names, generate() and the rest stay. Router weights start from their experts' mean weights;
    `lte_compile.fit_routers` fits them to data.

    Args:
        model: a module, an fx.GraphModule, or an ExportedProgram (whose module is transformed and returned).
        config: see `TransformConfig`; the defaults are the paper's.
        example_inputs: keyword arguments as a mapping, positional ones as a sequence, or one tensor; needed for
            models that are not from transformers.
        activations: hidden activations [N, F] per site name, for grouping="coactivation"
            (`lte_compile.collect_activations`).

    Raises:
        ValueError: no FFN was found (lists every candidate and why it was refused), the model is transformed already,
            an expert would be larger than an FFN, or a weight is NaN or infinite. The model is unchanged then.
    """
    config = config or TransformConfig()
    if isinstance(model, torch.export.ExportedProgram):
        model, example_inputs = model.module(), None  # its graph carries the shapes it was exported with
    if not isinstance(model, nn.Module):
        raise ValueError(f"transform takes an nn.Module, fx.GraphModule or ExportedProgram; got {type(model).__name__}")
    if any(routers(model)):
        raise ValueError(f"{type(model).__name__} is transformed already; load the dense model to transform it anew")
    sites = require_sites(inspect(model, example_inputs))
    planned = [_plan_site(model, site, config, activations or {}) for site in sites]
    if not isinstance(model, fx.GraphModule):
        _check_hosts(model, sites, example_inputs)
    attach_routers(model, [item.router for item in planned], example_inputs)
    for item in planned:
        permute_neurons(model, item.site, item.order_F)
        lay_out_neuron_major(model, item.site)
    remember_plan(model)
    return model


def _check_hosts(model: nn.Module, sites: Sequence[FfnSite], example_inputs: Inputs | None) -> None:
    """Hooks need modules that are called, one per projection, and that do nothing but project."""
    called = _called_modules(model, example_inputs)
    for site in sites:
        first, down = host_modules(site)
        only_project = all(name in called and not any(model.get_submodule(name).children()) for name in (first, down))
        if first == down or not only_project:
            raise ValueError(_raw_parameter_message(model, site))


def _called_modules(model: nn.Module, example_inputs: Inputs | None) -> set[str]:
    """Names of the submodules whose forward runs in one call of the model."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules(remove_duplicate=False):
            if name:
                hook = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        call = as_call(model, example_inputs)
        model(*call.args, **call.kwargs)
    return called


def _raw_parameter_message(model: nn.Module, site: FfnSite) -> str:
    return (
        f"{type(model).__name__} computes the FFN {site.name or site.down!r} from parameters whose modules are not "
        f"called to project ({site.first_projection}, {site.down}), so no router can be hooked in; export the model "
        "with torch.export.export and transform the ExportedProgram, whose graph is rewritten instead"
    )


def _plan_site(
    model: nn.Module, site: FfnSite, config: TransformConfig, activations: Mapping[str, Tensor]
) -> _PlannedSite:
    for name in site.parameters:
        if not bool(torch.isfinite(model.get_parameter(name)).all()):
            raise ValueError(f"{name} holds NaN or infinity; repair the weights before transforming")
    rows_FD = projection_rows(model, site)
    order_F = group_neurons(
        GroupingRequest(
            method=config.grouping,
            weights_FD=rows_FD,
            expert_size=config.expert_size,
            seed=config.seed,
            activations_NF=_contributions(model, site, activations.get(site.name)),
            name=site.name or "the model's FFN",
        )
    )
    router = Router(site, config, like=model.get_parameter(site.up))
    weight_ED, bias_E = centroid_router(rows_FD[order_F], config.expert_size)
    router.load_initial(weight_ED, bias_E)
    router.train(model.training)
    return _PlannedSite(site, order_F, router)


def _contributions(model: nn.Module, site: FfnSite, hidden_NF: Tensor | None) -> Tensor | None:
    """Hidden values weighted by their down-projection vectors: what reaches the output (docs/grouping.md)."""
    if hidden_NF is None or hidden_NF.shape[-1:] != (site.hidden,):  # group_neurons says what is wrong with it
        return hidden_NF
    return hidden_NF * down_norms(model, site).to(hidden_NF.device)
