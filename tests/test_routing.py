"""Routers: scores, gates by stage, what trains, and the hooks that carry gates from one projection to the other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.config import Stage, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.attach import attach_router
from lte_compile.routing.router import Router, require_routers, routers, set_stage
from lte_compile.running.modes import eval_mode, in_stage
from tests.routed import Block, stack, tokens


def site(width: int = 16, hidden: int = 40, **names: Any) -> FfnSite:
    fields = {"up": "up.weight", "down": "down.weight", "first_projection": "up.weight", **names}
    return FfnSite(gate=None, width=width, hidden=hidden, activation="relu", gated=False, **fields)


def router(dtype: torch.dtype = torch.float64, **config: Any) -> Router:
    made = Router(site(), TransformConfig(expert_size=12, **config), like=torch.empty(0, dtype=dtype))
    made.load_initial(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -0.5, 0, 1]))
    return made


def routed_block(expert_size: int = 12, dtype: torch.dtype = torch.float64) -> nn.Module:
    block = Block(dtype=dtype)
    block.load_state_dict(stack(1, dtype=dtype)[0].state_dict())
    made = Router(site(), TransformConfig(expert_size=expert_size), like=block.up.weight)
    made.load_initial(tokens(made.num_experts, dtype=dtype, seed=3), torch.zeros(made.num_experts))
    attach_router(block, made)
    return block


@pytest.mark.parametrize(
    "dtype, scores_dtype",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_are_computed_in_float32_or_wider(dtype: torch.dtype, scores_dtype: torch.dtype) -> None:
    made, x = router(dtype), tokens(2, 5, dtype=dtype)
    set_stage(made, "soft")
    assert made.bias is not None
    expected = torch.sigmoid(x.double() @ made.weight.double().T + made.bias.double())
    scores = made(x)
    assert scores.dtype is scores_dtype
    # float32 dot products of 16 terms; the bf16 inputs themselves are exact in both
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


def test_gates_of_each_stage() -> None:
    made, x = router(), tokens(7)
    scores = set_stage(made, "soft")(x)
    assert torch.equal(set_stage(made, "dense")(x), torch.ones(7, 4, dtype=torch.float64))
    assert torch.equal(set_stage(made, "hard")(x), (scores > 0.5).double())
    made.threshold = 0.7
    assert torch.equal(made(x), (scores > 0.7).double())
    assert 0 < (scores > 0.7).sum() < (scores > 0.5).sum()


def test_a_score_at_the_threshold_is_not_selected() -> None:
    made = router()
    made.load_initial(torch.zeros(4, 16), torch.zeros(4))
    assert not set_stage(made, "hard")(tokens(3)).any()


def test_which_rule_decides_about_activity() -> None:
    made = router()
    rules = {stage: set_stage(made, stage).active_rule for stage in Stage}
    assert rules == {Stage.DENSE: "dense", Stage.SOFT: "threshold", Stage.HARD: "threshold"}
    assert set_stage(made, "hard", selection="dense").active_rule == "dense"


@pytest.mark.parametrize("expert_size, sizes", [(40, [40]), (20, [20, 20]), (12, [12, 12, 12, 4]), (39, [39, 1])])
def test_the_last_expert_takes_what_is_left(expert_size: int, sizes: list[int]) -> None:
    made = Router(site(), TransformConfig(expert_size=expert_size))
    assert made.expert_sizes.tolist() == sizes
    assert made.num_experts == len(sizes)
    assert f"16 -> {len(sizes)} experts of {expert_size}" in repr(made)


def test_routers_without_bias() -> None:
    made = router(router_bias=False)
    assert made.bias is None
    x = tokens(3)
    torch.testing.assert_close(set_stage(made, "soft")(x), torch.sigmoid(x @ made.weight.T), rtol=1e-12, atol=0)


def test_routers_train_in_every_stage_but_the_hard_one() -> None:
    made = router()
    trains = {stage: set_stage(made, stage).weight.requires_grad for stage in Stage}
    assert trains == {Stage.DENSE: True, Stage.SOFT: True, Stage.HARD: False}


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    block, x = routed_block(), tokens(9)
    hard = set_stage(deepcopy(block), "hard")(x)
    result = set_stage(block, "soft", selection="straight_through")(x)
    result.square().sum().backward()
    made = next(routers(block))
    assert torch.equal(result, hard)
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "stage, selection, message",
    [
        ("Hard", None, "stage must be one of dense, soft, hard; got 'Hard'; did you mean 'hard'"),
        ("hard", "treshold", "unknown selection rule 'treshold'.*did you mean 'threshold'"),
    ],
)
def test_unknown_stages_and_rules_change_nothing(stage: str, selection: str | None, message: str) -> None:
    made = router()
    with pytest.raises(ValueError, match=message):
        set_stage(made, stage, selection=selection)
    assert (made.stage, made.rule) == (Stage.DENSE, "dense")


def test_models_without_routers_are_told_how_to_get_some() -> None:
    for use in (require_routers, lambda model: set_stage(model, "hard")):
        with pytest.raises(ValueError, match=r"Block has no routers; call lte_compile\.transform"):
            use(Block())


def test_the_down_projection_needs_gates_of_the_same_call() -> None:
    block: Any = routed_block()
    block(tokens(2))
    with pytest.raises(RuntimeError, match="ran before its first projection"):
        block.down(tokens(2, width=40))


class Spelled(nn.Module):
    """The block with its projections called in other ways, all computing the same."""

    def __init__(self, block: nn.Module, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = block.up, block.down, how

    def forward(self, x: Tensor) -> Tensor:
        up: Any = self.up
        down: Any = self.down
        if self.how == "keywords":
            output = down(input=torch.relu(up(input=x)))
        elif self.how == "tokens flattened before the down-projection":
            output = down(torch.relu(up(x)).flatten(0, -2))
        else:
            output = down(torch.relu(up(x.flatten(0, -2))))
        result: Tensor = x + output.view_as(x)
        return result


@pytest.mark.parametrize("how", ["keywords", "tokens flattened before the down-projection", "tokens flattened before"])
def test_the_parent_may_call_its_projections_as_it_likes(how: str) -> None:
    block, x = set_stage(routed_block(), "hard"), tokens(3, 5)
    assert torch.equal(Spelled(block, how)(x), block(x))
    assert not torch.equal(block(x), set_stage(block, "dense")(x))


class Pointwise(nn.Module):
    """An FFN of 1x1 convolutions, channels first."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(16, 40, 1).double(), nn.Conv2d(40, 16, 1).double()
        for conv, linear in ((self.up, block.up), (self.down, block.down)):
            conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


@pytest.mark.parametrize("stage", list(Stage))
def test_channels_first_projections(stage: Stage) -> None:
    block = routed_block()
    convolutions = Pointwise(block)
    attach_router(convolutions, deepcopy(next(routers(block))))
    x = tokens(2, 3, 5)
    expected = set_stage(block, stage)(x)
    result = set_stage(convolutions, stage)(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)  # sums in another order


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (1, 1)])
@pytest.mark.parametrize("stage", list(Stage))
def test_few_and_no_tokens(shape: tuple[int, ...], stage: Stage) -> None:
    block, x = set_stage(routed_block(), stage), tokens(*shape)
    assert block(x).shape == x.shape


def test_modes_are_restored_even_after_errors() -> None:
    block = routed_block()
    set_stage(block, "soft", selection="straight_through")
    block.down.eval()  # type: ignore[union-attr]
    modes = {name: module.training for name, module in block.named_modules()}

    def fail_in_other_modes() -> None:
        with eval_mode(block), in_stage(block, Stage.HARD):
            assert not any(module.training for module in block.modules())
            assert next(routers(block)).rule == "threshold"
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_other_modes()
    made = next(routers(block))
    assert {name: module.training for name, module in block.named_modules()} == modes
    assert (made.stage, made.rule, made.weight.requires_grad) == (Stage.SOFT, "straight_through", True)
