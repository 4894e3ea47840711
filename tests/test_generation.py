"""A generation task: prompts and completions in batches, and ROUGE-L of what a model makes of the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.data.batches import Example, collate, encode_pairs, pack
from lte_compile.data.tasks import Pairs
from lte_compile.evaluation.generation import mean_rouge_l
from lte_compile.evaluation.tasks import EncodedTask, TaskKind, TaskSize, open_task
from tests.zoo import build


class Words:
    """A tokenizer of numbers: "5 6" is the tokens 5 and 6; 2 ends a text."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return " ".join(str(int(token)) for token in tokens if int(token) > 2)


class Repeats(nn.Module):
    """Continues any prompt with its last token, three times, whatever the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        assert bool((attention_mask[:, -1] == 1).all())  # padding is on the left
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, min(3, max_new_tokens))], dim=1)


def test_a_pair_is_prompt_completion_and_end() -> None:
    [example] = encode_pairs([("3 4", "5 6")], Words())
    assert example == Example((3, 4, 5, 6, 2), unscored=2)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end() -> None:
    long_prompt, long_completion = encode_pairs([("3 4 5 6 7 8", "9"), ("3", "4 5 6 7 8 9")], Words(), window=6)
    assert long_prompt == Example((5, 6, 7, 8, 9, 2), unscored=4)
    assert long_completion == Example((3, 4, 5, 6), unscored=1)


def test_only_completions_are_learned() -> None:
    batch = collate(encode_pairs([("3 4", "5 6"), ("7", "8")], Words()), pad_token_id=0)
    assert batch["labels"].tolist() == [[-100, -100, 5, 6, 2], [-100, 8, 2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def pair(first: int, prompt: int, completion: int) -> Example:
    return Example(tuple(range(first, first + prompt + completion)), unscored=prompt)


def test_pairs_fill_windows_and_each_is_learned_whole() -> None:
    pairs = [pair(10, 3, 2), pair(20, 1, 2), pair(30, 2, 2), pair(40, 4, 1), pair(50, 1, 1)]
    labels = collate(pack(pairs, 9), pad_token_id=0)["labels"]
    assert labels.shape[1] == 9
    learned = [[token for token in row if token != -100] for row in labels.tolist()]
    assert learned == [[13, 14, 21, 22], [32, 33, 44], [51, 13, 14]]  # the last window goes on with the first pair


def test_a_pair_that_is_cut_is_read_up_to_the_cut() -> None:
    first, *_ = pack([pair(10, 3, 2), pair(20, 1, 5), pair(30, 2, 2)], 8)
    assert first.tokens == (10, 11, 12, 13, 14, 20, 21, 22)
    assert collate([first], 0)["labels"][0].tolist() == [-100, -100, -100, 13, 14, -100, -100, -100]


def test_few_pairs_make_one_short_window() -> None:
    [window] = pack([pair(10, 3, 2), pair(20, 1, 2)], 20)
    assert len(window.tokens) == 8
    assert set(collate([window], 0)["labels"][0].tolist()) == {-100, 13, 14, 21, 22}


def test_a_pair_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a pair of 5 tokens does not fit into a window of 4"):
        pack([pair(10, 3, 2)], 4)


def test_scores_are_those_of_each_prompt() -> None:
    examples = encode_pairs([("3 4", "4 4 4"), ("9", "9 8"), ("5 6 7", "3")], Words())
    # all three words; then 1 common of 3 generated and 2 expected; then none
    expected = (1.0 + 2 * 1 / 5 + 0.0) / 3
    for batch_size in (1, 2, 3):
        assert mean_rouge_l(Repeats(), Words(), examples, batch_size=batch_size) == pytest.approx(expected)


def test_padding_does_not_change_what_a_model_writes() -> None:
    model, _ = build("llama")
    examples = encode_pairs([("3 4 5 6 7", "8 9 10 11"), ("12", "13 14 15 16")], Words())
    together = mean_rouge_l(model, Words(), examples, batch_size=2)
    assert mean_rouge_l(model, Words(), examples, batch_size=1) == together


def test_what_cannot_generate_is_refused() -> None:
    example = encode_pairs([("3", "4")], Words())
    with pytest.raises(ValueError, match=r"no generate\(\)"):
        mean_rouge_l(nn.Linear(1, 1), Words(), example, batch_size=1)
    with pytest.raises(ValueError, match="nothing to generate"):
        mean_rouge_l(Repeats(), Words(), [], batch_size=1)


def test_a_file_with_prompts_and_completions_is_a_generation_task(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "{3 + i}", "completion": "{4 + i} {5 + i}"}}' for i in range(20)]
    path.write_text("\n".join([*rows, rows[0]]))
    task = open_task(str(path))
    assert isinstance(task, Pairs)
    assert [len(split) for split in (task.train, task.valid, task.test)] == [16, 2, 2]  # the double is dropped
    data = EncodedTask(task=task, tokenizer=Words(), size=TaskSize(batch_size=2))
    assert data.kind is TaskKind.GENERATION
    model, _ = build("llama")
    measured = data.evaluate(model, data.test_examples())
    assert measured.rouge_l == data.quality(measured)
    assert measured.loss > 0
    assert set(data.training_batches(0).next_batch()) == {"input_ids", "attention_mask", "labels"}


def test_prose_is_refused_where_pairs_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("one\n\ntwo")
    with pytest.raises(ValueError, match="columns prompt and completion"):
        open_task(str(path), TaskKind.GENERATION)
