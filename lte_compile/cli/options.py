"""Arguments and options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lte_compile.config import Grouping

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or an id on the hub (owner/name).")]
OutDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write the model to.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUT already holds.")]
Seed = Annotated[int, typer.Option(help="Seed of grouping, training and data order.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]

ExpertSize = Annotated[int, typer.Option(help="Neurons per expert. The paper's is 32.")]
GroupingOption = Annotated[Grouping, typer.Option("--grouping", help="How neurons become experts.")]

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="NAME|FILE",
        help="trec or movie (classification), sotu or shakespeare (text), or a .csv, .jsonl or .txt file.",
    ),
]
# An enum of tasks_api would do, but that module imports torch.
TaskKindName = Annotated[
    str, typer.Option("--task-kind", metavar="KIND", help="classification or language-model; by default by the task.")
]
BatchSize = Annotated[int | None, typer.Option(help="Texts or windows per batch.", show_default="32 texts, 8 windows")]
MaxLength = Annotated[int, typer.Option(help="Tokens that a labelled text is cut to.")]
Window = Annotated[int, typer.Option(help="Tokens per window of a language model.")]
TestExamples = Annotated[
    int | None,
    typer.Option(help="At most so many test texts or windows; 0 for all.", show_default="all texts, 64 windows"),
]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The task options of a command line; None leaves a size to the kind of task."""

    name: str
    kind: str = ""
    batch_size: int | None = None
    max_length: int = 64
    window: int = 256
    test_examples: int | None = None
