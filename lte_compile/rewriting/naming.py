"""Names of a site's parameters and modules in a model that has changed around them.

A wrapper around the model puts a prefix in front; peft moves a layer into the `base_layer` of another that takes its
place, and merging moves it back; others (torch.compile, checkpoint wrappers) put a module in between as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lte_compile.passes.ir import FfnSite, Place
from lte_compile.routing.router import Router

# Children under which wrapping layers keep the layer whose place they took.
_WRAPPED = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def current_sites(model: nn.Module) -> dict[Router, FfnSite]:
    """Each router's site, by the names that `model` has for its parameters and modules now."""
    found = ((path, router) for path, router in model.named_modules() if isinstance(router, Router))
    return {router: _as_named_in(model, router.site, path) for path, router in found}


def renamed(site: FfnSite, rename: Callable[[str], str]) -> FfnSite:
    """The site with every parameter renamed, and modules as a parameter of theirs would be."""

    def optional(name: str | None) -> str | None:
        return None if name is None else rename(name)

    def each(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(rename, names))

    return replace(
        site,
        up=rename(site.up),
        gate=optional(site.gate),
        down=rename(site.down),
        up_bias=optional(site.up_bias),
        gate_bias=optional(site.gate_bias),
        down_bias=optional(site.down_bias),
        hidden_parameters=each(site.hidden_parameters),
        up_low_rank=each(site.up_low_rank),
        gate_low_rank=each(site.gate_low_rank),
        down_low_rank=each(site.down_low_rank),
        first_projection=rename(site.first_projection),
        places=tuple(_renamed_place(place, rename) for place in site.places),
        router=rename(site.router) if site.router else "",
    )


def _renamed_place(place: Place, rename: Callable[[str], str]) -> Place:
    def module(path: str | None) -> str | None:
        return None if path is None else rename(f"{path}.weight" if path else "weight").rpartition(".")[0]

    down, wrapper = module(place.down), module(place.wrapper)
    around = None if wrapper == down else wrapper  # merging an adapter takes the wrapper away
    return Place(scope=module(place.scope) or "", first=module(place.first), down=down, wrapper=around)


def _as_named_in(model: nn.Module, site: FfnSite, router_path: str) -> FfnSite:
    if router_path == site.router_path:
        return site
    before, now = _bare(site.router_path), _bare(router_path)
    if f".{now}".endswith(f".{before}"):  # a wrapper was put around the model, or one inside of it put in or taken out
        added, removed = now.removesuffix(before), ""
    elif f".{before}".endswith(f".{now}"):
        added, removed = "", before.removesuffix(now)
    else:
        return site

    def bare(name: str) -> str:
        return added + _bare(name).removeprefix(removed)

    def present(names: tuple[str, ...]) -> tuple[str, ...]:  # merged updates are gone
        return tuple(name for name in names if _has_parameter(model, bare(name)))

    kept = replace(
        site,
        up_low_rank=present(site.up_low_rank),
        gate_low_rank=present(site.gate_low_rank),
        down_low_rank=present(site.down_low_rank),
    )
    moved = renamed(kept, lambda name: _find(model, bare(name)) or bare(name))
    return replace(moved, router=router_path if replace(moved, router="").router_path != router_path else "")


def _has_parameter(model: nn.Module, name: str) -> bool:
    found = _find(model, name)
    owner, _, attribute = (found or "").rpartition(".")
    return found is not None and attribute in model.get_submodule(owner)._parameters


def _bare(name: str) -> str:
    """Without what wrapping layers put in between."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _find(model: nn.Module, bare: str) -> str | None:
    """The name of a parameter whose bare name is given; None if a module on its way is missing."""
    module, path = model, list[str]()
    *owners, attribute = bare.split(".")
    for part in owners:
        module, path = _innermost(module, path, holds=part)
        if part not in module._modules:
            return None
        module, path = module.get_submodule(part), [*path, part]
    _, path = _innermost(module, path, holds=attribute)
    return ".".join([*path, attribute])


def _innermost(module: nn.Module, path: list[str], holds: str) -> tuple[nn.Module, list[str]]:
    """The module, or the one that it wraps if it has nothing of that name itself."""
    while holds not in module._modules and holds not in module._parameters:
        inside = next((name for name in _WRAPPED if name in module._modules), None)
        if inside is None:
            break
        module, path = module.get_submodule(inside), [*path, inside]
    return module, path
