"""peft's LoRA on attention, and its other adapters on FFNs; tests of LoRA inside FFNs are with the rewrite's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lte_compile.checkpoints.persistence import load_pretrained, save_pretrained
from lte_compile.config import TransformConfig
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import EXPERT_SIZE, routed

FFN_LINEARS = ["gate_proj", "up_proj", "down_proj"]
# Scaling and rotating neurons, low-rank factors of other forms, magnitudes apart from directions.
OTHER_ADAPTERS: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(r=2, target_modules=FFN_LINEARS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=FFN_LINEARS, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["down_proj"]),  # elsewhere, routers see it too
    "loha": peft.LoHaConfig(r=2, target_modules=FFN_LINEARS),
    "vera": peft.VeraConfig(r=2, target_modules=FFN_LINEARS),
}

# Merging adds B A to the weights, where the adapter adds its product to the output: float32 sums in another order.
MERGED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def with_lora(model: nn.Module) -> Any:
    """Adapters on queries and values that change something."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return adapted


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def test_transform_of_an_adapted_model_keeps_its_function() -> None:
    dense, inputs = zoo.build("llama", torch.float64)
    adapted = with_lora(dense)
    expected = output(adapted, inputs)
    transform(adapted, TransformConfig(expert_size=EXPERT_SIZE), inputs)
    assert len(tuple(routers(adapted))) == 2
    torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-10, atol=1e-10)
    set_stage(adapted, "hard")
    sparse = output(adapted, inputs)
    torch.testing.assert_close(output(adapted.merge_and_unload(), inputs), sparse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stage", ["dense", "soft", "hard"])
def test_merging_keeps_every_stage(stage: str, tmp_path: Path) -> None:
    model, inputs = routed("llama", torch.float32)
    adapted = with_lora(set_stage(model, stage))
    expected = output(adapted, inputs)
    merged = adapted.merge_and_unload()
    assert [router.stage for router in routers(merged)] == [stage, stage]
    torch.testing.assert_close(output(merged, inputs), expected, **MERGED)
    save_pretrained(merged, tmp_path / "merged")
    torch.testing.assert_close(output(load_pretrained(tmp_path / "merged"), inputs), expected, **MERGED)


def test_adapters_can_be_switched_off_and_on() -> None:
    model, inputs = routed("llama", torch.float32)
    before = output(set_stage(model, "hard"), inputs)
    adapted = with_lora(model)
    after = output(adapted, inputs)
    assert not torch.allclose(after, before)
    with adapted.disable_adapter():
        assert torch.equal(output(adapted, inputs), before)
    assert torch.equal(output(adapted, inputs), after)


@pytest.mark.parametrize("also_routers", [False, True])
def test_training_adapters_with_router_losses(also_routers: bool) -> None:
    """peft freezes what is not an adapter; routers train if modules_to_save or the user says so."""
    model, inputs = routed("llama", torch.float32)
    adapted = with_lora(set_stage(model, "soft"))
    for router in routers(adapted):
        router.requires_grad_(also_routers)
    with trace_routers(adapted) as trace:
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    (loss + trace.efficiency_loss()).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert {name for name in trained if "router" not in name} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert sum("router" in name for name in trained) == (4 if also_routers else 0)


def test_generate_through_an_adapter() -> None:
    model, inputs = routed("llama", torch.float32)
    adapted = with_lora(set_stage(model, "hard"))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = adapted.generate(**inputs, **options, use_cache=False)
    assert torch.equal(adapted.generate(**inputs, **options), expected)
    merged: Any = adapted.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, **options), expected)


def with_other_adapter(model: nn.Module, name: str) -> Any:
    """One of OTHER_ADAPTERS that changes something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(model, OTHER_ADAPTERS[name], autocast_adapter_dtype=False)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapted.double().eval()


@pytest.mark.parametrize("name", OTHER_ADAPTERS)
def test_other_adapters_on_ffns_after_the_transformation(name: str) -> None:
    """Only where the adapter, too, reads the gated hidden value does merging keep a sparse model's function."""
    model, inputs = routed("llama", torch.float64)
    before = output(set_stage(model, "hard"), inputs)
    adapted = with_other_adapter(model, name)
    sparse = output(adapted, inputs)
    assert not torch.allclose(sparse, before, rtol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), sparse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["dora", "oft", "loha", "vera"])
def test_other_adapters_before_the_transformation_are_refused(name: str) -> None:
    dense, inputs = zoo.build("llama", torch.float64)
    names = set(dense.state_dict())
    adapted = with_other_adapter(dense, name)
    with pytest.raises(ValueError, match="no FFN found; every candidate was refused") as error:
        transform(adapted, TransformConfig(expert_size=EXPERT_SIZE), inputs)
    assert "down_proj" in str(error.value)
    assert names <= set(adapted.unload().state_dict())  # nothing was rewritten


def test_scaled_neurons_before_the_transformation() -> None:
    """IA3's factors are element-wise: part of the hidden region like any activation."""
    dense, inputs = zoo.build("llama", torch.float64)
    adapted = with_other_adapter(dense, "ia3")
    expected = output(adapted, inputs)
    transform(adapted, TransformConfig(expert_size=EXPERT_SIZE), inputs)
    assert len(tuple(routers(adapted))) == 2
    torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-10, atol=1e-10)
