"""A transformed model is still the model it was: class, config, generate, copies, dtypes, devices, state dicts."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.routing.router import routers, set_stage
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed, stack

DECODERS = ("llama", "gpt2", "t5_gated", "bart")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def sparse(name: str = "llama", stage: str = "hard") -> tuple[Any, dict[str, Any]]:
    model, inputs = routed(name, torch.float32)
    return set_stage(model, stage), inputs


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    """What generate takes: an encoder-decoder writes its own decoder's inputs."""
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", [*DECODERS, "bert", "phi3", "vit"])
def test_class_and_config_stay(name: str) -> None:
    dense: Any
    dense, _ = zoo.build(name)
    model, _ = sparse(name)
    assert type(model) is type(dense)
    kept = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    assert {**dense.config.to_dict(), "dtype": None} == {**kept, "dtype": None}  # routed() casts the sparse one
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules() if m not in set(routers(model))]
    dense_names = dict(dense.named_parameters()).keys()
    assert dense_names == {n for n, _ in model.named_parameters() if ".router." not in n}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_is_the_same_with_and_without_a_cache(name: str, cache: str) -> None:
    model, inputs = sparse(name)
    expected = model.generate(**prompt(inputs), **GREEDY, use_cache=False)
    cached = model.generate(**prompt(inputs), **GREEDY, cache_implementation=cache)
    assert expected.shape[1] > 1
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_dense_stage_generates_what_the_dense_model_does(name: str) -> None:
    dense, inputs = zoo.build(name, torch.float64)
    model, _ = routed(name, torch.float64)
    for options in ({}, {"num_beams": 3}):
        expected = dense.generate(**prompt(inputs), **GREEDY, **options)  # type: ignore[operator]
        assert torch.equal(model.generate(**prompt(inputs), **GREEDY, **options), expected)  # type: ignore[operator]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_beam_search(name: str, cache: str) -> None:
    model, inputs = sparse(name)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "cache_implementation": cache}
    found = model.generate(**prompt(inputs), **options)
    assert found.shape[0] == 4
    assert torch.equal(found, model.generate(**prompt(inputs), **{**options, "cache_implementation": "dynamic"}))


def saved_and_read(model: nn.Module) -> nn.Module:
    """By state dict, into a fresh transformed model, strictly and with pickles refused."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = sparse()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    state = torch.load(buffer, weights_only=True)
    assert str(fresh.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    result: nn.Module = fresh
    return result


def assigned(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        fresh = deepcopy(model).to("meta")
    fresh.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those outside the state dict
        owner, _, attribute = name.rpartition(".")
        setattr(fresh.get_submodule(owner), attribute, buffer)
    return fresh


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "data_parallel": nn.DataParallel,
    "pickled_data_parallel": lambda model: pickle.loads(pickle.dumps(nn.DataParallel(model))),
    "deepcopied_data_parallel": lambda model: deepcopy(nn.DataParallel(model)),
    "state_dict": saved_and_read,
    "assigned_state_dict": assigned,
    "to_cpu": lambda model: model.to("cpu"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_compute_the_same(copy: str) -> None:
    model, inputs = sparse()
    expected = output(model, inputs)
    copied = COPIES[copy](model)
    assert torch.equal(output(copied, inputs), expected)
    assert [router.stage for router in routers(copied)] == ["hard", "hard"]


@pytest.mark.parametrize("copy", ["deepcopy", "pickle"])
def test_copies_share_nothing(copy: str) -> None:
    model, inputs = sparse()
    expected = output(model, inputs)
    copied = COPIES[copy](model)
    set_stage(copied, "dense")
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(output(model, inputs), expected)


def test_a_strict_state_dict_names_what_is_missing() -> None:
    model, _ = sparse()
    dense, _ = zoo.build("llama")
    with pytest.raises(RuntimeError, match=r"Missing key.*router\.weight"):
        model.load_state_dict(dense.state_dict(), strict=True)
    assert dense.load_state_dict(model.state_dict(), strict=False).missing_keys == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, inputs = sparse(name)
    converted = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    result = output(converted, inputs)
    assert result.dtype == dtype
    assert torch.isfinite(result).all()


def test_the_meta_device_and_back() -> None:
    model, inputs = sparse()
    state, expected = deepcopy(model.state_dict()), output(model, inputs)
    rotary = deepcopy(dict(model.named_buffers()))  # not in the state dict
    on_meta = model.to("meta")
    assert output(on_meta, {"input_ids": inputs["input_ids"].to("meta")}).shape == expected.shape
    model.to_empty(device="cpu").load_state_dict(state)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(rotary[name])
    assert torch.equal(output(model, inputs), expected)


def test_threads_share_one_model() -> None:
    """As nn.DataParallel's replicas share hooks: gates must not get from one thread's call into another's."""
    model = set_stage(_stack(), "hard")
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in batches]

        def run(x: Tensor) -> list[Tensor]:
            with torch.no_grad():  # of each thread its own
                return [model(x) for _ in range(20)]

        with ThreadPoolExecutor(4) as pool:
            for results, right in zip(pool.map(run, batches), expected, strict=True):
                assert all(torch.equal(result, right) for result in results)


def test_replicas_of_data_parallel() -> None:
    """What nn.DataParallel runs per device: shallow copies whose parameters are tensors of their own."""
    model: Any = set_stage(_stack(), "soft")
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: _replicated(child) for name, child in model._modules.items() if child is not None}
    x = torch.randn(5, 16)
    assert torch.equal(replica(x), model(x))


def _replicated(module: Any) -> nn.Module:
    copy: Any = module._replicate_for_data_parallel()
    copy._modules = {name: _replicated(child) for name, child in module._modules.items() if child is not None}
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter.clone())
    result: nn.Module = copy
    return result


def _stack() -> nn.Module:
    return transform(stack(dtype=torch.float32), TransformConfig(expert_size=8), torch.zeros(3, 16))
