"""lte-compile inspect and convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lte_compile.checkpoints.loading import load_model
from lte_compile.routing.router import routers
from lte_compile.routing.two_layer import TwoLayerRouter
from tests.cli.conftest import Run
from tests.zoo import build

RunJson = Callable[..., Any]


def test_inspect_shows_sites_and_refusals(run: Run, bert: Path) -> None:
    result = run("inspect", bert)
    assert result.exit_code == 0
    assert "bert.encoder.layer.*" in result.stdout
    assert "attention output projection" in result.stdout


def test_inspect_json_lists_every_site(run_json: RunJson, llama: Path) -> None:
    document = run_json("inspect", llama)
    assert [site["down"] for site in document["sites"]] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert all(rejection["reason"] for rejection in document["rejections"])


def test_inspect_draws_a_site(run_json: RunJson, llama: Path, tmp_path: Path) -> None:
    picture = tmp_path / "site.svg"
    assert run_json("inspect", llama, "--graph", picture, "--site", 1)["graph"] == str(picture)
    assert "model.layers.1.mlp" in picture.read_text()


def test_inspect_refuses_a_site_that_is_not_there(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("inspect", llama, "--graph", tmp_path / "site.svg", "--site", 9)
    assert result.exit_code == 2
    assert "9" in result.stderr
    assert not list(tmp_path.iterdir())


def test_inspect_finds_the_sites_of_a_converted_model(run_json: RunJson, converted: Path) -> None:
    assert len(run_json("inspect", converted)["sites"]) == 2


def test_convert_keeps_the_function_and_the_class(run_json: RunJson, llama: Path, tmp_path: Path) -> None:
    document = run_json("convert", llama, tmp_path / "out", "--expert-size", 16)
    assert document["max_abs_diff"] < 1e-5  # a permutation reorders sums in float32
    assert document["router_parameters"] == 2 * (8 * 64 + 8)  # two sites, 128 / 16 experts, D = 64, biases
    dense, inputs = build("llama")
    sparse = load_model(tmp_path / "out")
    assert isinstance(sparse, transformers.LlamaForCausalLM)
    assert len(list(routers(sparse))) == 2
    with torch.no_grad():
        torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=0)


def test_convert_with_two_layer_routers(run_json: RunJson, llama: Path, tmp_path: Path) -> None:
    options = ("--expert-size", 16, "--router", "two-layer", "--router-rank", 10)
    document = run_json("convert", llama, tmp_path / "out", *options)
    assert document["max_abs_diff"] < 1e-5
    assert document["config"]["router"] == "two-layer"
    assert document["router_parameters"] == 2 * (8 * (64 + 10) + 8 + 10 * 64 + 10)
    assert {type(router) for router in routers(load_model(tmp_path / "out"))} == {TwoLayerRouter}


def test_convert_table_names_where_it_went(run: Run, bert: Path, tmp_path: Path) -> None:
    result = run("convert", bert, tmp_path / "out", "--grouping", "random", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert "random grouping" in result.stdout
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_convert_without_a_tokenizer_and_in_another_dtype(run_json: RunJson, vit: Path, tmp_path: Path) -> None:
    run_json("convert", vit, tmp_path / "out", "--dtype", "bf16")
    assert {p.dtype for p in load_model(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_convert_groups_by_coactivation_of_a_text(
    run: Run, run_json: RunJson, llama: Path, prose: Path, tmp_path: Path
) -> None:
    refused = run("convert", llama, tmp_path / "out", "--grouping", "coactivation")
    assert refused.exit_code == 2
    assert "--task" in refused.stderr
    document = run_json("convert", llama, tmp_path / "out", "--grouping", "coactivation", "--task", prose)
    assert document["max_abs_diff"] < 1e-5


def test_convert_refuses_a_converted_model(run: Run, converted: Path, tmp_path: Path) -> None:
    result = run("convert", converted, tmp_path / "again")
    assert result.exit_code == 2
    assert "transformed already" in result.stderr
    assert not list(tmp_path.iterdir())


def test_convert_of_a_model_without_ffn_lists_every_candidate(run: Run, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=0, num_attention_heads=2
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "shallow")
    result = run("convert", tmp_path / "shallow", tmp_path / "out")
    assert result.exit_code == 2
    assert "no FFN found" in result.stderr
    assert "pooler.dense.weight" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--expert-size", 4096), ("--expert-size", 0), ("--dtype", "int8"), ("--router-rank", 8)]
)
def test_convert_refuses_bad_options(run: Run, bert: Path, tmp_path: Path, option: tuple[object, ...]) -> None:
    result = run("convert", bert, tmp_path / "out", *option)
    assert result.exit_code == 2
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "out").exists()
