"""FFNs over raw parameters, in parts of larger layers, with low-rank updates, and with shared weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from inspect import signature
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import lte_compile
from lte_compile.calibration.density import calibrate, set_density
from lte_compile.calibration.fitting import fit_routers
from lte_compile.calibration.watching import collect_activations
from lte_compile.checkpoints.persistence import load_pretrained, save_pretrained
from lte_compile.config import Grouping, TransformConfig
from lte_compile.inspection.sites import inspect
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import assert_same_outputs, tokens
from tests.routed import routed as routed_family
from tests.tiers import HIDDEN, MODELS, WIDTH, LowRank, Raw, SingleStream, TiedModules, attention

EXPERT_SIZE = 7  # does not divide the 40 neurons
ROUTERS = {"raw in a stack": 2, "raw lists": 2}
# Low-rank updates would have to be merged at every call, and weights on the left give neurons along another axis.
UNFUSED = ("low rank", "low rank raw", "raw left")
REORDERED = 1e-12  # float64 with sums reordered
X = tokens(2, 5)


def routed(name: str, stage: str = "dense") -> nn.Module:
    """A fresh copy of the transformed model, with routers that select about half."""
    return set_stage(deepcopy(_routed(name)), stage)


@cache
def _routed(name: str) -> nn.Module:
    model = transform(MODELS[name](), TransformConfig(expert_size=EXPERT_SIZE), X)
    for number, router in enumerate(routers(model)):
        generator = torch.Generator().manual_seed(number)
        router.load_initial(torch.randn(router.weight.shape, generator=generator), torch.zeros(router.num_experts))
    return model


def difference(result: Tensor, expected: Tensor) -> float:
    return float(((result - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("name", MODELS)
def test_dense_stage_is_the_original_function(name: str) -> None:
    original, model = MODELS[name](), routed(name)
    added = set(model.state_dict()) - set(original.state_dict())
    assert difference(model(X), original(X)) < REORDERED
    assert type(model) is type(original)
    assert [key for key in model.state_dict() if key not in added] == list(original.state_dict())
    assert len(list(routers(model))) == ROUTERS.get(name, 1)
    assert all(".router" in f".{key}" for key in added)


@pytest.mark.parametrize("name", MODELS)
def test_neurons_are_reordered(name: str) -> None:
    before, after = MODELS[name]().state_dict(), routed(name).state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for router in routers(routed(name)):
        followers = set(router.site.parameters) - {router.site.down_bias}
        assert followers & set(before) <= changed


def neuron_gates(router: Router, x: Tensor, stage: str) -> Tensor:
    assert router.bias is not None
    scores = torch.sigmoid(x @ router.weight.T + router.bias)
    gates = scores if stage == "soft" else (scores > 0.5).double()
    return gates.repeat_interleave(EXPERT_SIZE, dim=-1)[..., :HIDDEN]


def raw_by_hand(model: Any, gates: Tensor) -> Tensor:
    hidden = F.gelu(X @ model.w_up.T + model.b_up)
    result: Tensor = X + (hidden * gates) @ model.w_down.T + model.b_down
    return result


def single_stream_by_hand(model: Any, gates: Tensor) -> Tensor:
    qkv, neurons = model.linear1(X).split([3 * WIDTH, HIDDEN], dim=-1)
    both = torch.cat([attention(*qkv.chunk(3, dim=-1)), F.gelu(neurons, approximate="tanh") * gates], dim=-1)
    result: Tensor = X + both @ model.linear2.weight.T + model.linear2.bias
    return result


def low_rank_by_hand(model: Any, gates: Tensor) -> Tensor:
    def updated(layer: Any) -> Tensor:
        weight: Tensor = layer.linear.weight + 0.5 * layer.B.weight @ layer.A.weight
        return weight

    up = X @ updated(model.up).T + model.up.linear.bias
    gated = F.silu(X @ model.gate.weight.T + model.gate.bias) * up * gates
    result: Tensor = X + gated @ updated(model.down).T + model.down.linear.bias
    return result


def tied_by_hand(model: Any, gates: Tensor) -> Tensor:
    router, layer, x = next(routers(model)), model.one, X
    for _ in range(2):
        hidden = F.gelu(x @ layer.up.weight.T + layer.up.bias) * neuron_gates(router, x, router.stage.value)
        x = x + hidden @ layer.down.weight.T + layer.down.bias
    return x


BY_HAND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "raw linear": raw_by_hand,
    "raw transposed": raw_by_hand,
    "single stream": single_stream_by_hand,
    "low rank": low_rank_by_hand,
    "tied modules": tied_by_hand,
}


@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize("name", BY_HAND)
def test_gates_scale_the_hidden_value(name: str, stage: str) -> None:
    model = routed(name, stage)
    plain = deepcopy(model)  # by hand: on the same weights without the hooks
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    expected = BY_HAND[name](plain, neuron_gates(next(routers(model)), X, stage))
    assert difference(model(X), expected) < REORDERED
    assert difference(routed(name)(X), expected) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model = routed(name, "hard")
    expected = model(X)
    restored = pickle.loads(pickle.dumps(model))
    other = routed(name, "hard")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(restored(X), expected)
    assert torch.equal(other(X), expected)
    set_stage(restored, "dense")
    assert torch.equal(model(X), expected)  # independent of its copies


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_routers_and_weights(name: str) -> None:
    model = routed(name, "soft")
    with trace_routers(model) as trace:
        loss = model(X).square().mean() + trace.efficiency_loss() + trace.separability_loss()
    loss.backward()
    assert trace.density() < 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_fitting_and_calibration(name: str) -> None:
    model = routed(name)
    batches = [{"input" if isinstance(model, nn.Sequential) else "x": tokens(64, seed=7)}]
    fit_routers(model, batches, 0.5)
    with trace_routers(set_stage(model, "hard")) as trace:
        model(*batches[0].values())
    assert 0.35 < trace.density() < 0.65
    set_density(calibrate(model, batches), 0.3)
    with trace_routers(model) as trace:
        model(*batches[0].values())
    assert trace.density() < 0.4


@pytest.mark.parametrize("name", ["raw linear", "single stream", "low rank", "low rank raw"])
def test_coactivation_grouping(name: str) -> None:
    model = MODELS[name]()
    expected = model(X)
    activations = collect_activations(model, inspect(model, X).sites, [{"x": tokens(64)}])
    assert all(values.shape == (64, HIDDEN) for values in activations.values())
    assert "forward" not in model.__dict__  # watching leaves nothing behind
    config = TransformConfig(expert_size=EXPERT_SIZE, grouping=Grouping.COACTIVATION)
    transform(model, config, X, activations=activations)
    assert difference(model(X), expected) < REORDERED


@pytest.mark.parametrize("name", MODELS)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = routed(name, "hard")
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, model=MODELS[name]())
    assert_same_outputs(loaded(X), model(X))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_without_breaks_into_fused_nodes(name: str) -> None:
    model = routed(name, "hard")
    stages = lte_compile.graph(model, X).stages
    assert ("lte.sparse_ffn" in stages[-1].text) is (name not in UNFUSED)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lte", fullgraph=True, options={"compiler": "eager"})
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert difference(compiled(X), model(X)) < REORDERED
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["raw transposed", "raw einsum", "single stream gated", "windows apart", "tied modules"]
)
def test_graphs_are_rewritten(name: str) -> None:
    original = MODELS[name]()
    program = torch.export.export(original, (X,), strict=False)
    rewritten = transform(program, TransformConfig(expert_size=EXPERT_SIZE))
    assert difference(rewritten(X), original(X)) < REORDERED
    assert difference(set_stage(rewritten, "hard")(X), original(X)) > 1e-3


@pytest.mark.parametrize("name", ["raw linear", "single stream"])
def test_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = routed(name, "hard").float(), X.float()
    lte_compile.export_onnx(model, tmp_path / "model.onnx", example_inputs={"x": x}, dynamic_axes="none")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (result,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), model(x).detach(), rtol=1e-4, atol=1e-4)  # float32


def test_the_signature_of_a_listened_forward_stays() -> None:
    model: Any = routed("raw with branches")
    assert list(signature(model.forward).parameters) == ["x", "scale"]
    assert difference(model(X, scale=0.5) - X, 0.5 * (model(X) - X)) < REORDERED
    assert not torch.equal(model.train()(X), model.eval()(X))  # dropout follows the mode


class Failing(nn.Module):
    """An FFN that raises between its projections when told to."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.up, self.down, self.raw, self.fails = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), raw, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.up.weight) if self.raw else self.up(x))
        if self.fails:
            raise KeyError("between the projections")
        result: Tensor = F.linear(hidden, self.down.weight) if self.raw else self.down(hidden)
        return result


@pytest.mark.parametrize("raw", [False, True])
def test_an_exception_leaves_no_gates_behind(raw: bool) -> None:
    model: Any = transform(Failing(raw).double(), TransformConfig(expert_size=EXPERT_SIZE), X)
    expected = set_stage(model, "hard")(X)
    model.fails = True
    with pytest.raises(KeyError):
        model(2 * X)
    model.fails = False
    if not raw:
        with pytest.raises(RuntimeError, match="ran before its first projection"):
            model.down(torch.zeros(2, 5, HIDDEN).double())
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(model(X), expected)


def test_gates_that_nobody_takes_are_an_error() -> None:
    model: Any = routed("raw linear", "hard")
    model.how = "left"  # the same weights: still seen
    model(X)
    model.w_down = nn.Parameter(model.w_down.detach() * 1)  # another parameter of the same name: seen too
    model(X)
    bypassed = model.w_down.detach()
    model.forward.inner = lambda x: F.linear(F.gelu(F.linear(x, model.w_up)), bypassed.clone())
    with pytest.raises(RuntimeError, match="computed gates that its down-projection did not get"):
        model(X)


@pytest.mark.parametrize("name", ["raw linear", "low rank", "single stream"])
def test_threads_do_not_share_gates(name: str) -> None:
    model, inputs = routed(name, "hard"), [tokens(3, 5, seed=seed) for seed in range(4)]
    expected = [model(x) for x in inputs]
    barrier = Barrier(len(inputs))

    def run(x: Tensor) -> list[Tensor]:
        barrier.wait()
        return [model(x) for _ in range(20)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        results = list(pool.map(run, inputs))
    assert all(torch.equal(y, e) for ys, e in zip(results, expected, strict=True) for y in ys)


def test_replicas_of_data_parallel_run_their_own_weights() -> None:
    """What nn.DataParallel does to a module of each device, without its devices."""
    model: Any = routed("raw linear", "hard")
    replica: Any = model._replicate_for_data_parallel()
    for name, parameter in model.named_parameters(recurse=False):
        setattr(replica, name, 2 * parameter.detach())
    replica.router = model.router
    expected: Any = routed("raw linear", "hard")
    with torch.no_grad():
        for parameter in (expected.w_up, expected.w_down, expected.b_up, expected.b_down):
            parameter.mul_(2)
    assert torch.equal(replica(X), expected(X))
    assert not torch.equal(replica(X), model(X))


def test_a_parametrized_weight_is_refused() -> None:
    model = routed("raw linear", "hard")
    torch.nn.utils.parametrize.register_parametrization(model, "w_down", nn.Identity())
    with pytest.raises(RuntimeError, match="w_down is no parameter of its own any more"):
        model(X)


class Interleaved(TiedModules):
    """Both first projections run before the first down-projection."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.gelu(self.one["up"](x)), F.gelu(self.one["up"](2 * x))
        result: Tensor = self.one["down"](first) + self.one["down"](second)
        return result


def test_runs_that_overlap_are_refused() -> None:
    model = Interleaved().double()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="started again before its down-projection ran"):
        transform(model, TransformConfig(expert_size=EXPERT_SIZE), X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("build", [Raw, SingleStream, LowRank])
def test_functional_calls(build: type[nn.Module]) -> None:
    name = {Raw: "raw linear", SingleStream: "single stream", LowRank: "low rank"}[build]
    model = routed(name, "hard")
    state = {key: 1.5 * value.detach() for key, value in model.state_dict().items()}
    changed = deepcopy(model)
    changed.load_state_dict(state)
    assert torch.equal(torch.func.functional_call(model, state, (X,)), changed(X))


class Packed(nn.Module):
    """What a quantized linear layer looks like: integers, and a scale to make numbers of them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.qweight = nn.Buffer((linear.weight.detach() * 10).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * 0.1)


def test_packed_weights_are_refused() -> None:
    model: Any = Failing(raw=False).double()
    model.up, model.down = Packed(model.up), Packed(model.down)
    with pytest.raises(ValueError, match=r"the weights of up \(Packed\) are quantized and packed.*transform.*first"):
        transform(model, TransformConfig(expert_size=EXPERT_SIZE), X)


LORA_TARGETS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "bert": ["intermediate.dense", "output.dense"],
    "phi3": ["gate_up_proj", "down_proj"],
}


def adapted(model: nn.Module, name: str) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=LORA_TARGETS[name], lora_dropout=0.1, fan_in_fan_out=name == "gpt2", init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_lora_before_the_transformation(name: str, tmp_path: Path) -> None:
    model, inputs = zoo.build(name, torch.float64)
    model = adapted(model, name)
    expected = logits(model, inputs)
    transform(model, TransformConfig(expert_size=24), inputs)
    assert difference(logits(model, inputs), expected) < REORDERED
    check_that_merging_changes_nothing(fit_routers(model, [inputs], 0.5), inputs, expected, tmp_path)


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_lora_after_the_transformation(name: str, tmp_path: Path) -> None:
    sparse, inputs = routed_family(name)
    expected = logits(set_stage(sparse, "hard"), inputs)
    model = adapted(sparse, name)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    check_that_merging_changes_nothing(model, inputs, expected, tmp_path)


def check_that_merging_changes_nothing(model: Any, inputs: dict[str, Any], other: Tensor, directory: Path) -> None:
    """An adapter on a down-projection sees the gated hidden value: then, and only then, merging keeps the function."""
    result = logits(set_stage(model, "hard"), inputs)
    assert difference(result, other) > 1e-3
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied, inputs), result)
    merged = copied.merge_and_unload()
    assert difference(logits(merged, inputs), result) < REORDERED
    save_pretrained(merged, directory)
    assert difference(logits(load_pretrained(directory), inputs), result) < REORDERED
