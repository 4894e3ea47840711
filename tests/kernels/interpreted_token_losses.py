"""Runs the kernels of token losses in Triton's interpreter; prints {case: error}."""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch

from lte_compile.kernels import token_losses
from lte_compile.kernels.token_losses import row_losses, row_losses_reference
from tests.kernels.interpreted import poison_empty
from tests.kernels.problems import relative_error

# Tokens and classes: several blocks of 16, the last not full; fewer classes than a block; nothing.
SHAPES = {"even": (5, 48), "primes": (7, 53), "few": (3, 5), "no tokens": (0, 16)}
DTYPES = (torch.float32, torch.float16)


def errors_of(shape: tuple[int, int], dtype: torch.dtype, *, teaches: bool) -> dict[str, float]:
    """Of losses and gradients against float64; every third label is left out, and one logit is minus infinity."""
    tokens, classes = shape
    logits = (5 * torch.randn(shape)).to(dtype).requires_grad_()
    taught = (5 * torch.randn(shape)).to(dtype) if teaches else None
    labels = torch.randint(1, classes, (tokens,))
    labels[::3] = -100
    with torch.no_grad():
        for given in (logits, taught):
            if given is not None:
                given[1:2, 0] = -torch.inf
    weights = torch.rand(2, tokens)
    found, wanted = _results(row_losses, logits, labels, taught, weights), None
    wide, wide_taught = logits.detach().double().requires_grad_(), None if taught is None else taught.double()
    wanted = _results(row_losses_reference, wide, labels, wide_taught, weights)
    names = ("entropy", "distance", "gradient")
    return {name: relative_error(f, w) for name, f, w in zip(names, found, wanted, strict=True)}


def _results(function: object, logits, labels, taught, weights):  # type: ignore[no-untyped-def]
    assert callable(function)
    entropy, distance = function(logits, labels, taught)
    (gradient,) = torch.autograd.grad((weights[0] * entropy + weights[1] * distance).sum(), logits)
    return entropy, distance, gradient


def main() -> None:
    torch.manual_seed(0)
    poison_empty()
    found: dict[str, float] = {}
    with mock.patch.multiple(token_losses, _by_triton=lambda logits, taught: logits.dtype != torch.float64, BLOCK=16):
        for name, shape in SHAPES.items():
            for dtype in DTYPES:
                for teaches in (True, False):
                    case = f"{name}, {dtype}, {'taught' if teaches else 'alone'}"
                    errors = errors_of(shape, dtype, teaches=teaches)
                    found |= {f"{case}, {what}": error for what, error in errors.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
