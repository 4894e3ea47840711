"""Tiny transformed models in the hard stage, and prompts for them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.routing.router import routers, set_stage
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed


def hard(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A transformed tiny model in the hard stage whose experts matter to its output."""
    model, inputs = routed(name, torch.float32)
    return _decisive(model), inputs


def _decisive(model: nn.Module) -> nn.Module:
    """Weights that are not tiny and routers that select some experts: outputs then depend on every part."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(4)
    for number, router in enumerate(routers(model)):
        generator = torch.Generator().manual_seed(number)
        router.load_initial(torch.randn(router.weight.shape, generator=generator), torch.zeros(router.num_experts))
    return set_stage(model, "hard")


# transformers' names for how deep a model is.
_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@cache
def _shallow(name: str) -> tuple[nn.Module, dict[str, Any]]:
    deep, inputs = zoo.build(name)
    config: Any = deepcopy(deep.config)
    for depth in _DEPTHS:
        if hasattr(config, depth):
            setattr(config, depth, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(deep)(config).eval()
    return transform(model, TransformConfig(expert_size=24)), inputs


def shallow(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The same with one layer (an encoder-decoder: one each), which exports in half the time."""
    model, inputs = _shallow(name)
    return _decisive(deepcopy(model)), inputs


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids, padded on the left by 0, 2, 4 ... positions where there are several."""
    ids = torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return ids * mask, mask
