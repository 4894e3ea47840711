"""FSDP2 over a model's layers, and tensors to and from it. Imported when a model is sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, size: int) -> nn.Module:
    """Shard every layer, then what is left, in place. Parameters become contiguous, as FSDP insists."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (size,))
    for module in (*layers_of(model), model):
        # Also the outermost one: between an evaluation and the next step its parameters are to be shards, as others'.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_force_sum_reduction_for_comms(True)  # losses are shares of the batch's: gradients add up
        sharded.set_gradient_divide_factor(1.0)
    return model


def layers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Modules to gather one at a time, inner ones first: those that a transformers model calls unsplittable.

    A layer that shares a parameter with something outside of it is none: FSDP2 would untie them. Of other models
    nobody knows which modules are only ever called as a whole, so they have none.
    """
    names = frozenset(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    tied = _tied_between(model, layers)
    return tuple(layer for layer in reversed(layers) if not any(id(p) in tied for p in layer.parameters()))


def _tied_between(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Parameters that several layers have, or a layer and the rest of the model."""
    home = {module: layer for layer in layers for module in layer.modules()}  # the innermost layer
    homes: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            homes.setdefault(id(parameter), set()).add(home.get(module, model))
    return {parameter for parameter, found in homes.items() if len(found) > 1}


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its shards; every process has to ask."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a whole tensor that every process has; counts of steps stay as they are."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
