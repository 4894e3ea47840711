"""transform: find a model's FFNs, group their neurons into experts, attach routers. In place; the function is kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lte_compile.calibration.watching import down_norms
from lte_compile.capture.capture import Inputs, as_call
from lte_compile.capture.meta import as_if_on_cpu, inputs_as_if_on_cpu, is_meta
from lte_compile.config import Grouping, TransformConfig
from lte_compile.grouping import GroupingRequest, check_expert_size, group_neurons
from lte_compile.huggingface.registration import remember_plan
from lte_compile.inspection.sites import Inspection, inspect, require_sites
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.attach import attach_routers
from lte_compile.rewriting.permutation import permute_neurons, projection_rows
from lte_compile.rewriting.places import locate, name_routers
from lte_compile.routing.kinds import new_router
from lte_compile.routing.linear_fit import centroid_router
from lte_compile.routing.router import Router, routers
from lte_compile.running.modes import eval_mode


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
            an expert would be larger than an FFN, a weight is NaN or infinite, or weights on the meta device are to
            be reordered. The model is unchanged then.
    """
    config = config or TransformConfig()
    if isinstance(model, torch.export.ExportedProgram):
        model, example_inputs = model.module(), None  # its graph carries the shapes it was exported with
    if not isinstance(model, nn.Module):
        raise ValueError(f"transform takes an nn.Module, fx.GraphModule or ExportedProgram; got {type(model).__name__}")
    if any(routers(model)):
        raise ValueError(f"{type(model).__name__} is transformed already; load the dense model to transform it anew")
    inspection = inspect(model, example_inputs)
    if not inspection.sites and (packed := _packed_layer(model)):
        raise ValueError(
            f"no FFN found: the weights of {packed} are quantized and packed, so their neurons cannot be reordered; "
            "transform the model first and quantize it afterwards"
        )
    sites = _located(model, require_sites(inspection), example_inputs)
    _mention_native_moe(inspection)
    planned = [_plan_site(model, site, config, activations or {}) for site in sites]
    attach_routers(model, [item.router for item in planned], example_inputs)
    for item in planned:
        permute_neurons(model, item.site, item.order_F)
    remember_plan(model)
    return model


def _mention_native_moe(inspection: Inspection) -> None:
    if left := inspection.native_moe_sites:
        which = f"{len(left)} sites of kind native_moe (experts the model has of itself, such as {left[0].down})"
        rewritten = len(inspection.ffn_sites)
        warnings.warn(f"{which} stay as they are; only its {rewritten} dense FFNs are rewritten", stacklevel=3)


def _packed_layer(model: nn.Module) -> str | None:
    """A layer whose weights are integers or packed objects: quantized before the transformation."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_integer = isinstance(weight, Tensor) and not weight.is_floating_point()
        if is_integer or hasattr(module, "_packed_params") or hasattr(module, "qweight"):
            return f"{name} ({type(module).__name__})"
    return None


def _located(model: nn.Module, sites: Sequence[FfnSite], example_inputs: Inputs | None) -> tuple[FfnSite, ...]:
    """The sites with the places where the model runs them; in a graph those are in its nodes."""
    if isinstance(model, fx.GraphModule):
        return tuple(name_routers(model, sites))

    def run() -> None:
        without_data = is_meta(model)
        with torch.no_grad(), eval_mode(model), as_if_on_cpu(model) as fakes:
            call = inputs_as_if_on_cpu(as_call(model, example_inputs), fakes)
            with fakes if without_data else nullcontext():
                model(*call.args, **call.kwargs)

    return locate(model, sites, run)


def _plan_site(
    model: nn.Module, site: FfnSite, config: TransformConfig, activations: Mapping[str, Tensor]
) -> _PlannedSite:
    if any(model.get_parameter(name).is_meta for name in site.parameters):
        return _plan_without_weights(model, site, config)
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
    router = new_router(site, config, like=model.get_parameter(site.up))
    weight_ED, bias_E = centroid_router(rows_FD[order_F], config.expert_size)
    router.load_initial(weight_ED, bias_E)
    router.train(model.training)
    return _PlannedSite(site, order_F, router)


def _plan_without_weights(model: nn.Module, site: FfnSite, config: TransformConfig) -> _PlannedSite:
    """A site on the meta device: its router is there too, and weights that come later keep their order."""
    if config.grouping is not Grouping.CONTIGUOUS:
        raise ValueError(
            f"grouping {config.grouping.value!r} reorders weights, and {site.up} is on the meta device, without any; "
            "convert the checkpoint with `lte-compile convert MODEL OUT`, which reads it layer by layer, load the "
            "weights first, or keep their order with grouping='contiguous'"
        )
    check_expert_size(config.expert_size, site.hidden, site.name or "the model's FFN")
    router = new_router(site, config, like=model.get_parameter(site.up))
    return _PlannedSite(site, torch.arange(site.hidden), router.train(model.training))


def _contributions(model: nn.Module, site: FfnSite, hidden_NF: Tensor | None) -> Tensor | None:
    """Hidden values weighted by their down-projection vectors: what reaches the output (docs/grouping.md)."""
    if hidden_NF is None or hidden_NF.shape[-1:] != (site.hidden,):  # group_neurons says what is wrong with it
        return hidden_NF
    return hidden_NF * down_norms(model, site).to(hidden_NF.device)
