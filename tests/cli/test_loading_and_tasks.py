"""checkpoints.loading and evaluation.tasks: heads that fit a task, and what a task's name or file means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lte_compile.checkpoints.loading import has_classifier, is_transformed, load_causal_lm, load_classifier, load_model
from lte_compile.config import Stage
from lte_compile.evaluation.tasks import (
    DEFAULT_SIZES,
    EncodedTask,
    TaskKind,
    TaskSize,
    kind_of,
    named_kind,
    open_task,
)
from lte_compile.routing.router import routers

LABELS = ("animal", "tool")


def test_a_classifier_is_recognised_by_its_labels(bert: Path, trained_bert: Path, llama: Path) -> None:
    assert has_classifier(trained_bert, LABELS)
    assert not has_classifier(trained_bert, LABELS[::-1])
    assert has_classifier(bert, ("a", "b", "c"))  # unnamed: by their number
    assert not has_classifier(bert, LABELS)
    assert not has_classifier(llama, LABELS)


def test_a_trained_head_is_kept_and_another_is_drawn_anew(trained_bert: Path) -> None:
    trained, _ = load_classifier(trained_bert, LABELS)
    again, _ = load_classifier(trained_bert, LABELS)
    assert torch.equal(trained.get_parameter("classifier.weight"), again.get_parameter("classifier.weight"))
    wider, _ = load_classifier(trained_bert, ("a", "b", "c", "d"))
    assert wider.get_parameter("classifier.weight").shape == (4, 64)


def test_routers_survive_another_head(trained_bert: Path, converted: Path) -> None:
    assert is_transformed(converted)
    classifier, tokenizer = load_classifier(converted, LABELS)  # a language model's routers under a classifier
    assert len(list(routers(classifier))) == 2
    logits = classifier(**tokenizer(["w1 cat", "axe w2 w3"], return_tensors="pt", padding=True)).logits
    assert logits.shape == (2, 2)  # needs a padding token, which the decoder's config had not
    assert {router.stage for router in routers(load_model(trained_bert))} == {Stage.HARD}


def test_an_encoder_is_no_language_model(bert: Path) -> None:
    with pytest.raises(ValueError, match="no causal language model"):
        load_causal_lm(bert)


def test_models_without_a_class_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="architectures"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(ValueError, match="NoSuchModel"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"archi')
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)


def test_what_a_file_is_for(tmp_path: Path, labelled: Path, prose: Path) -> None:
    table = tmp_path / "texts.jsonl"
    table.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(12)))
    assert named_kind(str(table)) is TaskKind.LANGUAGE_MODEL
    assert named_kind(str(labelled)) is TaskKind.CLASSIFICATION
    assert named_kind(str(prose)) is TaskKind.LANGUAGE_MODEL
    assert named_kind("trec") is TaskKind.CLASSIFICATION
    assert kind_of(open_task(str(labelled), TaskKind.LANGUAGE_MODEL)) is TaskKind.LANGUAGE_MODEL
    with pytest.raises(ValueError, match="cannot be used as a language-model"):
        open_task("trec", TaskKind.LANGUAGE_MODEL)


def test_encoded_splits(llama: Path, prose: Path) -> None:
    _, tokenizer = load_causal_lm(llama)
    size = TaskSize(batch_size=4, window=16, test_examples=10)
    task = EncodedTask(task=open_task(str(prose)), tokenizer=tokenizer, size=size)
    device = torch.device("cpu")
    assert len(task.held_out(3, device)) == 3
    assert [len(batch["input_ids"]) for batch in task.test_batches(task.test_examples())] == [4, 4, 2]
    batches = task.training_batches(seed=0)
    start = batches.state_dict()
    first = batches.next_batch()["input_ids"]
    batches.load_state_dict(start)
    assert torch.equal(batches.next_batch()["input_ids"], first)


@pytest.mark.parametrize("name, value", [("batch_size", 0), ("window", 1), ("max_length", 1), ("test_examples", -1)])
def test_sizes_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        TaskSize(**{"batch_size": 1, name: value})


def test_every_kind_has_usual_sizes() -> None:
    assert set(DEFAULT_SIZES) == set(TaskKind)
