"""Models on the meta device are inspected and rewritten without weights, in time that grows with their layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import init_empty_weights
from torch import Tensor, fx, nn

from lte_compile.capture.capture import capture
from lte_compile.config import Grouping, TransformConfig
from lte_compile.inspection.graphs import graph
from lte_compile.inspection.sites import inspect
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.insert import InsertRouter
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.match import find_ffns
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.transform import transform
from tests.routed import routed, stack, tokens
from tests.zoo import build

IN_PLACE = TransformConfig(grouping=Grouping.CONTIGUOUS, expert_size=24)


def on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config).eval()


def empty(model: nn.Module) -> nn.Module:
    """As accelerate makes them: parameters without data, buffers with."""
    with init_empty_weights():
        return type(model)(model.config).eval()


@pytest.mark.parametrize("without_weights", [on_meta, empty])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5", "gemma"])
def test_the_same_sites_as_with_weights(family: str, without_weights: Callable[[nn.Module], nn.Module]) -> None:
    real, inputs = build(family)
    model = without_weights(real)
    before = list(model.parameters())
    assert inspect(model, inputs).sites == inspect(real, inputs).sites  # real inputs, on the CPU
    assert all(after is parameter for after, parameter in zip(model.parameters(), before, strict=True))
    assert all(parameter.is_meta for parameter in before)


def test_example_inputs_may_be_without_data_or_left_out() -> None:
    real, inputs = build("llama")
    model = on_meta(real)
    expected = inspect(real, inputs)
    assert inspect(model).sites == expected.sites
    found = inspect(model, {name: value.to("meta") for name, value in inputs.items()})
    assert (found.sites, found.rejections) == (expected.sites, expected.rejections)


def test_flat_graphs_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = fx.symbolic_trace(stack())
    module.to("meta")
    sites = inspect(module, tokens(2, 3)).sites
    assert sites == inspect(stack(), tokens(2, 3)).sites


class ConstantTable(nn.Module):
    """A tensor that is neither parameter nor buffer, and one made on the CPU at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = stack()
        self.scale = torch.ones(16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(x * self.scale + torch.arange(16, device="cpu"))
        return result


def test_tensors_of_other_devices_do_not_get_in_the_way() -> None:
    with torch.device("meta"):
        model = ConstantTable()
    model.to("meta")
    assert len(inspect(model, tokens(2, 3)).sites) == 2
    assert model.scale.is_meta


# ---- rewriting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", [Grouping.BALANCED_KMEANS, Grouping.RANDOM])
def test_neurons_without_weights_cannot_be_reordered(grouping: Grouping) -> None:
    model = on_meta(build("llama")[0])
    with pytest.raises(ValueError, match=r"on the meta device.*lte-compile convert MODEL OUT.*grouping='contiguous'"):
        transform(model, TransformConfig(grouping=grouping))
    assert not list(routers(model))


def test_an_expert_larger_than_the_ffn_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_size 999 is larger than the 128 neurons"):
        transform(on_meta(build("llama")[0]), TransformConfig(grouping=Grouping.CONTIGUOUS, expert_size=999))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_transformed_model_without_weights_can_be_given_some(family: str) -> None:
    """It computes what the model that was transformed with its weights computes."""
    dense, inputs = build(family, torch.float64)
    whole = transform(dense, IN_PLACE)
    model = transform(on_meta(build(family)[0]), IN_PLACE).to(torch.float64)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(whole.state_dict(), assign=True)
    for name, buffer in whole.named_buffers():  # tables of positions are no part of the state
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    for transformed in (model, whole):
        set_stage(transformed, "hard")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)


def test_the_graph_of_a_model_without_weights_is_printed() -> None:
    real, inputs = routed("llama", torch.float32)
    model = transform(on_meta(build("llama")[0]), IN_PLACE)
    assert str(graph(set_stage(model, "hard"), inputs)) == str(graph(set_stage(real, "hard"), inputs))


# ---- growth ----------------------------------------------------------------------------------------------------------


@cache
def llama(layers: int) -> nn.Module:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.device("meta"):
        model: nn.Module = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, num_hidden_layers=layers))
    return model.eval()


def calls_of(work: Callable[[], Any]) -> int:
    """How many Python functions are called: a measure of work that other load on the machine leaves alone."""
    calls = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def insert(graph: CapturedGraph) -> None:
    sites = find_ffns(graph).sites
    given = {site.down: Router(site, IN_PLACE, like=torch.empty(0, device="meta")) for site in sites}
    report = InsertRouter(routers=given, expert_size=IN_PLACE.expert_size)(graph)
    assert len(report.changes) == len(sites)


def fuse_and_lower(graph: CapturedGraph) -> None:
    fused, lowered = run_pipeline(graph, (FuseExperts(), LowerSparse()))
    assert len(fused.changes) == len(lowered.changes) > 0


def dense_graph(layers: int) -> CapturedGraph:
    return capture(llama(layers))


def flat_graph(layers: int) -> CapturedGraph:
    with torch.device("meta"):
        module = torch.export.export(stack(layers).to("meta"), (tokens(2).to("meta"),)).module()
    return capture(module)


def routed_graph(layers: int) -> CapturedGraph:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(llama(layers).config).eval()
    return capture(set_stage(transform(model, IN_PLACE), "hard"))


@pytest.mark.parametrize(
    "prepare, work", [(dense_graph, find_ffns), (flat_graph, insert), (routed_graph, fuse_and_lower)]
)
def test_passes_take_time_in_proportion_to_the_layers(
    prepare: Callable[[int], CapturedGraph], work: Callable[[CapturedGraph], Any]
) -> None:
    """Four times the layers are four times the work; 10 % are left for what a quadratic term of no weight adds."""
    few, many = (prepare(layers) for layers in (5, 20))
    assert calls_of(lambda: work(many)) < 1.1 * 4 * calls_of(lambda: work(few))


# The peak is VmHWM, of this program alone: ru_maxrss begins with that of the process that started it.
LOCATED = """
import re, torch
from pathlib import Path
torch.set_num_threads(1)
from benchmarks.capture import build
from lte_compile import inspect
sites = inspect(build({layers})).sites
print(len(sites), 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.parametrize("layers", [3, pytest.param(80, marks=pytest.mark.slow)])
def test_a_70b_llama_is_located_in_little_memory(layers: int) -> None:
    """Its weights would take 1.7 GB a layer, and 4 GB for the vocabulary."""
    command = [sys.executable, "-c", LOCATED.format(layers=layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sites, peak = map(int, done.stdout.split()[-2:])
    assert sites == layers
    assert peak < 1.5e9
