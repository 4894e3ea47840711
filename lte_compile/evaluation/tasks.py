"""A task by name, and what training and evaluation need of it: encoded batches of its splits, and its metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.data.batches import (
    Example,
    TextBatches,
    classification_batches,
    encode_pairs,
    encode_rows,
    encode_windows,
    evaluation_batches,
    language_model_batches,
    pair_batches,
)
from lte_compile.data.tasks import CORPORA, PAIRS, TASKS, LabelledTask, Pairs, Task, load_corpus, load_pairs, load_task
from lte_compile.data.user_files import columns_of, is_user_file
from lte_compile.evaluation.generation import mean_rouge_l
from lte_compile.evaluation.quality import Evaluation, evaluate
from lte_compile.reports.results import Metric
from lte_compile.training.losses import Batch


class TaskKind(StrEnum):
    """What a model is asked to do: name a text's class, predict every next token, or complete prompts."""

    CLASSIFICATION = "classification"
    LANGUAGE_MODEL = "language-model"
    GENERATION = "generation"


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """How much text goes into a batch and into an evaluation.

    Args:
        batch_size: texts or windows.
        max_length: tokens a text is cut to (classification).
        window: tokens of a window (language model), or at most of a prompt with its completion (generation).
        test_examples: at most so many texts or windows of the test split; 0 takes all.
    """

    batch_size: int
    max_length: int = 64
    window: int = 256
    test_examples: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 2), ("window", 2), ("test_examples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")


# A window holds as many tokens as a batch of short texts; 64 windows estimate a perplexity to about 2 %.
DEFAULT_SIZES: Mapping[TaskKind, TaskSize] = {
    TaskKind.CLASSIFICATION: TaskSize(batch_size=32),
    TaskKind.LANGUAGE_MODEL: TaskSize(batch_size=8, test_examples=64),
    TaskKind.GENERATION: TaskSize(batch_size=8, test_examples=256),
}
# Lengths of training texts with `few_lengths`: four of them up to 64 tokens, each with a CUDA graph of its own.
LENGTH_MULTIPLE = 16
# Prompts that are continued together: a token costs a GPU as much for 128 as for 8, and their caches are small.
GENERATED_AT_ONCE = 128
# Texts that are measured together, at least: a GPU takes as long for a few short ones.
MEASURED_AT_ONCE: Mapping[TaskKind, int] = {
    TaskKind.CLASSIFICATION: 128,
    TaskKind.LANGUAGE_MODEL: 1,
    TaskKind.GENERATION: 16,
}
_METRICS: Mapping[TaskKind, Metric] = {
    TaskKind.CLASSIFICATION: Metric.ACCURACY,
    TaskKind.LANGUAGE_MODEL: Metric.PERPLEXITY,
    TaskKind.GENERATION: Metric.ROUGE_L,
}


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task's splits as batches for one tokenizer."""

    task: Task
    tokenizer: Any
    size: TaskSize

    @property
    def kind(self) -> TaskKind:
        return kind_of(self.task)

    @property
    def metric(self) -> Metric:
        return _METRICS[self.kind]

    def quality(self, evaluation: Evaluation) -> float:
        """The metric's value, of what `evaluate` returned."""
        if self.metric is Metric.ROUGE_L:
            assert evaluation.rouge_l is not None
            return evaluation.rouge_l
        return evaluation.accuracy if self.metric is Metric.ACCURACY else evaluation.perplexity

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> Evaluation:
        """Measure the model on examples of the task, in its current stage; a generation task also generates.

        Loss and densities of a generation task are those of reading the prompts with their true completions.
        """
        measured = evaluate(model, self.test_batches(examples))
        if self.metric is not Metric.ROUGE_L:
            return measured
        at_once = max(self.size.batch_size, GENERATED_AT_ONCE)
        score = mean_rouge_l(model, self.tokenizer, examples, batch_size=at_once)
        return replace(measured, rouge_l=score)

    def training_batches(self, seed: int, *, few_lengths: bool = False) -> TextBatches:
        """Endless batches of the training split; with `few_lengths` labelled texts are padded to multiples of 16."""
        if isinstance(self.task, LabelledTask):
            return classification_batches(
                self.task.train,
                self.tokenizer,
                batch_size=self.size.batch_size,
                max_length=self.size.max_length,
                seed=seed,
                length_multiple=LENGTH_MULTIPLE if few_lengths else 1,
            )
        size, window = self.size.batch_size, self.size.window
        if isinstance(self.task, Pairs):
            return pair_batches(self.task.train, self.tokenizer, batch_size=size, window=window, seed=seed)
        return language_model_batches(self.task.train, self.tokenizer, batch_size=size, window=window, seed=seed)

    def held_out(self, count: int, device: torch.device) -> list[Batch]:
        """The first `count` batches of the validation split; of prose as many windows, from all over it."""
        examples = self._some(self._encode(self.task.valid), count * self.size.batch_size)
        batches = evaluation_batches(examples, self.tokenizer, batch_size=self.size.batch_size)
        return [to_device(batch, device) for batch in islice(batches, count)]

    def test_examples(self) -> tuple[Example, ...]:
        """The test split, or its beginning; of prose as many windows, from all over it."""
        return self._limited(self._encode(self.task.test))

    def valid_examples(self) -> tuple[Example, ...]:
        """The validation split, limited like the test split."""
        return self._limited(self._encode(self.task.valid))

    def _limited(self, examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return self._some(examples, self.size.test_examples) if self.size.test_examples else examples

    def test_batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Each example once."""
        size = max(self.size.batch_size, MEASURED_AT_ONCE[self.kind])
        yield from evaluation_batches(examples, self.tokenizer, batch_size=size)

    def _some(self, examples: Sequence[Example], count: int) -> tuple[Example, ...]:
        """Documents follow each other: the first windows of a split would be one or two authors'."""
        if self.kind is not TaskKind.LANGUAGE_MODEL or count >= len(examples):
            return tuple(examples[:count])
        return tuple(examples[index * len(examples) // count] for index in range(count))

    def _encode(self, split: Sequence[Any]) -> tuple[Example, ...]:
        if self.kind is TaskKind.CLASSIFICATION:
            return encode_rows(split, self.tokenizer, self.size.max_length)
        if self.kind is TaskKind.GENERATION:
            return encode_pairs(split, self.tokenizer, self.size.window)
        return encode_windows(split, self.tokenizer, self.size.window)


def open_task(name: str, kind: TaskKind | None = None) -> Task:
    """A labelled task or a corpus by its name, or those or pairs out of a .csv, .jsonl or .txt file.

    Args:
        kind: overrides what the name or the file says: a labelled .csv can be read as prose.

    Raises:
        ValueError: an unknown name (with the closest known ones), a file that lacks what is needed, or a known task of
            the other kind.
    """
    found = named_kind(name)
    if kind not in (None, found) and not is_user_file(name):
        raise ValueError(f"{name!r} is a {found} task; it cannot be used as a {kind} task")
    return _LOADERS[kind or found](name)


def named_kind(name: str) -> TaskKind:
    """The kind of a task by its name, or by a file's columns: one with a `label`, or with a `completion`."""
    if name in TASKS:
        return TaskKind.CLASSIFICATION
    if name in CORPORA:
        return TaskKind.LANGUAGE_MODEL
    if name in PAIRS:
        return TaskKind.GENERATION
    if not is_user_file(name):
        known = [*TASKS, *CORPORA, *PAIRS]
        near = get_close_matches(name, known, n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"no task {name!r}; known are {', '.join(known)}, or give a .csv, .jsonl or .txt file{hint}")
    columns = columns_of(Path(name))
    if "label" in columns:
        return TaskKind.CLASSIFICATION
    return TaskKind.GENERATION if {"prompt", "completion"} <= columns else TaskKind.LANGUAGE_MODEL


def kind_of(task: Task) -> TaskKind:
    if isinstance(task, Pairs):
        return TaskKind.GENERATION
    return TaskKind.CLASSIFICATION if isinstance(task, LabelledTask) else TaskKind.LANGUAGE_MODEL


_LOADERS: Mapping[TaskKind, Callable[[str], Task]] = {
    TaskKind.CLASSIFICATION: load_task,
    TaskKind.LANGUAGE_MODEL: load_corpus,
    TaskKind.GENERATION: load_pairs,
}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
