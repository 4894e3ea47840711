"""Gradient checkpointing: the losses, the router losses and every gradient are those of plain training."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lte_compile.routing.recomputation import _pending
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from tests.routed import routed, routed_stack, tokens

REENTRANT: dict[str, bool | None] = {"off": None, "reentrant": True, "non_reentrant": False}
RULES = (None, "straight_through")
ETA, LAMBDA = 0.3, 0.01  # L_sep is some 20 times as large as the others


def training_model(name: str, rule: str | None) -> tuple[Any, dict[str, Any]]:
    model: Any
    model, inputs = routed(name, torch.float64)
    labels = torch.tensor([0, 2]) if "Classification" in type(model).__name__ else inputs["input_ids"]
    if "decoder_input_ids" in inputs:
        labels = inputs["decoder_input_ids"]
    return set_stage(model.train(), "soft", selection=rule), {**inputs, "labels": labels}


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model


def step(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # dropout is on; a second run of a layer draws what the first drew
    with trace_routers(model) as trace:
        task = model(**batch).loss
    efficiency, separability = trace.efficiency_loss(), trace.separability_loss()
    (task + ETA * efficiency + LAMBDA * separability).backward()
    seen = {"task": task, "efficiency": efficiency, "separability": separability}
    return {**seen, **{f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_losses_and_gradients_are_those_without(name: str, kind: str, rule: str | None) -> None:
    model, batch = training_model(name, rule)
    expected = step(checkpointed(deepcopy(model), None), batch)
    actual = step(checkpointed(model, REENTRANT[kind]), batch)
    assert sum(".router." in key for key in expected) == 2 * len(tuple(routers(model)))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-12, msg=key)  # float64, sums in another order


class Shared(nn.Module):
    """One stack run several times, all runs in one checkpoint or each in its own."""

    def __init__(self, block: nn.Module, reentrant: bool | None, together: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        run = self._twice if self.together else self.block
        for _ in range(1 if self.together else 2):
            x = run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)
        return x

    def _twice(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.block(x))
        return result


def two_batches_at_once(reentrant: bool | None, together: bool) -> dict[str, Tensor]:
    """Two traced passes, one backward: the second runs come in the opposite order."""
    model = Shared(set_stage(routed_stack(), "soft"), reentrant, together)
    losses = []
    for seed in (0, 1):
        x = tokens(5, seed=seed).requires_grad_()
        with trace_routers(model) as trace:
            out = model(x)
        losses.append(out.square().mean() + (seed + 1) * trace.efficiency_loss())
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("together", [False, True])
def test_a_shared_router_in_several_passes(together: bool) -> None:
    expected, actual = (two_batches_at_once(reentrant, together) for reentrant in (None, True))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_scores_are_not_kept_without_a_backward_pass() -> None:
    model = Shared(set_stage(routed_stack(), "soft"), True, False)
    with trace_routers(model) as trace:
        model(tokens(5).requires_grad_())
    router = next(routers(model))
    assert trace.efficiency_loss().requires_grad
    del trace
    assert [reference() for reference in _pending[router]] == [None, None]


def test_tracing_without_gradients_gives_constants() -> None:
    model = set_stage(routed_stack(), "soft")
    with torch.no_grad(), trace_routers(model) as trace:
        model(tokens(5))
    assert not trace.efficiency_loss().requires_grad
