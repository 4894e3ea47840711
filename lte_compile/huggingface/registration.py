"""Makes transformers know lte_compile's checkpoints without importing transformers.

Importing transformers' model code takes seconds, and models that are not from transformers never need it. So the
plug-in (lte_compile.huggingface.plugin) is registered at once where transformers is loaded already, and otherwise right
after the module that holds transformers' quantizer registry has been imported by someone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

_REGISTRY = "transformers.quantizers.auto"
_PLUGIN = "lte_compile.huggingface.plugin"


def register_with_transformers() -> None:
    """Register now, or as soon as transformers' model code is imported. Calling it again changes nothing."""
    if _REGISTRY in sys.modules:
        import_module(_PLUGIN)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` has transformers' save_pretrained and from_pretrained."""
    modeling = sys.modules.get("transformers.modeling_utils")  # loaded if there is a model of its classes
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def remember_plan(model: nn.Module) -> None:
    """Let the config of a transformers model carry the plan, so that its own save_pretrained writes it too.

    Other models are left alone.
    """
    if is_transformers_model(model):
        import_module(_PLUGIN).carry_plan(model)


class _RegistryFinder(MetaPathFinder):
    """Finds the registry's module as the other finders do, and has the plug-in imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """The module's own loader, with one import added after it ran."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(_PLUGIN)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)
