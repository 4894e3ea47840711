"""torch.compile(model, backend="lte") over the tiny models: graphs, shapes, stages, options, training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lte_compile.calibration.density import calibrate, set_density
from lte_compile.config import TransformConfig
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed, stack, tokens

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

# Dynamo's part, and ours: what compiles the graphs afterwards makes no difference to breaks and recompiles.
EAGER: dict[str, Any] = {"compiler": "eager"}
IN_EVERY_RUN = ("llama", "gpt2", "bert")
SLOW = pytest.mark.slow
FAMILIES = [name if name in IN_EVERY_RUN else pytest.param(name, marks=SLOW) for name in zoo.families()]
# 0 and 1 are sizes that Dynamo compiles for on their own.
SIZES = ((2, 12), (3, 9), (4, 7), (5, 11))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def sparse(name: str, stage: str) -> Any:
    return set_stage(routed(name, torch.float32)[0], stage)


def resized(inputs: dict[str, Tensor], batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of another batch size, and sequences of another length, the last one padded."""
    generator = torch.Generator().manual_seed(batch)
    made = {}
    for name, value in inputs.items():
        if value.is_floating_point():
            made[name] = torch.randn(batch, *value.shape[1:], generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(batch, length, dtype=torch.long)
            made[name][-1, -2:] = 0
        else:
            made[name] = torch.randint(3, zoo.VOCAB, (batch, length), generator=generator)
    return made


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("name", FAMILIES)
def test_inference_on_changing_sizes(name: str, dynamic: bool | None) -> None:
    model, (_, inputs) = sparse(name, "hard"), routed(name, torch.float32)
    compiled: Any = torch.compile(model, backend="lte", options=EAGER, dynamic=dynamic, fullgraph=True)
    for size in SIZES:
        given = resized(inputs, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **CLOSE)
    assert not counters["graph_break"]
    assert graphs() <= (1 if dynamic else 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_on_changing_sizes(name: str) -> None:
    """Router losses are computed outside of the graph, from scores that are its outputs."""
    model, (_, inputs) = sparse(name, "soft"), routed(name, torch.float32)
    compiled: Any = torch.compile(deepcopy(model), backend="lte", options=EAGER, fullgraph=True)
    for size in SIZES[:3]:
        given = resized(inputs, *size)
        expected, actual = step(model, given), step(compiled, given)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, **CLOSE, msg=key)
    assert not counters["graph_break"]
    assert graphs() <= 2


def step(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    with trace_routers(model) as trace:
        task = model(**inputs)[0].square().mean()
    loss = task + 0.3 * trace.efficiency_loss() + 0.01 * trace.separability_loss()
    loss.backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in named if p.grad is not None}}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_sizes_marked_as_dynamic(name: str) -> None:
    """mark_dynamic raises where anything, an op of ours say, needs to know the size."""
    model, (_, inputs) = sparse(name, "hard"), routed(name, torch.float32)
    compiled: Any = torch.compile(model, backend="lte", options=EAGER, fullgraph=True)
    for size in SIZES:
        given = resized(inputs, *size)
        for value in given.values():
            torch._dynamo.mark_dynamic(value, (0, 1))
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **CLOSE)
    assert graphs() == 1


@pytest.mark.parametrize("trains", [False, True])
def test_stages_may_change_after_compiling(trains: bool) -> None:
    model, (_, inputs) = sparse("llama", "dense"), routed("llama", torch.float32)
    compiled: Any = torch.compile(model, backend="lte", options=EAGER, fullgraph=True)
    outputs = []
    for stage, rule in (("dense", None), ("soft", None), ("soft", "straight_through"), ("hard", None), ("dense", None)):
        set_stage(model, stage, selection=rule)
        with torch.set_grad_enabled(trains):
            outputs.append(compiled(**inputs)[0])
            torch.testing.assert_close(outputs[-1], model(**inputs)[0], **CLOSE)
    dense, soft, straight_through, hard, again = outputs
    assert torch.equal(dense, again)
    assert not torch.allclose(soft, dense, **CLOSE)
    assert not torch.allclose(hard, soft, **CLOSE)
    torch.testing.assert_close(straight_through, hard, **CLOSE)


def test_the_density_may_change_after_compiling() -> None:
    model, (_, inputs) = sparse("llama", "hard"), routed("llama", torch.float32)
    calibrate(model, [inputs])
    compiled: Any = torch.compile(model, backend="lte", options=EAGER, fullgraph=True)
    seen = []
    for density in (0.2, 0.6, 1.0):
        set_density(model, density)
        with torch.no_grad():
            seen.append(compiled(**inputs)[0])
            torch.testing.assert_close(seen[-1], model(**inputs)[0], **CLOSE)
    assert not torch.allclose(seen[0], seen[1], **CLOSE)


def test_a_whole_training_step_is_compiled() -> None:
    """Forward, loss and optimizer in one compiled function; the trace outside, as it registers hooks."""
    (_, inputs) = routed("llama", torch.float32)

    def trained(compiles: bool) -> dict[str, Tensor]:
        model = sparse("llama", "soft")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def make_step(batch: dict[str, Tensor]) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        run: Any = torch.compile(make_step, backend="lte", options={"compiler": "aot_eager"}) if compiles else make_step
        for _ in range(3):
            run(inputs)
        return dict(model.named_parameters())

    expected, actual = trained(False), trained(True)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **CLOSE, msg=name)


def test_generate_with_a_compiled_forward() -> None:
    model, (_, inputs) = sparse("llama", "hard"), routed("llama", torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    model.forward = torch.compile(model.forward, backend="lte", options=EAGER)
    for cache in ("static", "dynamic"):
        assert torch.equal(model.generate(**inputs, **options, cache_implementation=cache), expected)


def small(stage: str = "hard") -> tuple[nn.Module, Tensor]:
    x = tokens(2, 3, dtype=torch.float32)
    model = transform(stack(dtype=torch.float32), TransformConfig(expert_size=12), x)
    return set_layout(set_stage(model, stage), "neuron_major"), x


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"options": {"epilogue_fusion": False}},
        {"options": {"lower": False}},
        {"options": {"fallback": "refuse"}},
        {"options": {**EAGER, "lower": False, "fallback": "allow"}},
    ],
)
def test_modes_and_options(arguments: dict[str, Any]) -> None:
    model, x = small()
    compiled = torch.compile(model, backend="lte", fullgraph=True, **arguments)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def test_an_unknown_option_is_named_through_torch_compile() -> None:
    model, x = small()
    compiled = torch.compile(model, backend="lte", options={"lowr": False})
    with pytest.raises(Exception, match=r"no option 'lowr'.*did you mean 'lower'"):
        compiled(x)


def test_a_fallback_is_refused_with_its_reason() -> None:
    model, x = small("dense")
    compiled = torch.compile(model, backend="lte", options={**EAGER, "fallback": "refuse"})
    with torch.no_grad(), pytest.raises(Exception, match=r"fallback='refuse', and 2 routed FFNs.*dense gates"):
        compiled(x)


def test_weights_stored_across_neurons_are_a_reason_to_warn() -> None:
    model, x = small()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(model, backend="lte", options=EAGER)(x)
    torch._dynamo.reset()
    set_layout(model, "contiguous")
    with torch.no_grad(), pytest.warns(UserWarning, match=r"set_layout\(model, 'neuron_major'\)"):
        torch.compile(model, backend="lte", options=EAGER)(x)
