"""Runs lte::expert_ffn and its gradients through the training kernels in Triton's interpreter; prints {case: error}."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch

from lte_compile.kernels import ffn_products, gated_hidden, separability
from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.program import parse_program
from tests.kernels.interpreted import poison_empty
from tests.kernels.problems import PROGRAMS, Shape, make_constants, relative_error
from tests.kernels.training_problems import make_problem

SHAPES = {
    "even": Shape((5,), 32, 64, 16),
    "primes": Shape((3, 2), 37, 61, 12),
    "size 1": Shape((4,), 8, 11, 1),
    "one expert": Shape((17,), 16, 24, 40),
    "no tokens": Shape((0,), 8, 16, 4),
}
PRIMES = SHAPES["primes"]
FORMS = {"gated": True, "plain": False}


def errors() -> dict[str, float]:
    found: dict[str, float] = {}
    for form, gated in FORMS.items():
        for name, shape in SHAPES.items():
            for dtype in (torch.float32, torch.float16):
                found[f"{name}, {dtype}, {form}"] = make_problem(shape, gated=gated, dtype=dtype).error()
            listed = make_problem(shape, gated=gated, dtype=torch.float16, density=0.2)
            found[f"listed {name}, {form}"] = listed.error()
        for activation in ACTIVATIONS:
            found[f"{activation}, {form}"] = make_problem(PRIMES, activation=activation, gated=gated).error()
    for name, text in PROGRAMS.items():
        constants = make_constants(text, PRIMES.neurons, torch.float32)
        gated = parse_program(text).gated
        given: dict[str, Any] = {"activation": text, "gated": gated, "constants": constants}
        found[f"program {name}"] = make_problem(PRIMES, **given).error()
        found[f"listed program {name}"] = make_problem(PRIMES, dtype=torch.float16, density=0.2, **given).error()
    return found


def separability_errors() -> dict[str, float]:
    scores_TE = torch.rand(9, 13, requires_grad=True)
    wide_TE = scores_TE.detach().double().requires_grad_()
    with mock.patch.multiple(separability, _by_triton=lambda scores: True, PROGRAMS=3, BLOCK=16):
        loss = torch.ops.lte.separability(scores_TE, 0.5, 0.01)
        (gradient,) = torch.autograd.grad(loss, scores_TE)
    exact = (1 / ((wide_TE - 0.5) ** 2 + 0.01)).sum()
    (wanted,) = torch.autograd.grad(exact, wide_TE)
    return {"separability": relative_error(loss, exact), "its gradient": relative_error(gradient, wanted)}


def main() -> None:
    torch.manual_seed(0)
    poison_empty()
    # The kernels serve GPUs, and many tokens; interpreted they run on a CPU, and on a few.
    with (
        mock.patch.object(gated_hidden, "why_not_triton", return_value=None),
        mock.patch.object(ffn_products, "why_not_triton", return_value=None),
        mock.patch.multiple(ffn_products, MIN_LISTED_TOKENS=1, MIN_LISTED_WORK=0),
    ):
        json.dump(errors() | separability_errors(), sys.stdout)


if __name__ == "__main__":
    main()
