"""Autocast for the ops: which arguments take the autocast dtype, and no autocast inside an op's implementation.

`torch.library.register_autocast` casts every floating argument to one fixed dtype. Here the dtype is whatever the
surrounding `torch.autocast` asks for, and gates, scores and router weights keep theirs: rounding them would move tokens
across the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lte", "FRAGMENT")  # type: ignore[no-untyped-call]  # registrations live as long as this object
_DEVICES = ("CPU", "CUDA")


def register_autocast(op_name: str, *, cast: frozenset[str] = frozenset()) -> None:
    """Under autocast, `lte::op_name` gets the arguments named in `cast` in the autocast dtype and the rest untouched.

    With an empty `cast` the op computes as it would outside of autocast.
    """
    op = getattr(torch.ops.lte, op_name).default
    positions = frozenset(i for i, argument in enumerate(op._schema.arguments) if argument.name in cast)
    for device in _DEVICES:
        _LIBRARY.impl(op_name, _autocast_kernel(op, positions, device.lower()), f"Autocast{device}")  # type: ignore[no-untyped-call]


def _autocast_kernel(op: Any, positions: frozenset[int], device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(_cast(arg, device, dtype) if i in positions else arg for i, arg in enumerate(args)))

    return kernel


def _cast(arg: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
    return arg.to(dtype) if eligible and arg.device.type == device else arg  # fp64 stays, as in torch's own autocast
