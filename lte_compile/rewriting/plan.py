"""The plan of a transformed model: what its routers are rebuilt from, as JSON. Their weights are saved beside it.

{"format": 2, "sites": [{"site": {...}, "config": {...}, "stage": "hard", "rule": "threshold",
                         "threshold": 0.5, "score_quantiles": "0.01 0.02 ..."}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from lte_compile.config import Stage, TransformConfig, parse_stage
from lte_compile.kernels.selection import find_rule
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.attach import attach_routers
from lte_compile.rewriting.naming import current_sites, renamed
from lte_compile.rewriting.permutation import lay_out_neuron_major
from lte_compile.routing.kinds import new_router
from lte_compile.routing.router import Router, require_routers, routers

PLAN_FORMAT = 2  # raise it when a plan written now could be misread by an earlier version


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One routed FFN: where it is, how it was transformed, and the state its router is in."""

    site: FfnSite
    config: TransformConfig
    stage: Stage
    rule: str
    threshold: float
    score_quantiles: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return {
            "site": self.site.to_dict(),
            "config": self.config.to_dict(),
            "stage": self.stage.value,
            "rule": self.rule,
            "threshold": self.threshold,
            # One string: indented JSON would give each of the hundreds of numbers a line of config.json.
            "score_quantiles": " ".join(map(repr, self.score_quantiles)),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SitePlan:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"unknown fields {unknown}; known are {sorted(known)}")
        find_rule(record["rule"])
        return cls(
            site=FfnSite.from_dict(record["site"]),
            config=TransformConfig.from_dict(record["config"]),
            stage=parse_stage(record["stage"]),
            rule=record["rule"],
            threshold=float(record["threshold"]),
            score_quantiles=tuple(map(float, record["score_quantiles"].split())),
        )


def plan_of(model: nn.Module) -> dict[str, Any]:
    """The plan of a transformed model as it is now, JSON-able.

    Raises:
        ValueError: the model has no routers.
    """
    require_routers(model)
    return {"format": PLAN_FORMAT, "sites": [plan.to_dict() for plan in _site_plans(model)]}


def parse_plan(record: Mapping[str, Any]) -> tuple[SitePlan, ...]:
    """The inverse of `plan_of`.

    Raises:
        ValueError: a format this version does not read, unknown or missing fields.
    """
    written = record.get("format")
    if not isinstance(written, int) or written < 1:
        raise ValueError(f"the plan names no format (an integer from 1 to {PLAN_FORMAT}); got {written!r}")
    if written > PLAN_FORMAT:
        raise ValueError(
            f"the plan has format {written}, written by a newer lte_compile; this version reads up to {PLAN_FORMAT}: "
            "upgrade lte_compile, or save the model with this version"
        )
    if unknown := sorted(set(record) - {"format", "sites"}):
        raise ValueError(f"the plan has unknown fields {unknown}; format {PLAN_FORMAT} knows format and sites")
    sites = record.get("sites")
    if not isinstance(sites, Sequence) or not sites:
        raise ValueError("the plan lists no sites")
    return tuple(_parse_site(number, site) for number, site in enumerate(sites))


def _parse_site(number: int, record: Mapping[str, Any]) -> SitePlan:
    try:
        return SitePlan.from_dict(record)
    except KeyError as error:
        raise ValueError(f"site {number} of the plan has no field {error}") from None
    except (ValueError, TypeError, AttributeError) as error:  # a value of the wrong kind fails where it is first used
        raise ValueError(f"site {number} of the plan cannot be read: {error}") from None


def restore_routers(model: nn.Module, plans: Sequence[SitePlan]) -> None:
    """Attach the plan's routers to a dense model, on its device or meta device. Their weights are still to be loaded.

    Sites of modules that the model does not have are left out: a head-less model has another prefix, and an encoder
    loaded from an encoder-decoder's checkpoint has some of the sites only.

    Raises:
        ValueError: the model is transformed already, or has none of the sites.
    """
    if any(routers(model)):
        raise ValueError(f"{type(model).__name__} is transformed already; give a dense instance to load into")
    located = [(plan, site) for plan in plans if (site := _locate(model, plan.site)) is not None]
    if not located:
        raise ValueError(
            f"{type(model).__name__} has none of the plan's FFNs (the first is {plans[0].site.up!r}); "
            "the checkpoint is of another architecture, or of another version of this model's code"
        )
    restored = [_router(model, plan, site) for plan, site in located]
    attach_routers(model, restored)


def _router(model: nn.Module, plan: SitePlan, site: FfnSite) -> Router:
    router = new_router(site, plan.config, like=model.get_parameter(site.up))
    router.stage, router.rule = plan.stage, plan.rule
    router.threshold, router.score_quantiles = plan.threshold, plan.score_quantiles
    return router.train(model.training)


def finish_restoring(model: nn.Module) -> None:
    """What has to wait until the weights are there: the memory layout, and which routers train."""
    for router in routers(model):
        if router.stage is Stage.HARD:  # it came to run; in the others it trains, and FSDP wants weights contiguous
            lay_out_neuron_major(model, router.site)
        router.requires_grad_(router.stage is not Stage.HARD)


def _site_plans(model: nn.Module) -> Iterator[SitePlan]:
    for router, site in current_sites(model).items():
        yield SitePlan(
            site=site,
            config=router.config,
            stage=router.stage,
            rule=router.rule,
            threshold=router.threshold,
            score_quantiles=router.score_quantiles,
        )


def _locate(model: nn.Module, site: FfnSite) -> FfnSite | None:
    """The site under its own names, or with a transformers head put on or taken off; None if it is not there."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for rename in (str, lambda name: name.removeprefix(prefix), lambda name: prefix + name):
        candidate = renamed(site, rename)
        if all(_has_parameter(model, name) for name in candidate.parameters):
            return candidate
    return None


def _has_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    module = model
    for part in owner.split(".") if owner else ():
        if part not in module._modules:
            return False
        module = module.get_submodule(part)
    return attribute in module._parameters
