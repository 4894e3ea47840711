"""How well a model continues prompts: greedy generation, scored by ROUGE-L against the completions.

B prompts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lte_compile.data.batches import Example
from lte_compile.evaluation.rouge import rouge_l
from lte_compile.running.modes import eval_mode


@torch.no_grad()
def mean_rouge_l(model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, batch_size: int) -> float:
    """Mean ROUGE-L of greedy continuations of each example's prompt (its `unscored` tokens), in [0, 1].

    Continuations end at the end-of-text token, at the latest at the length of the longest completion.

    Raises:
        ValueError: no examples, or a model that cannot generate.
    """
    if not examples:
        raise ValueError("nothing to generate: no examples were given")
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} has no generate(); ROUGE-L needs a language model of transformers")
    longest = max(len(example.tokens) - example.unscored for example in examples)
    by_length = sorted(examples, key=lambda example: example.unscored)  # little padding
    scores: list[float] = []
    with eval_mode(model):
        for start in range(0, len(by_length), batch_size):
            chunk = by_length[start : start + batch_size]
            references = [tokenizer.decode(e.tokens[e.unscored :], skip_special_tokens=True) for e in chunk]
            continued = _continued(model, tokenizer, chunk, longest)
            scores += [rouge_l(text, reference) for text, reference in zip(continued, references, strict=True)]
    return fmean(scores)


def _continued(model: nn.Module, tokenizer: Any, examples: Sequence[Example], longest: int) -> list[str]:
    """Greedy continuations; prompts are padded on the left, where they do not come between prompt and answer."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    length = max(example.unscored for example in examples)
    input_ids_BL = torch.full((len(examples), length), pad)
    mask_BL = torch.zeros_like(input_ids_BL)
    for row, example in enumerate(examples):
        input_ids_BL[row, length - example.unscored :] = torch.tensor(example.tokens[: example.unscored])
        mask_BL[row, length - example.unscored :] = 1
    device = next(model.parameters()).device
    generate: Any = model.generate
    output = generate(
        input_ids=input_ids_BL.to(device),
        attention_mask=mask_BL.to(device),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,  # whatever the model's own generation_config has
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,  # what completions are trained to end with
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in output[:, length:]]
