"""The matcher on transformers families: the right sites, and a reason for every other linear layer."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

from lte_compile.capture.capture import Call, capture, capture_by_dynamo, capture_by_export
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.match import FfnSearch, find_ffns
from lte_compile.transform import transform
from tests.zoo import EXPECTED, HIDDEN, LAYERS, WIDTH, build, families

ROUTES = ("export", "dynamo")
DYNAMO_FAMILIES = ("llama", "gpt2", "bert", "opt", "t5", "phi3", "vit", "albert", "falcon")  # it takes seconds each
TRACED = [(f, "export") for f in families()] + [(f, "dynamo") for f in DYNAMO_FAMILIES]


def captured(model: nn.Module, inputs: dict[str, Any], route: str) -> CapturedGraph:
    call = Call((), inputs)
    if route == "export":
        return capture_by_export(model, call)
    (graph,) = capture_by_dynamo(model, call)
    return graph


@cache
def search(family: str, route: str = "export") -> FfnSearch:
    model, inputs = build(family)
    return find_ffns(captured(model, inputs, route))


def reason_of(search: FfnSearch, parameter: str) -> str:
    """The reason given for the first refused layer whose weight's name contains `parameter`."""
    reasons = [r.reason for r in search.rejections if r.parameter is not None and parameter in r.parameter]
    assert reasons, f"no rejection of {parameter!r} among {[r.parameter for r in search.rejections]}"
    return reasons[0]


@pytest.mark.parametrize(("family", "route"), TRACED)
def test_sites_of_a_family(family: str, route: str) -> None:
    expected = EXPECTED[family]
    sites = search(family, route).sites
    parameters = dict(build(family)[0].named_parameters())

    assert len(sites) == expected.sites
    for site in sites:
        assert site.down.endswith(expected.down)
        assert (site.activation, site.gated, site.fusion) == (expected.activation, expected.gated, expected.fusion)
        assert (site.up_layout, site.down_layout) == (expected.layout, expected.layout)
        assert (site.width, site.hidden) == (WIDTH, HIDDEN)
        assert (site.up_bias is not None, site.down_bias is not None) == (expected.biased, expected.biased)
        assert site.hidden_parameters == ()
        assert site.first_projection in (site.up, site.gate)
        assert set(site.parameters) <= set(parameters)
        assert set(parameters[site.up].shape) <= {WIDTH, HIDDEN, 2 * HIDDEN}


@pytest.mark.parametrize("family", DYNAMO_FAMILIES)
def test_both_tracers_agree(family: str) -> None:
    by_export, by_dynamo = (search(family, route) for route in ROUTES)
    assert set(by_export.sites) == set(by_dynamo.sites)
    kinds = [{(r.parameter, r.reason.split(":")[0]) for r in s.rejections} for s in (by_export, by_dynamo)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("family", families())
def test_every_linear_layer_is_a_site_or_has_a_reason(family: str) -> None:
    model, _ = build(family)
    found = search(family)
    used = {name for site in found.sites for name in site.parameters}
    refused = {rejection.parameter for rejection in found.rejections}
    # 2-d weights that are no tables: an embedding is linear only where a head is tied to it.
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and name.endswith("weight")}
    assert matrices - tables <= used | refused
    assert not used & refused
    assert all(rejection.reason for rejection in found.rejections)


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [
        ("llama", "self_attn.o_proj", "attention output projection: .*scaled_dot_product_attention.* mixes tokens"),
        ("gpt2", "attn.c_proj", "attention output projection"),
        ("bert", "attention.output.dense", "attention output projection"),
        ("t5", "SelfAttention.o", "attention output projection"),
        ("whisper", "encoder_attn.out_proj", "attention output projection"),
        ("llama", "self_attn.k_proj", "attention input projection"),
        ("phi3", "qkv_proj", "attention input projection"),
        ("llama", "lm_head", "head or classifier: its output width 96 differs from the model width 64"),
        ("gpt2", "wte", "language-model head"),
        ("t5", "lm_head|shared", "language-model head"),
        ("bert", "pooler", "pooler or head: it reads tokens picked by"),
        ("albert", "pooler", "pooler or head"),
        ("bert", "classifier", "classifier: its output width 3 differs from the model width 64"),
        ("vit", "classifier", "classifier: its output width 3"),
        ("distilbert", "pre_classifier", "pooler or head|projection into `classifier.weight`"),
        ("albert", "embedding_hidden_mapping_in", "layer_norm.*not element-wise.*width 64 differs from .* 32"),
    ],
)
def test_refused_with_its_reason(family: str, layer: str, reason: str) -> None:
    routes = ROUTES if family in DYNAMO_FAMILIES else ("export",)
    for route in routes:
        named = [r for r in search(family, route).rejections if r.parameter and re.search(layer, r.parameter)]
        assert named
        assert all(re.search(reason, rejection.reason) for rejection in named), [r.reason for r in named]


def test_eager_attention_is_attention_too() -> None:
    """Written out as products and a softmax, attention has no op of its own name."""
    model, inputs = build("llama")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    found = find_ffns(captured(model, inputs, "export"))
    assert len(found.sites) == 2
    assert re.search("attention output projection: .*`(matmul|bmm)`", reason_of(found, "o_proj"))


def test_a_shared_layer_is_one_site_at_several_places() -> None:
    found = search("albert")
    assert len(found.sites) == 1
    assert len(found.matches) == 2
    assert found.matches[0].down.node is not found.matches[1].down.node


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("t5", torch.float16), ("bert", torch.float64)],
)
def test_dtype_does_not_blur_the_activation(family: str, dtype: torch.dtype) -> None:
    model, inputs = build(family, dtype)
    found = find_ffns(captured(model, inputs, "export"))
    assert {site.activation for site in found.sites} == {EXPECTED[family].activation}
    assert len(found.sites) == EXPECTED[family].sites


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_symbolic_shapes(family: str) -> None:
    model, inputs = build(family)
    batch, tokens = torch.export.Dim.AUTO, torch.export.Dim.AUTO
    dynamic = {name: {0: batch, 1: tokens} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {**inputs, **_no_cache(family)}, dynamic_shapes=_with_none(dynamic, family), strict=False
        )
    assert any(isinstance(size, torch.SymInt) for node in program.graph.nodes for size in _sizes(node))
    assert find_ffns(capture(program)).sites == search(family).sites


def _no_cache(family: str) -> dict[str, bool]:
    return {} if family == "bert" else {"use_cache": False}


def _with_none(dynamic: dict[str, Any], family: str) -> dict[str, Any]:
    return {**dynamic, **dict.fromkeys(_no_cache(family))}


def _sizes(node: fx.Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def test_unmerged_adapters_belong_to_the_layers_they_update() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    targets = ["q_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    found = find_ffns(captured(adapted, inputs, "export"))

    assert len(found.sites) == LAYERS
    for site in found.sites:
        assert site.gate_low_rank == ()
        assert [name.split(".")[-4:-1] for name in site.up_low_rank] == [["up_proj", "lora_B", "default"]]
        assert [name.split(".")[-4:-1] for name in site.down_low_rank] == [["down_proj", "lora_A", "default"]]
    for factor in ("q_proj.lora_A", "q_proj.lora_B", "up_proj.lora_B", "down_proj.lora_A"):
        assert "low-rank update (LoRA adapter) of" in reason_of(found, factor)


@pytest.mark.parametrize("target", ["up_proj", "gate_proj", "down_proj"])
def test_one_projection_may_be_adapted(target: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).eval()
    found = find_ffns(captured(adapted, inputs, "export"))
    assert [len((*s.up_low_rank, *s.gate_low_rank, *s.down_low_rank)) for s in found.sites] == [1] * LAYERS


def test_adapters_on_attention_leave_the_ffns_alone() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    found = find_ffns(captured(adapted, inputs, "export"))
    assert [site.activation for site in found.sites] == ["silu", "silu"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_transformed_model_has_the_same_sites(family: str, route: str) -> None:
    """Routers and anchors are seen through; each match names its anchor."""
    model, inputs = build(family)
    before = search(family, route).sites
    found = find_ffns(captured(transform(model, example_inputs=inputs), inputs, route))
    assert found.sites == before
    assert all(match.anchor is not None and "gate_hidden" in str(match.anchor.target) for match in found.matches)
    assert not any("router" in (rejection.parameter or "") for rejection in found.rejections)
