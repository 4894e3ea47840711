"""Conversion of checkpoints weight by weight: equal to conversion in memory, in little memory, and all or nothing."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lte_compile.checkpoints.persistence import INDEX_FILE, load_pretrained
from lte_compile.checkpoints.streaming import convert_checkpoint, plan_stream
from lte_compile.checkpoints.streaming_files import Entry, Shard, create_shard, open_shard
from lte_compile.config import Grouping, TransformConfig
from lte_compile.data.models import resolve_model
from lte_compile.routing.router import routers
from tests.checkpoints import CONFIG, assert_equal, in_memory, saved


@pytest.mark.parametrize("scattered", [False, True], ids=["one file", "scattered"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5", "bert", "albert"])
def test_equals_conversion_in_memory(family: str, scattered: bool, tmp_path: Path) -> None:
    """Conv1D and tied embeddings (gpt2), fused gate and up (phi3), two stacks (t5), shared layers (albert)."""
    source = saved(family, tmp_path / "dense", scattered=scattered)
    convert_checkpoint(source, tmp_path / "streamed", CONFIG)
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole"))
    weights = {path.name for path in source.glob("model*")}
    assert {path.name for path in (tmp_path / "streamed").glob("model*")} == weights


@pytest.mark.parametrize("grouping", [Grouping.RANDOM, Grouping.CONTIGUOUS])
def test_other_groupings(grouping: Grouping, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    config = TransformConfig(expert_size=8, grouping=grouping, seed=3, router_bias=False)
    convert_checkpoint(source, tmp_path / "streamed", config)
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole", config))


@pytest.mark.parametrize("family, dtype", [("llama", torch.bfloat16), ("t5", torch.float16)])
def test_other_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers keeps some of T5's weights in float32 when it loads the rest in float16."""
    source = saved(family, tmp_path / "dense", scattered=True)
    convert_checkpoint(source, tmp_path / "streamed", CONFIG, dtype=dtype)
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole", dtype=dtype))


def test_tied_weights_that_were_saved_twice(tmp_path: Path) -> None:
    """Both copies of a tied FFN weight are reordered, so that it does not matter which one is read."""
    source = saved("albert", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    name = "albert.embeddings.word_embeddings.weight"
    tensors["predictions.decoder.weight"] = tensors[name].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "streamed", CONFIG)
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole"))


def test_what_no_parameter_is_made_of_is_left_out(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors") | {"model.layers.7.left_over": torch.ones(2)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "streamed", CONFIG)
    with safe_open(tmp_path / "streamed" / "model.safetensors", "pt") as file:
        assert "model.layers.7.left_over" not in file.keys()  # noqa: SIM118
    assert len(list(routers(load_pretrained(tmp_path / "streamed")))) == 2


def test_plain_transformers_reads_it_as_dense_and_the_index_is_right(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense", scattered=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_bytes(b"a pickle, perhaps")
    convert_checkpoint(source, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "notes.bin").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    held = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    sizes = [tensor.nbytes for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


# Peaks are VmHWM, of this program alone: ru_maxrss begins with that of the process that started it.
MEASURED = """
import re, sys, torch
torch.set_num_threads(1)
from lte_compile import TransformConfig
from lte_compile.checkpoints.streaming import plan_stream, run_stream
from pathlib import Path
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
plan = plan_stream(Path(sys.argv[1]), TransformConfig(grouping="random"))
before = peak()
run_stream(plan, Path(sys.argv[2]))
print(peak() - before)
"""


def test_memory_is_a_layer_not_the_model(tmp_path: Path) -> None:
    """700 MB of weights in one file, 29 MB a layer. The file is sparse: it costs no disk until it is copied."""
    config = tf.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64_000,
        dtype=torch.float16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "dense")
    with torch.device("meta"):
        state = tf.LlamaForCausalLM(config).half().state_dict()
    entries = {name: Entry.of(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    shard = create_shard(tmp_path / "dense" / "model.safetensors", entries, {"format": "pt"})
    total = sum(entry.nbytes for entry in entries.values())
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "dense"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    chunk, layer = 64 * 2**20, total // 24
    assert grown < 2 * layer + 2 * chunk < total // 2
    assert open_shard(tmp_path / "out" / "model.safetensors").entries.keys() > shard.entries.keys()


# ---- all or nothing ------------------------------------------------------------------------------------------------


def contents(directory: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_conversion_leaves_nothing(existing: bool, tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "dense"), tmp_path / "here" / "out"
    out.parent.mkdir()
    if existing:
        shutil.copytree(source, out)
    before = contents(out.parent)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, CONFIG, on_site=interrupt)
    assert contents(out.parent) == before
    assert out.exists() == existing


def test_a_model_that_was_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = saved("gpt2", tmp_path / "out", scattered=True)
    source = saved("llama", tmp_path / "dense")
    convert_checkpoint(source, out, CONFIG)
    assert_equal(out, in_memory(source, tmp_path / "whole"))
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def truncate(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def scramble(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def lose(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[1].unlink()


def spoil(source: Path) -> None:
    path = next(p for p in source.glob("*.safetensors") if any("down_proj" in name for name in load_file(p)))
    tensors = load_file(path)
    tensors[next(name for name in tensors if "down_proj" in name)][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def escape(source: Path) -> None:
    index = json.loads((source / INDEX_FILE).read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (source / INDEX_FILE).write_text(json.dumps(index))


def pickle_weights(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


def quantize(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    "damage, says",
    [
        (quantize, r"is quantized \(gptq\)"),
        (truncate, "00002-of-00003.safetensors is cut short or corrupt"),
        (scramble, "00002-of-00003.safetensors is cut short or corrupt"),
        (lose, "00002-of-00003.safetensors is missing"),
        (spoil, "down_proj.weight holds NaN or infinity"),
        (escape, "outside of the checkpoint"),
        (pickle_weights, r"pickled weights \(pytorch_model.bin\)"),
    ],
)
def test_damaged_checkpoints(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense", scattered=True)
    damage(source)
    with pytest.raises(ValueError, match=says):
        convert_checkpoint(source, tmp_path / "out", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama", tmp_path / "dense")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RuntimeError, match=r"needs .* GB of disk"):
        convert_checkpoint(source, tmp_path / "out", CONFIG, on_site=lambda _: pytest.fail("worked before looking"))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama", tmp_path / "dense")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Shard, "write_bytes", full)
    with pytest.raises(RuntimeError, match=r"cannot write to .*out: No space left on device .* nothing was kept"):
        convert_checkpoint(source, tmp_path / "out", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# ---- what has to be converted in memory ----------------------------------------------------------------------------


def test_activations_need_the_model(tmp_path: Path) -> None:
    config = TransformConfig(grouping=Grouping.COACTIVATION)
    assert plan_stream(saved("llama", tmp_path / "dense"), config) == "grouping 'coactivation' runs the model"
    with pytest.raises(ValueError, match="cannot be converted piece by piece: grouping 'coactivation'"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", config)


def test_weights_under_other_names(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    reason = plan_stream(saved("vit", tmp_path / "vit"), CONFIG)
    assert not isinstance(plan_stream(source, CONFIG), str)
    assert isinstance(reason, str)
    assert "goes by another name in the files" in reason


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """Real weights, with tied embeddings."""
    source = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    convert_checkpoint(source, tmp_path / "streamed")
    assert_equal(tmp_path / "streamed", in_memory(source, tmp_path / "whole", TransformConfig()))
