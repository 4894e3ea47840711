"""Labels numbered as the model numbers them, task files that change, models with few positions, one run an OUT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lte_compile.checkpoints.loading import has_classifier, labels_in_order
from lte_compile.cli.preparing import alone_in
from lte_compile.data.tasks import load_task
from tests.cli.conftest import BERT_RUN, Run
from tests.zoo import VOCAB

RunJson = Callable[..., Any]
NUMBERS = tuple(map(str, range(12)))
SORTED = tuple(sorted(NUMBERS))  # 0, 1, 10, 11, 2, ...
UNNAMED = tuple(f"LABEL_{number}" for number in range(12))


def _classifier(directory: Path, names: tuple[str, ...]) -> Path:
    record = {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(names))}
    (directory / "config.json").write_text(json.dumps(record))
    return directory


@pytest.mark.parametrize(
    ("own", "labels", "order"),
    [
        (("sad", "joy"), ("joy", "sad"), ("sad", "joy")),
        (UNNAMED, SORTED, NUMBERS),
        (UNNAMED, tuple(sorted(UNNAMED)), UNNAMED),
        (("LABEL_0", "LABEL_1"), ("joy", "sad"), ("joy", "sad")),  # neither names nor numbers: as they are
        (("a", "b", "c"), ("joy", "sad"), ("joy", "sad")),
    ],
)
def test_labels_take_the_classifiers_order(
    own: tuple[str, ...], labels: tuple[str, ...], order: tuple[str, ...], tmp_path: Path
) -> None:
    path = _classifier(tmp_path, own)
    assert labels_in_order(path, labels) == order
    assert has_classifier(path, order) == (len(own) == len(labels))


def test_a_task_in_another_order_has_the_same_texts_by_the_same_names(labelled: Path) -> None:
    task = load_task(str(labelled))
    other = task.in_order(task.labels[::-1])
    for rows, renumbered in ((task.train, other.train), (task.valid, other.valid), (task.test, other.test)):
        assert [(text, task.labels[i]) for text, i in rows] == [(text, other.labels[i]) for text, i in renumbered]


def test_a_classifier_with_its_labels_in_another_order_is_as_good(
    trained_bert: Path, labelled: Path, tmp_path: Path, run_json: RunJson
) -> None:
    swapped = tmp_path / "swapped.csv"
    names = {"animal": "zoo", "tool": "box"}  # the first label in the alphabet was the second
    header, *lines = labelled.read_text().splitlines()
    rows = [line.rsplit(",", 1) for line in lines]
    swapped.write_text("\n".join([header, *(f"{text},{names[name]}" for text, name in rows)]))
    renamed = tmp_path / "model"
    renamed.mkdir()
    for file in trained_bert.iterdir():
        if file.is_file():
            (renamed / file.name).write_bytes(file.read_bytes())
    config = json.loads((renamed / "config.json").read_text())
    assert config["id2label"] == {"0": "animal", "1": "tool"}
    config |= {"id2label": {"0": "zoo", "1": "box"}, "label2id": {"zoo": 0, "box": 1}}
    (renamed / "config.json").write_text(json.dumps(config))
    expected = run_json("evaluate", trained_bert, "--task", labelled)["rows"]
    assert expected[0]["quality"] > 0.7  # which the other order would turn into what is missing to 1
    assert run_json("evaluate", renamed, "--task", swapped)["rows"] == expected


def test_a_changed_task_file_is_another_run(bert: Path, labelled: Path, tmp_path: Path, run: Run) -> None:
    task = tmp_path / "things.csv"
    task.write_text(labelled.read_text())
    compare = ("compare", bert, "--task", task, "--out", tmp_path / "c", "--methods", "dense", "--densities", 0.5)
    train = ("train", bert, tmp_path / "t", "--task", task, *BERT_RUN)
    assert run(*compare, *BERT_RUN).exit_code == 0
    assert run(*train).exit_code == 0
    task.write_text(labelled.read_text().replace("hen", "cow"))
    for command in ((*compare, *BERT_RUN), train):
        result = run(*command)
        assert result.exit_code == 2
        assert "task_sha256 was" in " ".join(result.stderr.split())


def test_more_tokens_than_positions_are_refused(llama: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    options = ("--stage1-steps", 1, "--stage2-steps", 0, "--batch-size", 2, "--expert-size", 8)
    result = run("train", tmp_path / "gpt2", tmp_path / "out", "--task", prose, "--window", 33, *options)
    assert result.exit_code == 2
    assert "has 32 positions; got --window 33" in " ".join(result.stderr.split())
    assert run("train", tmp_path / "gpt2", tmp_path / "out", "--task", prose, "--window", 32, *options).exit_code == 0


def test_one_run_at_a_time_writes_to_an_out(bert: Path, labelled: Path, tmp_path: Path, run: Run) -> None:
    train = ("train", bert, tmp_path / "out", "--task", labelled, *BERT_RUN)
    with alone_in(tmp_path / "out"):
        result = run(*train)
    assert result.exit_code == 2
    assert "another run is writing to" in result.stderr
    assert run(*train).exit_code == 0


def test_a_model_that_has_routers_says_what_stays(trained_llama: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    steps = ("--stage1-steps", 1, "--stage2-steps", 0, "--window", 16, "--batch-size", 4)
    result = run("train", trained_llama, tmp_path / "o", "--task", prose, *steps, "--expert-size", 4)
    assert result.exit_code == 0, result.stderr
    assert "expert_size 8, not 4" in " ".join(result.stderr.split())


def test_stage_2_alone_starts_from_fitted_routers(llama: Path, prose: Path, tmp_path: Path, run_json: RunJson) -> None:
    """Drawn ones of a model that was not trained would be far from any density."""
    options = ("--window", 16, "--batch-size", 4, "--expert-size", 8, "--stage2-steps", 2, "--target-density", 0.5)
    fitted = run_json("train", llama, tmp_path / "a", "--task", prose, "--stage1-steps", 0, *options)
    drawn = run_json("train", llama, tmp_path / "b", "--task", prose, "--stage1-steps", 0, "--no-fit-router", *options)
    assert fitted != drawn


def test_a_method_that_diverges_leaves_the_others_table(llama: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    rates = ("--learning-rate", 1e12, "--dense-learning-rate", 1e-4, "--finetune-learning-rate", 1e-4)
    steps = ("--stage1-steps", 4, "--stage2-steps", 0, "--window", 16, "--batch-size", 4, "--expert-size", 8)
    grid = ("--methods", "lte,dense,kla", "--densities", 0.5, "--out", tmp_path)
    result = run("compare", llama, "--task", prose, *grid, *steps, *rates)
    assert result.exit_code == 1
    assert "comparison.md" in result.stderr
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"dense", "kla"}


def test_a_common_start_that_diverges_says_so(llama: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    start = ("--finetune-steps", 4, "--finetune-learning-rate", 1e18)
    steps = ("--stage1-steps", 2, "--stage2-steps", 0, "--window", 16, "--batch-size", 4, "--expert-size", 8)
    grid = ("--methods", "kla", "--densities", 0.5, "--out", tmp_path)
    result = run("compare", llama, "--task", prose, *grid, *steps, *start)
    assert result.exit_code == 1
    assert "in fine-tune, step" in " ".join(result.stderr.split())
    assert not (tmp_path / "comparison.json").exists()


def test_a_damaged_point_is_named_before_the_work(llama: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "dense-1-seed0.json").write_text("")
    grid = ("--methods", "dense,kla", "--densities", 0.5, "--out", tmp_path)
    result = run("compare", llama, "--task", prose, *grid, "--window", 16, "--stage1-steps", 1, "--stage2-steps", 0)
    assert result.exit_code == 2
    assert "dense-1-seed0.json is damaged" in " ".join(result.stderr.split())
    assert not (tmp_path / "checkpoints").exists()


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "ok", "label": "a"}\n{"text": "\\ud800", "label": "b"}\n')
    with pytest.raises(ValueError, match="line 2: 'text' holds half of a surrogate pair"):
        load_task(str(path))
