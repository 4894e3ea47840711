"""Routers by the kind that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from lte_compile.config import RouterKind, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router
from lte_compile.routing.two_layer import TwoLayerRouter

ROUTER_KINDS: Mapping[RouterKind, type[Router]] = MappingProxyType(
    {RouterKind.LINEAR: Router, RouterKind.TWO_LAYER: TwoLayerRouter}
)


def new_router(site: FfnSite, config: TransformConfig, *, like: Tensor | None = None) -> Router:
    """The router that `config` asks for, its weights uninitialised; `like` sets their device and dtype."""
    return ROUTER_KINDS[config.router](site, config, like=like)
