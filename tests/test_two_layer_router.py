"""Two-layer routers: scores, how they are fitted, and that what is around routers takes them as it takes linear ones.

Shapes: T tokens, D model width, F neurons, E experts, R features.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from lte_compile.calibration.density import calibrate, evaluate_routers, set_density
from lte_compile.calibration.fitting import fit_routers
from lte_compile.checkpoints.persistence import load_pretrained, save_pretrained
from lte_compile.checkpoints.streaming import convert_checkpoint
from lte_compile.config import Grouping, RouterKind, TransformConfig
from lte_compile.evaluation.meter import measuring
from lte_compile.passes.ir import FfnSite, Fusion
from lte_compile.rewriting.permutation import up_projection
from lte_compile.rewriting.plan import plan_of
from lte_compile.routing.kinds import new_router
from lte_compile.routing.linear_fit import RidgeRouterFit
from lte_compile.routing.router import Router, require_routers, routers, set_stage
from lte_compile.routing.two_layer import TwoLayerRouter
from lte_compile.routing.two_layer_fit import TwoLayerFit
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.checkpoints import assert_equal, in_memory, saved
from tests.routed import assert_same_outputs, stack, tokens

TWO_LAYER = TransformConfig(expert_size=12, router=RouterKind.TWO_LAYER, router_rank=5)
SITE = FfnSite(up="up.weight", gate=None, down="down.weight", width=16, hidden=40, activation="relu", gated=False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def router(dtype: torch.dtype = torch.float64, config: TransformConfig = TWO_LAYER) -> TwoLayerRouter:
    made = new_router(SITE, config, like=torch.empty(0, dtype=dtype))
    assert isinstance(made, TwoLayerRouter)
    made.load_initial(draw(4, 21), draw(4), draw(5, 16, seed=1), draw(5, seed=2))
    return made


def two_layer_stack(config: TransformConfig = TWO_LAYER) -> nn.Module:
    """The transformed stack, with features that have a say."""
    model = transform(stack(), config, tokens(3))
    for number, each in enumerate(require_routers(model)):
        each.load_initial(draw(*each.weight.shape, seed=number), torch.zeros(each.num_experts))
    return model


# ---- configuration --------------------------------------------------------------------------------------------------


def test_the_kind_is_chosen_by_name_and_linear_by_default() -> None:
    assert TransformConfig().router is RouterKind.LINEAR
    assert type(new_router(SITE, TransformConfig())) is Router
    config = TransformConfig(router="two-layer")  # type: ignore[arg-type]
    assert isinstance(new_router(SITE, config), TwoLayerRouter)
    assert TransformConfig.from_dict(json.loads(json.dumps(TWO_LAYER.to_dict()))) == TWO_LAYER


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"router": "two-layers"},
            "router must be one of linear, two-layer; got 'two-layers'; did you mean 'two-layer'",
        ),
        ({"router_rank": 8}, "router_rank belongs to two-layer routers; got 8 with router='linear'"),
        (
            {"router": "two-layer", "router_rank": 0},
            "router_rank must be a whole number of features, at least 1; got 0",
        ),
        ({"router": "two-layer", "router_rank": 2.5}, "router_rank must be a whole number .* got 2.5"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformConfig(**options)


def test_the_rank_follows_the_width_and_is_remembered() -> None:
    made = new_router(SITE, TransformConfig(router=RouterKind.TWO_LAYER))
    assert made.config.router_rank == 4  # a quarter of 16
    assert made.weight.shape == (2, 20)
    assert "features=4" in repr(made)


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_against_float64(dtype: torch.dtype) -> None:
    made, x_TD = router(dtype), tokens(3, 7, dtype=dtype)
    wide = deepcopy(made).double()
    features_TR = F.relu(F.linear(x_TD.double(), wide.feature_weight, wide.feature_bias))
    expected_TE = torch.sigmoid(F.linear(torch.cat([x_TD.double(), features_TR], -1), wide.weight, wide.bias))
    scores_TE = made.scores(x_TD)
    assert scores_TE.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    # features are rounded to the model's dtype: 2^-9 of values up to 20 in bfloat16, five of them in a logit
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(scores_TE.double(), expected_TE, rtol=0, atol=tolerance)


def test_gradients() -> None:
    scored = _Scores(router())
    names = [name for name, _ in scored.named_parameters()]

    def scores(x_TD: Tensor, *values: Tensor) -> Tensor:
        scores_TE: Tensor = torch.func.functional_call(scored, dict(zip(names, values, strict=True)), x_TD)
        return scores_TE

    inputs = [t.detach().clone().requires_grad_() for t in (tokens(6), *scored.parameters())]
    assert torch.autograd.gradcheck(scores, inputs)


class _Scores(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.router.scores(x_TD)


def test_it_starts_as_the_linear_router_it_is_given() -> None:
    made, linear = router(), new_router(SITE, TransformConfig(expert_size=12), like=torch.empty(0).double())
    for each in (made, linear):
        each.load_initial(draw(4, 16), draw(4))
    torch.testing.assert_close(made.scores(tokens(9)), linear.scores(tokens(9)), rtol=1e-12, atol=1e-12)
    assert made.feature_weight.abs().sum() > 0  # else no gradient would reach it


def test_all_of_it_trains_but_in_the_hard_stage() -> None:
    model, x = two_layer_stack(), tokens(9)
    set_stage(model, "soft", selection="straight_through")
    with trace_routers(model) as trace:
        loss = model(x).square().sum()
    (loss + trace.efficiency_loss() + trace.separability_loss()).backward()
    first = next(routers(model))
    assert {name for name, p in first.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        "weight",
        "bias",
        "feature_weight",
        "feature_bias",
    }
    set_stage(model, "hard")
    assert not any(p.requires_grad for p in first.parameters())


# ---- fitting --------------------------------------------------------------------------------------------------------


def magnitudes(tokens_: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the up-projection, and hidden values (u x)^2, whose energy no linear function of x tells."""
    up_FD = F.normalize(draw(24, 12, dtype=torch.float32))  # no neuron is larger than another
    x_TD = draw(tokens_, 12, seed=seed, dtype=torch.float32)
    return x_TD, up_FD, (x_TD @ up_FD.T).square()


@pytest.mark.parametrize("rank", [8, 24, 30])
def test_the_fit_selects_more_energy_than_the_linear_one(rank: int) -> None:
    x_TD, up_FD, hidden_TF = magnitudes(4096, seed=1)
    linear = RidgeRouterFit(torch.ones(24), 1, width=12)
    two_layer = TwoLayerFit(torch.ones(24), 1, up_FD=up_FD, rank=rank)
    for fit in (linear, two_layer):
        for part in range(4):
            fit.update(x_TD[part::4], hidden_TF[part::4])
    config = TransformConfig(expert_size=1, router=RouterKind.TWO_LAYER, router_rank=rank)
    site = FfnSite(up="u", gate=None, down="d", width=12, hidden=24, activation="relu_squared", gated=False)
    x_TD, _, hidden_TF = magnitudes(2048, seed=2)
    kept = []
    for chosen, fit in ((TransformConfig(expert_size=1), linear), (config, two_layer)):
        made = new_router(site, chosen)
        made.load_initial(*fit.solve(0.3))
        gates_TE = set_stage(made, "hard")(x_TD)
        assert float(gates_TE.mean()) == pytest.approx(0.3, abs=0.02)  # 2,048 x 24 pairs of new tokens
        kept.append(float((gates_TE * hidden_TF.square()).sum() / hidden_TF.square().sum()))
    # chance is .3, the best possible .95; features of a third of the neurons tell a third of what there is to tell
    assert kept[0] < 0.45
    assert kept[1] > kept[0] + 0.4 * min(rank, 24) / 24


def test_the_fit_does_not_depend_on_how_tokens_are_batched() -> None:
    """But for the first batch, by which features are chosen."""
    x_TD, up_FD, hidden_TF = magnitudes(512, seed=1)
    solutions = []
    for size in (64, 448):
        fit = TwoLayerFit(torch.ones(24), 4, up_FD=up_FD, rank=3)
        fit.update(x_TD[:64], hidden_TF[:64])
        for start in range(64, 512, size):
            fit.update(x_TD[start : start + size], hidden_TF[start : start + size])
        solutions.append(fit.solve(0.5))
    for one, other in zip(*solutions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_features_that_say_nothing_leave_the_fit_sound() -> None:
    """Dead neurons, constant inputs: no division by a spread of zero."""
    x_TD, hidden_TF = torch.ones(64, 12), torch.zeros(64, 24)
    fit = TwoLayerFit(torch.ones(24), 4, up_FD=torch.zeros(24, 12), rank=4)
    fit.update(x_TD[:0], hidden_TF[:0])
    fit.update(x_TD, hidden_TF)
    assert all(torch.isfinite(weight).all() for weight in fit.solve(0.5))


def test_wrong_shapes_are_named() -> None:
    fit = TwoLayerFit(torch.ones(24), 4, up_FD=torch.zeros(24, 12), rank=4)
    with pytest.raises(ValueError, match=r"expected inputs \[T, 12\] and hidden activations \[T, 24\]; got \[3, 5\]"):
        fit.update(torch.zeros(3, 5), torch.zeros(3, 24))


def test_fit_routers_and_set_density_reach_their_densities() -> None:
    config = TransformConfig(expert_size=8, router=RouterKind.TWO_LAYER, router_rank=5)  # experts of one size
    model = transform(stack(), config, tokens(3))
    batches = [{"input": tokens(2, 200, seed=seed)} for seed in range(4)]
    fit_routers(model, batches, 0.4)
    assert evaluate_routers(model, batches).density() == pytest.approx(0.4, abs=0.03)
    calibrate(set_stage(model, "hard"), batches)
    set_density(model, 0.7)
    assert evaluate_routers(model, batches).density() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("fusion", list(Fusion))
def test_the_up_projection_is_found_where_gate_and_up_are_fused(fusion: Fusion) -> None:
    layer = nn.Linear(3, 8)
    up_first = fusion in (Fusion.UP_THEN_GATE, Fusion.SEPARATE)
    rows = {Fusion.INTERLEAVED_GATE_FIRST: [1, 3, 5, 7], Fusion.INTERLEAVED_UP_FIRST: [0, 2, 4, 6]}
    expected = rows.get(fusion, [0, 1, 2, 3] if up_first else [4, 5, 6, 7])
    site = FfnSite(
        up="weight",
        gate="weight",
        down="weight",
        width=3,
        hidden=4,
        activation="silu",
        gated=True,
        up_bias="bias",
        fusion=fusion,
    )
    weight_FD, bias_F = up_projection(layer, site)
    assert torch.equal(weight_FD, layer.weight[expected])
    assert bias_F is not None
    assert torch.equal(bias_F, layer.bias[expected])


# ---- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_transformers_models_keep_it_when_saved(family: str, tmp_path: Path) -> None:
    model, inputs = zoo.build(family, torch.float64)
    with torch.no_grad():
        dense = model(**inputs).logits
        transform(model, TransformConfig(expert_size=24, router=RouterKind.TWO_LAYER))
        torch.testing.assert_close(model(**inputs).logits, dense, rtol=1e-12, atol=1e-12)
        fit_routers(model, [inputs], 0.5)
        set_stage(model, "hard")
        save_pretrained(model, tmp_path)
        restored = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
        assert plan_of(restored) == plan_of(model)
        assert {each.config.router for each in routers(restored)} == {RouterKind.TWO_LAYER}
        assert_same_outputs(restored(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, dense)
    names = {name.rpartition("router.")[2] for name in load_file(tmp_path / "model.safetensors") if "router." in name}
    assert names == {"weight", "bias", "feature_weight", "feature_bias"}


def test_modules_keep_it_when_saved(tmp_path: Path) -> None:
    model, x = set_stage(two_layer_stack(), "hard"), tokens(9)
    save_pretrained(model, tmp_path)
    restored = load_pretrained(tmp_path, model=stack())
    assert_same_outputs(restored(x), model(x))
    assert not any(p.requires_grad for each in routers(restored) for p in each.parameters())


def test_streamed_conversion_equals_the_one_in_memory(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    config = TransformConfig(expert_size=8, grouping=Grouping.RANDOM, router=RouterKind.TWO_LAYER, seed=3)
    convert_checkpoint(source, tmp_path / "streamed", config)
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole", config))


def test_the_meter_counts_both_layers() -> None:
    model = set_stage(two_layer_stack(), "hard")
    first = next(routers(model))
    assert first.weights_read == 4 * (16 + 5) + 5 * 16
    with torch.no_grad(), measuring(model) as meter:
        model(tokens(64))
    report = meter.report()
    assert report is not None
    ffn = report.neuron_density * 2 * 2 * 16 * 40  # two FFNs of two matrices
    assert report.flops_per_token == pytest.approx(2 * (ffn + 2 * first.weights_read))


def test_under_autocast_features_are_rounded_and_scores_are_not() -> None:
    made, x_TD = router(torch.float32), tokens(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores_TE = made.scores(x_TD)
    assert scores_TE.dtype is torch.float32
    torch.testing.assert_close(scores_TE, made.scores(x_TD), rtol=0, atol=0.1)  # as in bfloat16 above


def test_generation_with_a_cache(tmp_path: Path) -> None:
    model, inputs = zoo.build("llama", torch.float32)
    assert isinstance(model, tf.PreTrainedModel)
    transform(model, TransformConfig(expert_size=24, router=RouterKind.TWO_LAYER))
    fit_routers(model, [inputs], 0.5)
    set_stage(model, "hard")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4
