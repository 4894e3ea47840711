"""ROUGE-L: how much of a reference text is found, in order, in a generated one (Lin 2004).

Own code, because the `rouge-score` package brings nltk and absl-py along for thirty lines. Tokens are as there without
its stemmer: lower case, runs of letters and digits (of any script; the package's are ASCII only).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; 0 where either text has no words."""
    predicted, expected = words(prediction), words(reference)
    common = longest_common_subsequence(predicted, expected)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by dynamic programming over one row."""
    row = [0] * (len(second) + 1)
    for left in first:
        above = 0  # the row before, one column to the left
        for column, right in enumerate(second, start=1):
            above, row[column] = row[column], above + 1 if left == right else max(row[column], row[column - 1])
    return row[-1]
