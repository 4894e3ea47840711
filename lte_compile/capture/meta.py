"""Models on the meta device, whose tensors have a shape and no data: traced as if they lay on the CPU.

Meta tensors do not mix with the real ones that a model's code makes (a table of positions, a buffer, your inputs), and
fake tensors do: they carry a pretended device and cost as little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")


def is_meta(module: nn.Module) -> bool:
    """Whether any of the module's parameters has no data."""
    return any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def as_if_on_cpu(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Inside the block the model's meta tensors are fake CPU tensors; tied ones stay tied, real ones stay real.

    Yields the fake mode they belong to, in which the model can be run.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    stand_ins: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for tensors in _tensor_stores(model):
            for name, tensor in [item for item in tensors.items() if _lacks_data(item[1])]:
                if id(tensor) not in stand_ins:
                    stand_ins[id(tensor)] = _stand_in(tensor, fakes)
                tensors[name] = stand_ins[id(tensor)]
                replaced.append((tensors, name, tensor))
        yield fakes
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def inputs_as_if_on_cpu(inputs: Any, fakes: FakeTensorMode) -> Any:
    """Nested inputs with their meta tensors replaced as `as_if_on_cpu` does it for parameters."""
    return tree_map_only(Tensor, lambda tensor: _stand_in(tensor, fakes) if _lacks_data(tensor) else tensor, inputs)


def _stand_in(tensor: Tensor, fakes: FakeTensorMode) -> Tensor:
    """A fake CPU tensor of a meta tensor's shape, strides and dtype; a parameter for a parameter."""
    fake = FakeTensor(fakes, tensor.detach(), CPU)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _lacks_data(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta and not isinstance(value, FakeTensor)


def _tensor_stores(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Where modules keep tensors: parameters, buffers, and plain attributes."""
    for module in model.modules():
        yield module._parameters
        yield module._buffers
        yield vars(module)
