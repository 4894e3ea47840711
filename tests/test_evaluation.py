"""Quality, cost and the baselines LTE is compared with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lte_compile.baselines import oracle_selection, remove_ffns
from lte_compile.config import TransformConfig
from lte_compile.evaluation.quality import (
    Evaluation,
    evaluate,
    ffn_flops_per_token,
    num_experts,
    router_parameters,
    sites_of,
)
from lte_compile.inspection.sites import inspect
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed


def _bert_batch() -> dict[str, Tensor]:
    _, inputs = zoo.build("bert")
    return {**inputs, "labels": torch.tensor([0, 2])}


def test_accuracy_loss_and_density_of_a_classifier() -> None:
    model, inputs = routed("bert", torch.float64)
    set_stage(model, "hard")
    batch = {**inputs, "labels": torch.tensor([0, 2])}
    with torch.no_grad(), trace_routers(model) as trace:
        out = model(**batch)
    result = evaluate(model, [batch, batch])
    assert result.loss == pytest.approx(float(out.loss), rel=1e-6)  # cross entropy is taken in float32
    assert result.accuracy == float((out.logits.argmax(-1) == batch["labels"]).double().mean())
    assert result.density == pytest.approx(trace.density())
    assert result.densities == pytest.approx(trace.densities())


def test_perplexity_of_a_language_model_leaves_padding_labels_out() -> None:
    model, inputs = zoo.build("llama")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = {**inputs, "labels": labels}
    with torch.no_grad():
        expected = model(**batch).loss
    result = evaluate(model, [batch])
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(float(expected.exp()), rel=1e-5)
    assert result.density == 1.0


def test_nothing_to_evaluate_is_an_error() -> None:
    model, inputs = zoo.build("bert")
    ignored = torch.full((len(inputs["input_ids"]),), -100)
    for batches, reason in (
        ([], "no batches"),
        ([inputs], "no labels, only"),
        ([{**inputs, "labels": ignored}], "-100"),
    ):
        with pytest.raises(ValueError, match=reason):
            evaluate(model, batches)


def test_layers_that_share_an_ffn_cost_every_run() -> None:
    model, inputs = routed("albert", torch.float32)
    result = evaluate(model, [{**inputs, "labels": torch.zeros(2, dtype=torch.int64)}])
    assert result.selection is not None
    assert result.selection.tokens == int(inputs["attention_mask"].sum())
    dense = zoo.LAYERS * 2 * 2 * zoo.WIDTH * zoo.HIDDEN
    assert result.selection.flops_per_token == pytest.approx(result.selection.weight_share * dense)


@pytest.mark.parametrize(("name", "matrices"), [("bert", 2), ("llama", 3)])
def test_flops_count_active_neurons_and_routers(name: str, matrices: int) -> None:
    model, _ = routed(name, torch.float32)
    sites, experts = sites_of(model), num_experts(model)
    width, hidden = zoo.WIDTH, zoo.HIDDEN
    assert ffn_flops_per_token(sites) == zoo.LAYERS * 2 * matrices * width * hidden
    routed_flops = 0.25 * zoo.LAYERS * 2 * matrices * width * hidden + 2 * width * sum(experts)
    assert ffn_flops_per_token(sites, 0.25, experts) == routed_flops
    assert router_parameters(model) == sum(p.numel() for r in routers(model) for p in r.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "phi3", "gpt2"])
def test_without_ffns_equals_a_model_that_selects_no_expert(name: str) -> None:
    model, inputs = zoo.build(name, torch.float64)
    removed = remove_ffns(copy.deepcopy(model), inspect(model, inputs).sites)
    transform(model, TransformConfig(expert_size=16), inputs)
    set_stage(model, "hard")
    for router in routers(model):
        router.threshold = 1.0
    with torch.no_grad():
        # float64, the same sums with zeros in them
        torch.testing.assert_close(removed(**inputs).logits, model(**inputs).logits, rtol=1e-12, atol=1e-14)
    assert sum(p.numel() for p in removed.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_oracle_keeps_the_largest_activations() -> None:
    model, inputs = zoo.build("opt", torch.float64)
    sites = inspect(model, inputs).sites
    seen: list[Tensor] = []
    down = model.get_submodule(sites[0].down.rpartition(".")[0])
    with torch.no_grad(), oracle_selection(model, sites, 0.25):
        handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        handle.remove()
    kept_T = (seen[0] != 0).sum(-1)
    assert int(kept_T.max()) == zoo.HIDDEN // 4
    with torch.no_grad():
        untouched = model(**inputs).logits
        with oracle_selection(model, sites, 1.0):
            assert torch.equal(model(**inputs).logits, untouched)


def test_an_impossible_oracle_density_is_refused() -> None:
    model, _ = zoo.build("opt")
    with pytest.raises(ValueError, match="density must lie in"), oracle_selection(model, [], 0.0):
        pass


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    assert Evaluation(accuracy=0.0, loss=800.0, density=1.0, densities={}).perplexity == float("inf")
