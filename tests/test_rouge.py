"""ROUGE-L against published and hand-counted examples."""

from __future__ import annotations

import pytest

from lte_compile.evaluation.rouge import rouge_l


@pytest.mark.parametrize(
    ("candidate", "score"),
    [
        ("police kill the gunman", 0.75),  # Lin 2004, section 3.1: 3 of 4 words in order
        ("the gunman kill police", 0.5),  # the same words, 2 in order
        ("the gunman police killed", 0.5),
    ],
)
def test_the_examples_of_the_paper(candidate: str, score: float) -> None:
    assert rouge_l(candidate, "police killed the gunman") == score


def test_precision_and_recall_are_weighed_alike() -> None:
    # 3 common of 3 predicted and 6 expected: precision 1, recall 1/2
    assert rouge_l("a b c", "a x b y c z") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge_l("a x b y c z", "a b c") == rouge_l("a b c", "a x b y c z")


def test_case_and_punctuation_do_not_count() -> None:
    assert rouge_l("The U.S. -- it's_here!", "the u s it s here") == 1.0


@pytest.mark.parametrize(("prediction", "reference"), [("", "a"), ("a", ""), ("...", "a"), ("b", "a")])
def test_nothing_in_common(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == 0.0
