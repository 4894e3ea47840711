"""Runs the kernels that only serving has in Triton's interpreter; prints {case: error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys

import torch

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.serving_kernels import fill_rows, mask_hidden

TOKENS, NEURONS, EXPERT_SIZE, WIDTH, TAU = 3, 37, 5, 21, 0.5
EXPERTS = -(-NEURONS // EXPERT_SIZE)


def mask_error(number: int, name: str, dtype: torch.dtype, *, gated: bool) -> float:
    """Largest difference from torch in float64."""
    up, gate = (torch.randn(TOKENS, NEURONS).to(dtype) for _ in range(2))
    up_bias, gate_bias, router_bias = (torch.randn(size).to(dtype) for size in (NEURONS, NEURONS, EXPERTS))
    scores = torch.randn(TOKENS, EXPERTS)
    up[0, 0], scores[0, 0] = float("inf"), -100.0  # not selected: counts nothing
    selected = torch.sigmoid(scores.double() + router_bias.double()) > TAU
    activation = ACTIVATIONS[name].apply
    biased = up.double() + up_bias.double()
    hidden = activation(gate.double() + gate_bias.double()) * biased if gated else activation(biased)
    wanted = torch.where(selected.repeat_interleave(EXPERT_SIZE, 1)[:, :NEURONS], hidden, 0.0)
    pointers = (up, gate if gated else None, up_bias, gate_bias if gated else None, scores, router_bias)
    mask_hidden[(TOKENS, 3)](*pointers, number, TAU, NEURONS, EXPERTS, EXPERT_SIZE, BLOCK=16)
    return float((up.double() - wanted).abs().max())


def fill_error() -> float:
    y, bias = torch.full((TOKENS, WIDTH), float("nan")), torch.randn(WIDTH)
    fill_rows[(TOKENS, 2)](y, bias, WIDTH, BLOCK=16)
    return float((y - bias).abs().max())


def main() -> None:
    torch.manual_seed(0)
    errors = {"fill": fill_error()}
    for number, name in enumerate(ACTIVATIONS):
        for dtype in (torch.float32, torch.float16):
            for gated in (False, True):
                form = "gated" if gated else "plain"
                errors[f"{name}, {dtype}, {form}"] = mask_error(number, name, dtype, gated=gated)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
