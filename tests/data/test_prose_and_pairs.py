"""Brown's tags come off, and documentation becomes prompts with summaries."""

from __future__ import annotations

import pytest

from lte_compile.data.brown import untagged
from lte_compile.data.docstrings import read_pairs
from lte_compile.data.tasks import load_pairs

TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( in/in $100/nns )/) ./.
Who/wps knows/vbz ?/. ?/.


\tIt/pps was/bedz and\\/or/cc 1/2/cd-tl ;/. ;/.
"""


def test_tags_come_off_and_punctuation_closes_up() -> None:
    first, second = untagged(TAGGED).split("\n\n")
    assert first == 'The jury said, "no evidence" (in $100). Who knows?'
    assert second == "It was and\\/or 1/2;"


EXPLAINED = "Explained at length, " * 6
SOURCE = f'''
class Pane:
    """A part of a window.

    {EXPLAINED}
    """

    def close(self):
        """Close what is
        still open.

        {EXPLAINED * 10}
        """

    def short(self):
        """Only a summary line."""

    def terse(self):
        """Two words.

        {EXPLAINED}
        """
'''


def test_summaries_with_an_explanation_become_pairs() -> None:
    pane, close = sorted(read_pairs(SOURCE))
    assert pane == (f"Name: Pane\n\n{EXPLAINED.strip()}\n\nSummary:", " A part of a window.")
    assert close[1] == " Close what is still open."
    assert len(close[0]) == len("Name: close\n\n") + 600 + len("\n\nSummary:")


def test_unknown_pairs_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"no pairs 'nothing'; give one of docstrings or the path"):
        load_pairs("nothing")
