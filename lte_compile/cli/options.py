"""Arguments and options that commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lte_compile.config import FitTarget, Grouping, RouterKind
from lte_compile.training.config import BudgetDraw, Gates

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or an id on the hub (owner/name).")]
OutDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write the model to.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUT already holds.")]
Seed = Annotated[int, typer.Option(help="Seed of grouping, training and data order.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Shard = Annotated[
    bool | None,
    typer.Option(
        "--shard/--no-shard",
        help="With several processes, FSDP2 instead of DistributedDataParallel.",
        show_default="as accelerate launch was told",
    ),
]

CustomOps = Annotated[
    Path | None,
    typer.Option(
        "--custom-ops",
        metavar="PATH|auto",
        help="Library of SparseFFN kernels for ONNX Runtime; auto is the one of lte_compile.",
    ),
]

ExpertSize = Annotated[int, typer.Option(help="Neurons per expert. The paper's is 32.")]
GroupingOption = Annotated[Grouping, typer.Option("--grouping", help="How neurons become experts.")]
RouterOption = Annotated[
    RouterKind, typer.Option("--router", help="linear is the paper's; two-layer adds features of the input.")
]
RouterRank = Annotated[
    int | None, typer.Option(help="Features of a two-layer router.", show_default="a quarter of the width")
]

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="NAME|FILE",
        help="trec, trec-fine, movie, newsgroups, reuters, wordnet or brown-genres (classification), sotu, "
        "shakespeare, brown or prose (text), docstrings (generation), or a .csv, .jsonl or .txt file.",
    ),
]
FinetuneSteps = Annotated[
    int | None, typer.Option(help="Steps of dense fine-tuning first.", show_default="270 for a new head, else 0")
]
Stage1Steps = Annotated[int, typer.Option(help="Steps in which model and routers train.")]
Stage2Steps = Annotated[int, typer.Option(help="Steps in which the routers are frozen; 0 trains in one stage.")]
LearningRate = Annotated[float, typer.Option(help="Of the model.")]
RouterLearningRate = Annotated[float, typer.Option(help="Of the routers.")]
GatesOption = Annotated[Gates, typer.Option("--gates", help="What multiplies expert outputs in stage 1.")]
Separability = Annotated[float, typer.Option(help="Lambda, the weight of the separability loss.")]
Eta = Annotated[
    float | None,
    typer.Option(help="A fixed weight of the efficiency loss.", show_default="steered by the density"),
]
HoldDensity = Annotated[
    bool, typer.Option("--hold-density", help="Shift routers' biases to the target at every measurement.")
]
StartDensity = Annotated[
    float | None,
    typer.Option(help="Density that stage 1 begins at; it falls from there.", show_default="the target"),
]
Anneal = Annotated[float, typer.Option(help="Share of stage 1 in which the density falls to the target.")]
Dropout = Annotated[
    float | None,
    typer.Option(help="Of all dropout layers, but for dense training.", show_default="what the model has"),
]
BudgetRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Train every row at a density of its own between these two, for one model of many budgets.",
        show_default="the target alone",
    ),
]
BudgetDrawOption = Annotated[BudgetDraw, typer.Option("--budget-draw", help="How rows' densities are drawn.")]
BudgetWeight = Annotated[
    float,
    typer.Option(help="A row's loss counts as its density to this power: more of the high densities, less of the low."),
]
FitRouter = Annotated[bool, typer.Option("--fit-router/--no-fit-router", help="Start from routers fitted to data.")]
FitTargetOption = Annotated[
    FitTarget, typer.Option("--fit-target", help="What routers are fitted to: experts' energies, or their effects.")
]
Distillation = Annotated[float, typer.Option(help="Weight of the dense model's outputs as targets, 0 to 1.")]
Temperature = Annotated[float, typer.Option(help="Softens both models' outputs for distillation.")]
LayerDistillation = Annotated[float, typer.Option(help="Weight of each layer's distance from the dense model's.")]
Accumulation = Annotated[int, typer.Option(help="Micro-batches a batch is cut into.")]
Autocast = Annotated[bool, typer.Option("--autocast", help="bfloat16 autocast.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile of layers and losses; pays off in long runs.")]
StepGraphs = Annotated[
    bool, typer.Option("--step-graphs", help="Steps as CUDA graphs, nothing compiled; for small models and texts.")
]
MeasureEvery = Annotated[int, typer.Option(help="Steps between measurements of the density on validation batches.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 writes none.")]

# An enum of tasks_api would do, but that module imports torch.
TaskKindName = Annotated[
    str, typer.Option("--task-kind", metavar="KIND", help="classification, language-model or generation.")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Texts or windows per batch.", show_default="32 labelled texts, 8 windows")
]
MaxLength = Annotated[int, typer.Option(help="Tokens that a labelled text is cut to.")]
Window = Annotated[
    int,
    typer.Option(help="Tokens per window of a language model; of a prompt with its completion, for generation."),
]
TestExamples = Annotated[
    int | None,
    typer.Option(
        help="At most so many test texts, windows or prompts; 0 for all.",
        show_default="all labelled texts, 64 windows, 256 prompts",
    ),
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


def picked(kind: type[Settings], arguments: Mapping[str, Any], /, **others: Any) -> Settings:
    """`kind` from those of a command's arguments that go by the names of its fields, and from `others`."""
    named = {field.name: arguments[field.name] for field in fields(kind) if field.name in arguments}
    return kind(**(named | others))


def listed(text: str) -> tuple[str, ...]:
    """The items of an option that takes several, separated by commas."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def listed_numbers(text: str, option: str) -> tuple[float, ...]:
    """The same for numbers."""
    try:
        return tuple(float(item) for item in listed(text))
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, such as 0.5,0.3; got {text!r}") from None
