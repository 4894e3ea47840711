"""transform: the function stays, the formulas of the soft and hard stage hold, and the model stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.calibration.watching import collect_activations
from lte_compile.config import Grouping, TransformConfig
from lte_compile.inspection.sites import inspect
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.running.tracing import site_names
from lte_compile.transform import transform
from tests import zoo
from tests.routed import EXPERT_SIZE, Block, routed, routed_stack, stack, tokens

FAMILIES = ("llama", "gpt2", "bert", "opt", "t5", "phi3", "vit")
GENERATORS = ("llama", "gpt2", "opt", "t5", "phi3")
# float64 against float64, sums reordered: a few units in the last place of 1e-16, with room for two layers of them.
REORDERED = 1e-12


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def relative_difference(result: Tensor, expected: Tensor) -> float:
    return float(((result - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("name", [*FAMILIES, "albert"])
def test_dense_stage_is_the_original_function(name: str) -> None:
    original, inputs = zoo.build(name, torch.float64)
    model, _ = routed(name)
    assert relative_difference(logits(model, inputs), logits(original, inputs)) < REORDERED


@pytest.mark.parametrize("grouping", list(Grouping))
@pytest.mark.parametrize("expert_size", [1, 7, 40])
def test_every_grouping_keeps_the_function(grouping: Grouping, expert_size: int) -> None:
    model, x = stack(), tokens(3, 5)
    expected = model(x)
    sites = inspect(model, x).sites
    activations = {site.name: torch.rand(64, 40, generator=torch.Generator().manual_seed(1)) for site in sites}
    transform(model, TransformConfig(expert_size=expert_size, grouping=grouping), x, activations=activations)
    assert relative_difference(model(x), expected) < REORDERED


@pytest.mark.parametrize("name", FAMILIES)
def test_only_router_parameters_are_added(name: str) -> None:
    original, _ = zoo.build(name, torch.float64)
    model, _ = routed(name)
    before, after = original.state_dict(), model.state_dict()
    added = set(after) - set(before)
    assert set(before) <= set(after)
    assert len(added) == 2 * zoo.EXPECTED[name].sites
    assert all(".router." in key for key in added)
    assert all(after[key].shape == before[key].shape for key in before)
    assert type(model) is type(original)
    assert type(model.config) is type(original.config)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_what_the_original_generates(name: str, beams: int) -> None:
    original, inputs = zoo.build(name, torch.float64)
    model, _ = routed(name)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), original.generate(**inputs, **options))  # type: ignore[operator]


def neuron_gates(router: Router, x: Tensor, stage: str) -> Tensor:
    """DESIGN: scores = sigmoid(x W_r^T + b); gates are the scores, or 1 where they exceed tau. One per neuron."""
    assert router.bias is not None
    scores = torch.sigmoid(x @ router.weight.T + router.bias)
    gates = scores if stage == "soft" else (scores > 0.5).to(x.dtype)
    return gates.repeat_interleave(EXPERT_SIZE, dim=-1)[..., : zoo.HIDDEN]


def llama_ffn(model: Any, x: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    ffn = model.model.layers[1].mlp
    gates = neuron_gates(ffn.gate_proj.router, x, stage)
    hidden = nn.functional.silu(x @ ffn.gate_proj.weight.T) * (x @ ffn.up_proj.weight.T)
    return ffn(x), (hidden * gates) @ ffn.down_proj.weight.T


def gpt2_ffn(model: Any, x: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    ffn = model.transformer.h[1].mlp
    gates = neuron_gates(ffn.c_fc.router, x, stage)
    hidden = nn.functional.gelu(x @ ffn.c_fc.weight + ffn.c_fc.bias, approximate="tanh")
    return ffn(x), (hidden * gates) @ ffn.c_proj.weight + ffn.c_proj.bias


def phi3_ffn(model: Any, x: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    ffn = model.model.layers[1].mlp
    gates = neuron_gates(ffn.gate_up_proj.router, x, stage)
    gate, up = (x @ ffn.gate_up_proj.weight.T).chunk(2, dim=-1)
    return ffn(x), (nn.functional.silu(gate) * up * gates) @ ffn.down_proj.weight.T


def bert_ffn(model: Any, x: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    layer = model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense, layer.output.dense
    hidden = nn.functional.gelu(x @ up.weight.T + up.bias)
    expected = (hidden * neuron_gates(up.router, x, stage)) @ down.weight.T + down.bias
    return down(layer.intermediate(x)), expected


@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize(
    "name, ffn", [("llama", llama_ffn), ("gpt2", gpt2_ffn), ("phi3", phi3_ffn), ("bert", bert_ffn)]
)
def test_gates_scale_the_hidden_value(
    name: str, ffn: Callable[[Any, Tensor, str], tuple[Tensor, Tensor]], stage: str
) -> None:
    model, _ = routed(name)
    set_stage(model, stage)
    x = tokens(2, 5, width=zoo.WIDTH)
    with torch.no_grad():
        result, expected = ffn(model, x, stage)
        ungated, _ = ffn(set_stage(model, "dense"), x, stage)
    assert relative_difference(result, expected) < REORDERED
    assert relative_difference(ungated, expected) > 0.01  # gates that change nothing would prove nothing


def test_token_without_experts_gets_the_bias_of_the_down_projection() -> None:
    model, _ = routed("gpt2")
    for router in routers(model):
        router.load_initial(torch.zeros_like(router.weight), torch.full_like(router.weight[:, 0], -1.0))
    hard: Any = set_stage(model, "hard")
    ffn = hard.transformer.h[0].mlp
    result = ffn(tokens(3, width=zoo.WIDTH))
    assert torch.equal(result, ffn.c_proj.bias.expand(3, -1))


def test_copies_are_independent() -> None:
    model, inputs = routed("llama")
    hard = set_stage(deepcopy(model), "hard")
    dense_logits = logits(model, inputs)
    assert not torch.equal(logits(hard, inputs), dense_logits)
    assert torch.equal(logits(model, inputs), dense_logits)


def test_state_dict_round_trip_is_strict() -> None:
    model, inputs = routed("llama")
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(set_stage(other, "hard"), inputs), logits(set_stage(model, "hard"), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_run_in_every_stage(dtype: torch.dtype) -> None:
    model, inputs = routed("llama")
    model = model.half() if dtype is torch.float16 else model.to(dtype)
    for stage in ("dense", "soft", "hard"):
        result = logits(set_stage(model, stage), inputs)
        assert result.dtype is dtype
        assert torch.isfinite(result).all()


def test_shared_layers_are_rewritten_once() -> None:
    model, inputs = routed("albert")
    (router,) = routers(model)
    calls = []
    router.register_forward_hook(lambda *_: calls.append(1))
    logits(model, inputs)
    assert len(calls) == zoo.LAYERS


def test_two_ffns_in_one_container_get_a_router_each() -> None:
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)) for _ in range(2))
    model, x = nn.Sequential(nn.Sequential(*one, *two)).double(), tokens(4)
    expected = model(x)
    transform(model, TransformConfig(expert_size=8), x)
    assert relative_difference(model(x), expected) < REORDERED
    assert sorted(site_names(model).values()) == ["0.2", "0.5"]


def test_pytorchs_fused_encoder_layer_does_not_bypass_the_routers() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, dtype=torch.float64)
    model, x = nn.TransformerEncoder(layer, 2).eval(), tokens(2, 5)
    with torch.no_grad():  # where PyTorch takes its fused path
        expected = model(x)
        transform(model, TransformConfig(expert_size=8), x)
        assert relative_difference(model(x), expected) < REORDERED
        assert relative_difference(set_stage(model, "hard")(x), expected) > 0.01


class Convolutions(nn.Module):
    """An FFN of 1x1 convolutions, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(16, 40, 1).double(), nn.Conv2d(40, 16, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def test_ffns_of_pointwise_convolutions() -> None:
    model, x = Convolutions(), tokens(2, 3, 5).movedim(-1, 1)
    expected = model(x)
    transform(model, TransformConfig(expert_size=7), x)
    assert relative_difference(model(x), expected) < REORDERED
    assert relative_difference(set_stage(model, "hard")(x), expected) > 0.01


class RawParameters(nn.Module):
    """An FFN without modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w_up = nn.Parameter(tokens(40, seed=1))
        self.w_down = nn.Parameter(tokens(40, seed=2).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        return x + linear(torch.relu(linear(x, self.w_up)), self.w_down)


@pytest.mark.parametrize("build", [stack, RawParameters])
@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
def test_graphs_are_rewritten(route: str, build: Callable[[], nn.Module]) -> None:
    model, x = build(), tokens(3, 5)
    expected = model(x)
    graph = torch.fx.symbolic_trace(model) if route == "symbolic_trace" else torch.export.export(model, (x,))
    rewritten = transform(graph, TransformConfig(expert_size=7), x)
    assert relative_difference(rewritten(x), expected) < REORDERED
    found = list(routers(rewritten))
    for router in found:  # nothing selected: only the residual and the bias of the down-projection are left
        router.load_initial(torch.zeros_like(router.weight), torch.full_like(router.weight[:, 0], -1.0))
    nothing = set_stage(rewritten, "hard")(x)
    assert len(found) == (2 if isinstance(model, nn.Sequential) else 1)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("down.bias")]
    torch.testing.assert_close(nothing, x + sum(biases), rtol=1e-12, atol=1e-12)


class NoFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


def with_nan() -> nn.Module:
    model = stack()
    with torch.no_grad():
        model.get_parameter("1.up.weight")[3, 2] = float("nan")
    return model


@pytest.mark.parametrize(
    "build, config, message",
    [
        (lambda: NoFfn().double(), TransformConfig(), "no FFN found.*\n.*\n.*head"),
        (routed_stack, TransformConfig(), "transformed already"),
        (stack, TransformConfig(expert_size=41), "expert_size 41 is larger than the 40 neurons"),
        (with_nan, TransformConfig(expert_size=8), "1.up.weight holds NaN"),
        (stack, TransformConfig(expert_size=8, grouping=Grouping.COACTIVATION), "activations"),
    ],
)
def test_refusals_leave_the_model_as_it_was(
    build: Callable[[], nn.Module], config: TransformConfig, message: str
) -> None:
    model, x = build(), tokens(2)
    before = deepcopy(model.state_dict())
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=message):
        transform(model, config, x)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_inputs_that_cannot_be_guessed_are_asked_for() -> None:
    with pytest.raises(ValueError, match="pass example_inputs"):
        transform(stack())


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes an nn\.Module"):
        transform("llama")  # type: ignore[arg-type]


def test_traced_activations_serve_coactivation_grouping() -> None:
    model, x = Block(), tokens(64)
    expected = model(x)
    site = inspect(model, x).sites[0]
    activations = collect_activations(model, [site], [{"x": x}])
    transform(model, TransformConfig(expert_size=8, grouping=Grouping.COACTIVATION), x, activations=activations)
    assert relative_difference(model(x), expected) < REORDERED
