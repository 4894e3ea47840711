"""What the launches of Triton kernels depend on: the device, and how one launch follows another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.layout import as_rows
from lte_compile.kernels.program import is_program
from lte_compile.kernels.program_triton import generated_kernel
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    dependent_launch: bool  # programmatic dependent launch: Hopper and later


# Triton's interpreter runs programs one after the other: as many as a small test needs.
INTERPRETED = Gpu(3, False)


@cache
def _facts(index: int) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    return Gpu(facts.multi_processor_count, torch.version.hip is None and facts.major >= 9)


def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    return _facts(torch.cuda.current_device() if device.index is None else device.index)


def tokens_of(x: Tensor) -> Tensor:
    """[tokens, columns] of [..., columns], contiguous."""
    return as_rows(x).contiguous()


def launch_options(device: torch.device, warps: int, early: bool = False, lets_next: bool = False) -> dict[str, Any]:
    """Keyword arguments of a launch of a kernel that has a DEPENDENT constant: 1, plus 1 each for `early` and
    `lets_next`, where the device can start a launch before the one before has ended, else 0."""
    if gpu_of(device).dependent_launch:
        return {"num_warps": warps, "DEPENDENT": 1 + early + lets_next, "launch_pdl": True}
    return {"num_warps": warps, "DEPENDENT": 0}


def hidden_constants(call: SparseFfnCall) -> dict[str, Any]:
    """Constants of every kernel that reads up and gate as they lie and computes hidden values: the neurons of both have
    equal strides, and so have their biases."""
    weights, activation = call.weights, call.activation
    bias_F = weights.up_bias_F if weights.up_bias_F is not None else weights.gate_bias_F
    return {
        "ROW_STRIDE": weights.up_FD.stride(0),
        "BIAS_STRIDE": 1 if bias_F is None else bias_F.stride(0),
        "ACTIVATION": generated_kernel(activation) if is_program(activation) else activation,
        "IS_PROGRAM": is_program(activation),
    }
