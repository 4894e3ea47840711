"""Which axes of a model's inputs stay dynamic in the exported file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

AxisNames = dict[str, dict[int, str]]
DynamicAxes = str | Mapping[str, Mapping[int, str]]

CHOICES: Final = ("batch_and_sequence", "batch", "none")

# transformers' names for inputs whose axis 1 counts tokens, with or without the prefix "decoder_".
_TOKEN_INPUTS: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})


def axis_names(inputs: Mapping[str, Any], dynamic_axes: DynamicAxes) -> AxisNames:
    """The dynamic axes of every tensor input, by name: {"input_ids": {0: "batch", 1: "sequence"}}.

    Args:
        dynamic_axes: "batch_and_sequence" (axis 0 of every input, axis 1 of transformers' token inputs), "batch",
            "none", or the result itself for inputs with other conventions.

    Raises:
        ValueError: another string; a mapping that names an unknown input or an axis the input does not have.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if isinstance(dynamic_axes, Mapping):
        return _checked(tensors, dynamic_axes)
    if dynamic_axes not in CHOICES:
        raise ValueError(
            f"dynamic_axes must be one of {', '.join(map(repr, CHOICES))} or a mapping like "
            f"{{'input_ids': {{0: 'batch'}}}}; got {dynamic_axes!r}"
        )
    if dynamic_axes == "none":
        return {name: {} for name in tensors}
    has_sequence = dynamic_axes == "batch_and_sequence"
    return {name: _conventional(name, value, has_sequence) for name, value in tensors.items()}


def _conventional(name: str, value: Tensor, has_sequence: bool) -> dict[int, str]:
    axes = {0: "batch"} if value.dim() else {}
    prefix = "decoder_" if name.startswith("decoder_") else ""
    if has_sequence and value.dim() > 1 and name.removeprefix("decoder_") in _TOKEN_INPUTS:
        axes[1] = f"{prefix}sequence"
    return axes


def _checked(tensors: Mapping[str, Tensor], given: Mapping[str, Mapping[int, str]]) -> AxisNames:
    if unknown := sorted(set(given) - set(tensors)):
        raise ValueError(f"dynamic_axes names inputs {unknown}; the model is called with {sorted(tensors)}")
    for name, axes in given.items():
        if wrong := [axis for axis in axes if not 0 <= axis < tensors[name].dim()]:
            raise ValueError(f"dynamic_axes: {name} has axes 0 to {tensors[name].dim() - 1}; got {wrong}")
    return {name: dict(given.get(name, {})) for name in tensors}


def widen(value: Tensor, axes: Mapping[int, str]) -> Tensor:
    """A copy of `value`, repeated to at least 2 along its dynamic axes: torch.export takes sizes 0 and 1 for constants.

    A copy even where nothing is repeated: the tracer records a view's base in guards that later steps cannot evaluate.
    """
    for axis in axes:
        if value.shape[axis] == 0:
            raise ValueError(f"an example input of shape {list(value.shape)} is empty; give one with values")
        if value.shape[axis] == 1:
            value = torch.cat([value, value], dim=axis)
    return value.clone()


def export_dims(axes: Mapping[int, str]) -> dict[int, Any]:
    """`axes` for torch.export: each size is free, and the tracer finds out which ones are equal."""
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
