"""Saving and loading: the sparse model comes back exactly, plain transformers reads it as dense, damage is reported."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lte_compile.checkpoints.persistence import PLAN_FILE, load_pretrained, save_pretrained
from lte_compile.config import Stage, TransformConfig
from lte_compile.kernels.layout import is_neuron_major
from lte_compile.rewriting.plan import parse_plan, plan_of
from lte_compile.routing.router import require_routers, routers, set_stage
from lte_compile.transform import transform
from tests.routed import assert_same_outputs, routed, routed_stack, stack, tokens

FAMILIES = ("llama", "gpt2", "bert", "opt", "t5", "phi3", "vit", "albert")
GENERATORS = ("llama", "gpt2", "opt", "t5", "phi3")


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def hard(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A routed model in stage "hard" whose thresholds and measured scores differ from the defaults and per site."""
    model, inputs = routed(name)
    set_stage(model, "hard")
    for number, router in enumerate(routers(model)):
        router.threshold = 0.4 + number / 100
        router.score_quantiles = (0.1, 1 / 3, 0.9 + number / 100)
    return model, inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one saved model per family, in stage "hard"."""
    root = tmp_path_factory.mktemp("saved")
    for name in FAMILIES:
        save_pretrained(hard(name)[0], root / name)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_from_pretrained_restores_the_sparse_model(name: str, saved: Path) -> None:
    model, inputs = hard(name)
    loaded = type(model).from_pretrained(saved / name)  # type: ignore[attr-defined]
    assert type(loaded) is type(model)
    assert_same_outputs(logits(loaded, inputs), logits(model, inputs))
    assert not torch.equal(logits(model, inputs), logits(set_stage(deepcopy(model), "dense"), inputs))
    assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize("name", GENERATORS)
def test_loaded_models_generate_the_same(name: str, saved: Path) -> None:
    model, inputs = hard(name)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    loaded: Any = load_pretrained(saved / name)
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))  # type: ignore[operator]


_LOAD_ALL = """
import sys
import {first}
assert "transformers.modeling_utils" not in sys.modules or "{first}" == "transformers"
import torch, transformers
from safetensors.torch import load_file, save_file
for name, architecture in {architectures}.items():
    model = getattr(transformers, architecture).from_pretrained("{root}/" + name)
    with torch.no_grad():
        logits = model(**load_file("{root}/" + name + ".inputs")).logits
    save_file({{"logits": logits}}, "{root}/" + name + ".{first}")
    del model
print("lte_compile" in sys.modules)
"""


@pytest.mark.parametrize("first", ["lte_compile", "transformers"])
def test_other_processes(first: str, saved: Path) -> None:
    """With lte_compile imported plain from_pretrained gives the sparse model, without it the dense one."""
    models = {name: hard(name) for name in FAMILIES}
    for name, (_, inputs) in models.items():
        save_file(inputs, saved / f"{name}.inputs")
    architectures = {name: type(model).__name__ for name, (model, _) in models.items()}
    script = _LOAD_ALL.format(first=first, architectures=architectures, root=saved)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(first == "lte_compile")
    for name, (model, inputs) in models.items():
        result = load_file(saved / f"{name}.{first}")["logits"]
        expected = logits(model if first == "lte_compile" else set_stage(model, "dense"), inputs)
        # Another process may pick other BLAS kernels by alignment, and dense loading has another memory layout:
        # sums are reordered, by a few units in float64's last place.
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_transformers_own_save_pretrained_writes_the_plan_of_now(tmp_path: Path) -> None:
    model, inputs = routed("bert")
    model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    for router in routers(set_stage(model, "hard")):
        router.threshold = 0.45
    model.save_pretrained(tmp_path / "hard")  # type: ignore[operator]
    assert {router.stage for router in routers(load_pretrained(tmp_path / "dense"))} == {Stage.DENSE}
    loaded = load_pretrained(tmp_path / "hard")
    assert {(router.stage, router.threshold) for router in routers(loaded)} == {(Stage.HARD, 0.45)}
    assert_same_outputs(logits(loaded, inputs), logits(model, inputs))


def test_a_copied_model_describes_itself() -> None:
    model, _ = routed("bert")
    copy = set_stage(deepcopy(model), "hard")
    configs: list[Any] = [model.config, copy.config]
    stages = [config.to_dict()["quantization_config"]["sites"][0]["stage"] for config in configs]
    assert stages == ["dense", "hard"]
    unpickled = pickle.loads(pickle.dumps(configs[1]))
    assert unpickled.quantization_config.to_dict() == configs[1].quantization_config.to_dict()


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model, inputs = hard("llama")
    model.save_pretrained(tmp_path, max_shard_size="200KB")  # type: ignore[operator]
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same_outputs(logits(load_pretrained(tmp_path), inputs), logits(model, inputs))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}"):
        load_pretrained(tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    model, inputs = hard("bert")  # no rotary tables, which .to() would round and loading computes anew
    save_pretrained(model.to(torch.bfloat16), tmp_path)
    loaded = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same_outputs(logits(loaded, inputs), logits(model, inputs))
    wider = load_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    assert {parameter.dtype for parameter in wider.parameters()} == {torch.float32}
    assert torch.equal(logits(wider, inputs), logits(model.float(), inputs))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(device_map: str, saved: Path) -> None:
    model, inputs = hard("llama")
    loaded = tf.AutoModelForCausalLM.from_pretrained(saved / "llama", device_map=device_map)
    assert_same_outputs(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("name, layouts", [("llama", "down_proj"), ("gpt2", "c_fc"), ("bert", "output.dense")])
def test_decode_layout_comes_back(name: str, layouts: str, saved: Path) -> None:
    loaded = load_pretrained(saved / name)
    for router in routers(loaded):
        weight_name = router.site.down if layouts in router.site.down else router.site.up
        assert layouts in weight_name
        assert is_neuron_major(loaded.get_parameter(weight_name))


def test_tied_weights_stay_tied(saved: Path) -> None:
    loaded: Any = load_pretrained(saved / "gpt2")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_headless_model_from_a_checkpoint_with_head(saved: Path) -> None:
    model, inputs = hard("bert")
    loaded = tf.AutoModel.from_pretrained(saved / "bert")
    with torch.no_grad():
        expected = model.bert(**inputs).last_hidden_state  # type: ignore[operator]
        result = loaded(**inputs).last_hidden_state
    assert_same_outputs(result, expected)


def test_encoder_from_an_encoder_decoder(saved: Path) -> None:
    model, inputs = hard("t5")
    loaded = tf.T5EncoderModel.from_pretrained(saved / "t5")
    del inputs["decoder_input_ids"]
    with torch.no_grad():
        expected = model.encoder(**inputs).last_hidden_state  # type: ignore[operator]
        assert_same_outputs(loaded(**inputs).last_hidden_state, expected)


def test_loaded_models_train_and_cast(saved: Path) -> None:
    loaded: Any = load_pretrained(saved / "bert")
    assert not any(router.weight.requires_grad for router in routers(loaded))
    assert not getattr(loaded, "is_quantized", False)
    _, inputs = hard("bert")
    set_stage(loaded.train(), "soft")(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(router.weight.grad is not None for router in routers(loaded))
    assert loaded.half().dtype is torch.float16


def test_transforming_again_after_loading_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="transformed already"):
        transform(load_pretrained(saved / "bert"))


class Tied(nn.Module):
    """Two blocks with the same first projection, and a table used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16, dtype=torch.float64)
        self.blocks = stack()
        self.head = nn.Linear(16, 11, bias=False, dtype=torch.float64)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.table(ids)))
        return result


def exported() -> nn.Module:
    return torch.export.export(stack(), (tokens(3, 5),)).module()


@pytest.mark.parametrize(
    "build, x", [(stack, tokens(3, 5)), (Tied, torch.arange(10).reshape(2, 5)), (exported, tokens(3, 5))]
)
def test_plain_modules(build: Callable[[], nn.Module], x: Tensor, tmp_path: Path) -> None:
    model = transform(build(), TransformConfig(expert_size=7), x)
    set_stage(model, "hard")
    save_pretrained(model, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", PLAN_FILE}
    loaded = load_pretrained(tmp_path / "model", model=build())
    assert_same_outputs(loaded(x), model(x))
    assert plan_of(loaded) == plan_of(model)
    with pytest.raises(ValueError, match="pass model="):
        load_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="transformed already"):
        load_pretrained(tmp_path / "model", model=loaded)


def test_tied_weights_of_plain_modules_stay_tied(tmp_path: Path) -> None:
    save_pretrained(transform(Tied(), TransformConfig(expert_size=8), torch.arange(4)), tmp_path)
    loaded: Any = load_pretrained(tmp_path, model=Tied(), dtype=torch.float32)
    assert loaded.head.weight is loaded.table.weight
    assert loaded.head.weight.dtype is torch.float32


def test_a_transformed_part_is_saved_with_the_whole(tmp_path: Path) -> None:
    x = torch.arange(10)
    whole = Tied()
    transform(whole.blocks, TransformConfig(expert_size=8), tokens(3))
    save_pretrained(set_stage(whole, "hard"), tmp_path)
    assert_same_outputs(load_pretrained(tmp_path, model=Tied())(x), whole(x))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    save_pretrained(routed_stack(), tmp_path)
    with pytest.raises(ValueError, match="has none of the plan's FFNs"):
        load_pretrained(tmp_path, model=nn.Linear(3, 3))
    with pytest.raises(ValueError, match="do not fit this Sequential"):
        load_pretrained(tmp_path, model=stack(hidden=48))


class Tokenizer:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_pretrained(self, save_directory: str) -> None:
        if self.error is not None:
            raise self.error
        (Path(save_directory) / "chat_templates").mkdir()
        (Path(save_directory) / "chat_templates" / "one.jinja").write_text("x")


def test_saving_over_a_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "model"
    model, inputs = hard("bert")
    model.save_pretrained(target, max_shard_size="50KB")  # type: ignore[operator]
    (target / "notes.txt").write_text("mine")
    for _ in range(2):
        save_pretrained(set_stage(model, "soft"), target, Tokenizer())
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "model.safetensors", "notes.txt", "chat_templates"),
    }
    assert_same_outputs(logits(load_pretrained(target), inputs), logits(model, inputs))


def test_a_save_that_fails_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    model = routed_stack()
    save_pretrained(model, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    set_stage(model, "hard")
    for directory in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(model, directory, Tokenizer(OSError("disk full")))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_replacement_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_stack()
    save_pretrained(model, tmp_path)
    replace = Path.replace

    def fail_at_the_plan(self: Path, target: Path) -> Path:
        if self.name == PLAN_FILE:
            raise OSError("interrupted")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_plan)
    with pytest.raises(OSError, match="interrupted"):
        save_pretrained(set_stage(model, "hard"), tmp_path)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        load_pretrained(tmp_path, model=stack())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = routed_stack()
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"cannot save to {directory}.* choose a"):
            save_pretrained(model, directory)
    with pytest.raises(ValueError, match="has no routers"):
        save_pretrained(stack(), tmp_path)


def test_models_quantized_by_others_are_refused(tmp_path: Path) -> None:
    model, _ = routed("bert")
    model.config.quantization_config = tf.BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="save the sparse model before quantizing"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        record = json.loads((directory / name).read_text())
        change(record["quantization_config"])
        (directory / name).write_text(json.dumps(record))

    return edit


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(keep * len(data))])

    return cut


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _without_a_router(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    del state[next(key for key in state if "router" in key)]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (_cut("model.safetensors", 0.5), "model.safetensors is cut short or corrupt"),
        (_cut("model.safetensors", 0.0), "model.safetensors is cut short or corrupt"),
        (_cut("config.json", 0.5), "config.json is cut short or corrupt"),
        (lambda d: (d / "model.safetensors").unlink(), "is no complete checkpoint"),
        (lambda d: (d / "config.json").unlink(), "is no complete checkpoint"),
        (_pickled, "pickled weights"),
        (_without_a_router, "missing_keys.*router"),
        (_edit("config.json", lambda plan: plan.update(format=99)), "format 99, written by a newer lte_compile"),
        (_edit("config.json", lambda plan: plan.pop("format")), "names no format"),
        (_edit("config.json", lambda plan: plan.update(colour="red")), r"unknown fields \['colour'\]"),
        (_edit("config.json", lambda plan: plan.update(sites=[])), "lists no sites"),
        (_edit("config.json", lambda plan: plan["sites"][1].update(age=3)), r"site 1 .* unknown fields \['age'\]"),
        (_edit("config.json", lambda plan: plan["sites"][0].pop("stage")), "site 0 .* no field 'stage'"),
        (_edit("config.json", lambda plan: plan["sites"][0].update(rule="x")), "site 0 .* unknown selection rule"),
        (_edit("config.json", lambda plan: plan["sites"][0].update(threshold=[])), "site 0 .* cannot be read"),
        (_edit("config.json", lambda plan: plan["sites"][0]["site"].pop("up")), "site 0 .* cannot be read"),
        (_edit("config.json", lambda plan: plan["sites"][0]["config"].update(x=1)), r"no fields \['x'\]"),
        (_edit("config.json", lambda plan: plan.update(quant_method="gptq")), "did not transform"),
    ],
)
def test_damage_is_reported_once_and_clearly(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save_pretrained(hard("bert")[0], tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        load_pretrained(tmp_path)


def test_plans_survive_json_exactly() -> None:
    model, _ = hard("phi3")
    plans = parse_plan(json.loads(json.dumps(plan_of(model))))
    for plan, router in zip(plans, require_routers(model), strict=True):
        assert (plan.site, plan.config) == (router.site, router.config)
        assert (plan.stage, plan.rule) == (router.stage, router.rule)
        assert (plan.threshold, plan.score_quantiles) == (router.threshold, router.score_quantiles)
