"""Batches as callers give them, and a model's inputs of one as keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from lte_compile.running.tracing import unwrapped

# Keyword arguments for a model, its positional ones, or the only one.
Batch: TypeAlias = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor


def at_least_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches.

    Raises:
        ValueError: there are none, or one was given instead of several.
    """
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Iterable):
        name = type(batches).__name__
        raise ValueError(f"batches come in a list or a DataLoader; got {name}: put a single one into a list")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("no batches were given; pass at least one, such as a dict of keyword arguments for the model")


def named_inputs(model: nn.Module, batch: object) -> Mapping[str, Any]:
    """The batch: a mapping of keyword arguments as it is; one tensor, or a tuple or list, by the names in `forward`.

    Raises:
        ValueError: it is none of these, or has values for which `forward` has no names.
    """
    if isinstance(batch, Mapping):
        return batch
    values = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(values, tuple | list):
        raise ValueError(
            "a batch is a mapping of keyword arguments for the model, a tuple or list of positional ones, or one "
            f"tensor; got {type(batch).__name__}"
        )
    return _bound(unwrapped(model), values)


def _bound(model: nn.Module, values: tuple[Any, ...] | list[Any]) -> Mapping[str, Any]:
    signature, name = inspect.signature(model.forward), type(model).__name__
    try:
        bound = signature.bind_partial(*values).arguments
    except TypeError as error:
        raise ValueError(
            f"{name}.forward takes {', '.join(signature.parameters)}, and a batch has {len(values)} values: give what "
            "it has beside the inputs by name, in a mapping, or leave it out"
        ) from error
    if unnamed := [n for n in bound if signature.parameters[n].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise ValueError(f"{name}.forward takes {unnamed[0]} by position alone; give its parameter a name")
    return bound
