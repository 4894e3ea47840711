"""What the benchmarks of a trained checkpoint share."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


@torch.no_grad()
def without_routers(model: Model) -> Model:
    """A dense model of the same weights, on the same device and in the same dtype."""
    config: Any = copy.deepcopy(model.config)
    del config.quantization_config
    dense: Model = type(model)(config).to(device=model.device, dtype=model.dtype).eval()
    weights = model.state_dict()
    dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
    return dense
