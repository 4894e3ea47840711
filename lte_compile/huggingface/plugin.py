"""The transformers plug-in: plain `from_pretrained` restores a sparse model, plain `save_pretrained` keeps its plan.

transformers' only hook between building a model and loading its weights is the quantizer interface, so a plan is
stored as a `quantization_config`. Nothing is quantized: once loaded, the model carries none of the marks that would
keep transformers from training, casting or compiling it. Without lte_compile the method is unknown to transformers,
which then loads the checkpoint's weights as the dense model they also are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lte_compile.rewriting.plan import finish_restoring, parse_plan, plan_of, restore_routers
from lte_compile.routing.router import routers


@register_quantization_config("lte")
class LteConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not type-checked
    """The plan inside a model's config. One made by `following` says what its model is like now, not what it was."""

    quant_method = "lte"

    def __init__(self, **plan: Any) -> None:
        plan.pop("quant_method", None)
        parse_plan(plan)
        self._plan: Mapping[str, Any] = plan
        self._model: weakref.ref[nn.Module] | None = None

    @classmethod
    def following(cls, model: nn.Module) -> LteConfig:
        """The plan of `model`, read anew each time it is written: stages and thresholds change after transform."""
        config = cls(**plan_of(model))
        config._model = weakref.ref(model)
        return config

    @property
    def plan(self) -> Mapping[str, Any]:
        """As `lte_compile.rewriting.plan.plan_of` gives it."""
        model = self._model() if self._model else None
        if model is not None and any(routers(model)):
            self._plan = plan_of(model)
        return self._plan

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **deepcopy(dict(self.plan))}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> LteConfig:
        """Copied along with its model, it follows the copy; copied alone, as transformers does, it stays as it is."""
        if torch.compiler.is_compiling():  # encoder-decoders copy their config in every forward; plans are not traced
            return self
        copy = type(self)(**deepcopy(dict(self.plan)))
        model = self._model() if self._model else None
        if model is not None and id(model) in memo:
            copy._model = weakref.ref(memo[id(model)])
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": self.plan, "_model": None}  # weak references cannot be pickled


def carry_plan(model: Any) -> None:
    """Put the model's plan into its config; a model that another method has quantized keeps that method's entry."""
    current = getattr(model.config, "quantization_config", None)
    method = current.get("quant_method") if isinstance(current, dict) else getattr(current, "quant_method", None)
    if method in (None, LteConfig.quant_method):
        model.config.quantization_config = LteConfig.following(model)


@register_quantizer("lte")
class LteQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not type-checked
    """Replays a plan while transformers loads a checkpoint."""

    requires_calibration = True  # a dense model becomes sparse by lte_compile.transform, not by from_pretrained

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        restore_routers(model, parse_plan(self.quantization_config.plan))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        finish_restoring(model)
        self._take_marks_off(model)
        carry_plan(model)
        return model

    def _take_marks_off(self, model: nn.Module) -> None:
        self.remove_quantization_config(model)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
