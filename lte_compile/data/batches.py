"""Batches of tokens whose position can be saved and restored.

B batch size, L tokens in the batch's longest text (classification) or in a window (language modelling).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Texts are sorted by length inside chunks of this many batches: little padding, and still well shuffled.
CHUNK_BATCHES = 20
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids of a text or window; the label is a class index, or None for language modelling.

    The first `unscored` tokens are a prompt: read, but not learned. So are the spans [start, stop) of `prompts`, where
    an example is made of several pairs.
    """

    tokens: tuple[int, ...]
    label: int | None = None
    unscored: int = 0
    prompts: tuple[tuple[int, int], ...] = ()


class TextBatches:
    """Endless seeded epochs over examples, one batch at a time.

    Epoch e's order depends on the seed and e alone, so (epoch, index) is the whole state: training resumes with
    exactly the batches that an uninterrupted run would have seen. Batches hold int64 tensors: input_ids and
    attention_mask [B, L], labels [B] (classification) or [B, L] (language modelling; models shift them themselves; -100
    where a token is padding or of a prompt).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        pad_token_id: int,
        seed: int,
        by_length: bool,
        length_multiple: int = 1,
    ) -> None:
        """`by_length` puts texts of similar length into one batch; windows, all of one length, need it not.

        L is the next multiple of `length_multiple`, or the longest example's length: batches of few lengths can each
        have a CUDA graph (lte_compile.training.step_graphs).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not examples:
            raise ValueError("no examples to make batches of")
        self._examples = tuple(examples)
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._by_length = by_length
        self._length_multiple = length_multiple
        self._longest = max(map(_length, examples))
        self._go_to(epoch=0, index=0)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self._examples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch."""
        epoch = self._epoch
        while self._epoch == epoch:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch; after an epoch's last one the next epoch begins."""
        rows = self._order[self._index]
        if self._index + 1 < len(self):
            self._index += 1
        else:
            self._go_to(epoch=self._epoch + 1, index=0)
        batch = [self._examples[row] for row in rows]
        length = -(-max(map(_length, batch)) // self._length_multiple) * self._length_multiple
        return collate(batch, self._pad_token_id, min(length, self._longest))

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch, and what makes it meaningful."""
        return {"epoch": self._epoch, "index": self._index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ValueError when it was saved from other data, batch size or seed."""
        identity = self._identity()
        if differing := [key for key, value in identity.items() if state.get(key) != value]:
            was = ", ".join(f"{key} {state.get(key)!r} (now {identity[key]!r})" for key in differing)
            raise ValueError(f"this position belongs to other batches: {was}")
        if not 0 <= state["index"] < len(self) or state["epoch"] < 0:
            raise ValueError(f"no batch at epoch {state['epoch']}, index {state['index']}; an epoch has {len(self)}")
        self._go_to(epoch=state["epoch"], index=state["index"])

    def _identity(self) -> dict[str, int]:
        return {"seed": self._seed, "batch_size": self._batch_size, "examples": len(self._examples)}

    def _go_to(self, *, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._order = self._epoch_order(epoch)

    def _epoch_order(self, epoch: int) -> list[list[int]]:
        """Row numbers of each batch of an epoch."""
        source = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(self._examples)))
        source.shuffle(rows)
        if self._by_length:
            rows = [row for chunk in _cut(rows, CHUNK_BATCHES * self._batch_size) for row in self._sorted(chunk)]
        batches = _cut(rows, self._batch_size)
        source.shuffle(batches)
        return batches

    def _sorted(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: _length(self._examples[row]))


def classification_batches(
    rows: Sequence[tuple[str, int]],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int = 64,
    seed: int = 0,
    length_multiple: int = 1,
) -> TextBatches:
    """Training batches of a `LabelledTask` split. Texts are cut to `max_length` tokens."""
    return TextBatches(
        encode_rows(rows, tokenizer, max_length),
        batch_size=batch_size,
        pad_token_id=_pad_token_id(tokenizer),
        seed=seed,
        by_length=True,
        length_multiple=length_multiple,
    )


def language_model_batches(
    documents: Sequence[str], tokenizer: Any, *, batch_size: int = 8, window: int = 256, seed: int = 0
) -> TextBatches:
    """Training batches of a `Corpus` split: windows of exactly `window` tokens."""
    examples = encode_windows(documents, tokenizer, window)
    return TextBatches(
        examples, batch_size=batch_size, pad_token_id=_pad_token_id(tokenizer), seed=seed, by_length=False
    )


def pair_batches(
    rows: Sequence[tuple[str, str]], tokenizer: Any, *, batch_size: int = 8, window: int = 256, seed: int = 0
) -> TextBatches:
    """Training batches of a `Pairs` split; only completions are learned.

    Pairs of at most `window` tokens follow each other in examples of twice as many (`pack`): nothing is padding.
    """
    examples = pack(encode_pairs(rows, tokenizer, window), 2 * window)
    return TextBatches(
        examples, batch_size=batch_size, pad_token_id=_pad_token_id(tokenizer), seed=seed, by_length=False
    )


def evaluation_batches(examples: Sequence[Example], tokenizer: Any, *, batch_size: int = 64) -> Iterator[Batch]:
    """Every example once, in order."""
    for chunk in _cut(list(examples), batch_size):
        yield collate(chunk, _pad_token_id(tokenizer))


def encode_rows(rows: Sequence[tuple[str, int]], tokenizer: Any, max_length: int = 64) -> tuple[Example, ...]:
    """Labelled texts as token ids with the tokenizer's special tokens; a text of no tokens becomes one of padding."""
    texts = [text for text, _ in rows]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    nothing = (_pad_token_id(tokenizer),)  # models cannot take a batch of no positions
    return tuple(Example(tuple(ids) or nothing, label) for ids, (_, label) in zip(encoded, rows, strict=True))


def encode_pairs(rows: Sequence[tuple[str, str]], tokenizer: Any, window: int = 256) -> tuple[Example, ...]:
    """Prompt, completion and end-of-text token, together at most `window` tokens.

    A completion gets up to half of them, and a prompt that is too long loses its beginning.
    """
    if window < 4:
        raise ValueError(f"a window needs at least 4 tokens for prompt and completion; got {window}")
    encoded = []
    for prompt, completion in rows:
        after = [*_ids(completion, tokenizer), tokenizer.eos_token_id][: window // 2]
        before = _ids(prompt, tokenizer)[-(window - len(after)) :] or [tokenizer.eos_token_id]
        encoded.append(Example((*before, *after), unscored=len(before)))
    return tuple(encoded)


def pack(pairs: Sequence[Example], window: int) -> tuple[Example, ...]:
    """Windows of `window` tokens, or a single shorter one if all pairs fit into it.

    A window holds as many whole pairs as fit, and ends with the beginning of the pair that the next one starts with,
    which it reads but does not learn. The last window goes on with the first pairs.

    Raises:
        ValueError: a pair is longer than a window.
    """
    lengths = [len(pair.tokens) for pair in pairs]
    if max(lengths) > window:
        raise ValueError(f"a pair of {max(lengths)} tokens does not fit into a window of {window}")
    if sum(lengths) <= window:
        return (_joined(pairs, window),)
    windows, first = [], 0
    while first < len(pairs):
        last = first
        filled = 0
        while filled + lengths[last % len(pairs)] <= window:
            filled += lengths[last % len(pairs)]
            last += 1
        windows.append(_joined([pairs[index % len(pairs)] for index in range(first, last + 1)], window))
        first = last
    return tuple(windows)


def _joined(pairs: Sequence[Example], window: int) -> Example:
    """One example of all pairs, cut to the window; of a pair that is cut nothing is learned."""
    tokens: list[int] = []
    prompts = []
    for pair in pairs:
        start = len(tokens)
        tokens += pair.tokens
        prompts.append((start, len(tokens) if len(tokens) > window else start + pair.unscored))
    return Example(tuple(tokens[:window]), prompts=tuple(prompts))


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_windows(documents: Sequence[str], tokenizer: Any, window: int = 256) -> tuple[Example, ...]:
    """Documents joined by the end-of-text token and cut into windows; the last, shorter one is dropped."""
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens to predict one from another; got {window}")
    stream: list[int] = []
    # All at once: fast tokenizers then use every core.
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"] if documents else []:
        stream.extend(ids)
        stream.append(tokenizer.eos_token_id)
    windows = _cut(stream, window)[: len(stream) // window]
    if not windows:
        raise ValueError(f"{len(stream)} tokens of text do not fill one window of {window}")
    return tuple(Example(tuple(ids)) for ids in windows)


def collate(examples: Sequence[Example], pad_token_id: int, length: int | None = None) -> Batch:
    """Right-padded tensors of some examples, all labelled or none; as long as the longest, or longer."""
    length = length or max(map(_length, examples))
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
        attention_mask[row, : len(example.tokens)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": _labels(examples, input_ids)}


def _labels(examples: Sequence[Example], input_ids: Tensor) -> Tensor:
    labels = [example.label for example in examples if example.label is not None]
    if labels and len(labels) != len(examples):
        raise ValueError("a batch must be labelled as a whole or not at all")
    if labels:
        return torch.tensor(labels)
    next_tokens = input_ids.clone()
    for row, example in enumerate(examples):
        for start, stop in ((0, example.unscored), *example.prompts, (len(example.tokens), None)):
            next_tokens[row, start:stop] = -100
    return next_tokens


def _length(example: Example) -> int:
    return len(example.tokens)


def _pad_token_id(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
    return int(pad)


def _cut(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]
