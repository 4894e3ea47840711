"""Transformed models inside Hugging Face's tools: Trainer, generate with a static cache, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lte_compile.checkpoints.persistence import load_pretrained, save_pretrained
from lte_compile.config import Stage
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from tests import zoo
from tests.routed import routed


def examples() -> list[dict[str, Any]]:
    _, inputs = zoo.build("bert")
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], (0, 2), strict=True)
    ]


def trainer(model: nn.Module, directory: Path, **options: Any) -> Any:
    arguments = tf.TrainingArguments(
        output_dir=str(directory),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        **options,
    )
    return tf.Trainer(model=model, args=arguments, train_dataset=examples())


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_trainer(stage: str, loaded: bool, tmp_path: Path) -> None:
    model, inputs = routed("bert", torch.float32)
    set_stage(model, stage)
    if loaded:
        save_pretrained(model, tmp_path / "before")
        model = load_pretrained(tmp_path / "before")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer(model, tmp_path / "run")
    run.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    router_names = {name for name in before if ".router.weight" in name}
    assert next(routers(model)).site.down in moved
    assert router_names & moved == (router_names if stage == "soft" else set())
    run.save_model(str(tmp_path / "after"))
    restored = load_pretrained(tmp_path / "after")
    assert {router.stage for router in routers(restored)} == {Stage(stage)}
    with torch.no_grad():
        assert torch.equal(restored(**inputs).logits, model.eval()(**inputs).logits)


def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    model, _ = routed("bert", torch.float32)
    run = trainer(set_stage(model, "soft"), tmp_path, gradient_checkpointing=True)
    assert torch.isfinite(torch.tensor(run.train().training_loss))


def test_generate_with_a_static_cache() -> None:
    model: Any = set_stage(routed("llama")[0], "hard")
    _, inputs = zoo.build("llama")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


def lora(model: nn.Module) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def test_lora_on_attention(tmp_path: Path) -> None:
    model, inputs = routed("llama", torch.float32)
    set_stage(model, "hard")
    expected = logits(model, inputs)
    adapted = lora(model)
    assert torch.equal(logits(adapted, inputs), expected)  # LoRA starts from no change
    with trace_routers(adapted) as trace:
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert trace.scores(trace.sites[0]).shape[0] == int(inputs["attention_mask"].sum())
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    changed = logits(adapted, inputs)
    assert not torch.equal(changed, expected)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    save_pretrained(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "merged"), inputs), changed, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_put_on_a_loaded_model(tmp_path: Path) -> None:
    model, inputs = routed("llama", torch.float32)
    save_pretrained(set_stage(model, "hard"), tmp_path / "base")
    adapted = lora(model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval(), inputs), logits(adapted.eval(), inputs))
