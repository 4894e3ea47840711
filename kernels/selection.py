"""lte::select and the registry of selection rules: how scores become gates.

A gate of zero means the expert is not selected; any other value is what its output is multiplied with. Gates are dense
[..., E] (E experts), so every rule keeps its shape and graphs stay static. A new rule is one decorated function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast

Rule = Callable[[Tensor, float], Tensor]


class Gradient(StrEnum):
    """What the scores receive in backward: nothing, or the gates' gradient unchanged."""

    NONE = "none"
    PASS = "pass"


@dataclass(frozen=True)
class SelectionRule:
    name: str
    apply: Rule
    gradient: Gradient


SELECTION_RULES: dict[str, SelectionRule] = {}


def selection_rule(name: str, *, gradient: Gradient) -> Callable[[Rule], Rule]:
    """Register a rule: (scores [..., E] in fp32 or fp64, tau) -> gates of the same shape (bool or floating)."""

    def register(rule: Rule) -> Rule:
        if name in SELECTION_RULES:
            raise ValueError(f"a selection rule named {name!r} is registered already")
        SELECTION_RULES[name] = SelectionRule(name, rule, gradient)
        return rule

    return register


def find_rule(name: str) -> SelectionRule:
    """The rule of that name, or a ValueError that lists the known ones."""
    try:
        return SELECTION_RULES[name]
    except KeyError:
        near = get_close_matches(name, SELECTION_RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown selection rule {name!r}; known are {', '.join(SELECTION_RULES)}{hint}") from None


@selection_rule("dense", gradient=Gradient.NONE)
def dense(scores: Tensor, tau: float) -> Tensor:
    """Every expert, unscaled: the original FFN."""
    return torch.ones_like(scores)


@selection_rule("soft", gradient=Gradient.PASS)
def soft(scores: Tensor, tau: float) -> Tensor:
    """Every expert, scaled by its score: the paper's training stage 1."""
    return scores


@selection_rule("threshold", gradient=Gradient.NONE)
def threshold(scores: Tensor, tau: float) -> Tensor:
    """Experts whose score exceeds tau, unscaled: the paper's stage 2 and inference. A NaN score selects nothing."""
    return scores > tau


@selection_rule("straight_through", gradient=Gradient.PASS)
def straight_through(scores: Tensor, tau: float) -> Tensor:
    """The threshold forward, the identity backward (Bengio et al. 2013, arXiv 1308.3432)."""
    return scores > tau


@selection_rule("top_share", gradient=Gradient.NONE)
def top_share(scores: Tensor, tau: float) -> Tensor:
    """The same number of experts for every token: the share tau of highest score, at least one, unscaled."""
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"top_share keeps the share tau of the experts, in [0, 1]; got {tau!r}")
    kept = min(max(1, round(tau * scores.shape[-1])), scores.shape[-1])
    chosen = scores.topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(-1, chosen, 1.0)


def select_reference(scores_E: Tensor, rule: str, tau: float) -> Tensor:
    """Gates [..., E] in the scores' dtype. Rules see fp32 at least: tau is never rounded to half precision."""
    wide_E = scores_E if scores_E.dtype == torch.float64 else scores_E.float()
    gates_E = find_rule(rule).apply(wide_E, tau).to(scores_E.dtype)
    return gates_E.clone(memory_format=torch.contiguous_format) if gates_E is scores_E else gates_E.contiguous()


def _check(scores: Tensor, rule: str) -> None:
    find_rule(rule)
    if scores.ndim < 1 or not scores.is_floating_point():
        raise ValueError(f"select needs floating point scores [..., experts]; got {scores.dtype} {list(scores.shape)}")


def check_density(density: float | None) -> None:
    """ValueError unless it is None or a share."""
    if density is not None and not 0.0 <= density <= 1.0:
        raise ValueError(f"density is the expected share of selected experts, in [0, 1]; got {density!r}")


@torch.library.custom_op("lte::select", mutates_args=())
def select(scores: Tensor, rule: str, tau: float, density: float | None = None) -> Tensor:
    """Gates by a rule. `density` is the share expected to be selected; passes hand it on to kernels, see sparse_ffn."""
    _check(scores, rule)
    check_density(density)
    return select_reference(scores, rule, tau)


@select.register_fake
def _(scores: Tensor, rule: str, tau: float, density: float | None = None) -> Tensor:
    _check(scores, rule)
    check_density(density)
    return scores.new_empty(scores.shape)


@torch.library.custom_op("lte::select_backward", mutates_args=())
def select_backward(grad: Tensor, rule: str) -> Tensor:
    """Gradient of the scores."""
    if find_rule(rule).gradient is Gradient.PASS:
        return grad.clone(memory_format=torch.contiguous_format)
    return grad.new_zeros(grad.shape)


@select_backward.register_fake
def _(grad: Tensor, rule: str) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.rule, *_ = inputs
    if find_rule(ctx.rule).gradient is Gradient.NONE:
        ctx.mark_non_differentiable(output)  # nothing downstream computes a gradient of the gates for nobody
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    of_scores = None if grad is None else torch.ops.lte.select_backward(grad, ctx.rule)
    return of_scores, *(None for _ in ctx.needs_input_grad[1:])


select.register_autograd(_backward, setup_context=_setup_context)
register_autocast("select")
register_autocast("select_backward")
