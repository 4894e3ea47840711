"""What a training run reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from lte_compile.cli.output import Outcome, facts_table
from lte_compile.evaluation.quality import Evaluation, router_parameters
from lte_compile.evaluation.tasks import EncodedTask
from lte_compile.reports.table import percent, quality_text
from lte_compile.routing.router import require_routers
from lte_compile.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves to be reported: `dense` was measured before LTE, `sparse` after it in the hard stage."""

    model: nn.Module
    task: EncodedTask
    test_examples: int
    dense: Evaluation
    sparse: Evaluation
    finetune_steps: int
    seconds: float


def training_outcome(trained: Trained, source: str, out: Path, config: TrainConfig) -> Outcome:
    """Before, after, and where it is."""
    data, dense, sparse = trained.task, trained.dense, trained.sparse
    threshold = require_routers(trained.model)[0].threshold
    document = {
        "model": source,
        "out": str(out),
        "task": data.task.name,
        "kind": data.kind.value,
        "metric": data.metric.value,
        "test_examples": trained.test_examples,
        "dense": {"quality": data.quality(dense), "loss": dense.loss, "density": dense.density},
        "sparse": {
            "quality": data.quality(sparse),
            "loss": sparse.loss,
            "density": sparse.density,
            "densities": sparse.densities,
            "threshold": threshold,
        },
        "target_density": config.target_density,
        "finetune_steps": trained.finetune_steps,
        "stage1_steps": config.stage1_steps,
        "stage2_steps": config.stage2_steps,
        "router_parameters": router_parameters(trained.model),
        "seconds": round(trained.seconds, 1),
    }
    facts = {
        "target density": percent(config.target_density),
        "threshold": f"{threshold:.3g}",
        "added by routers": f"{router_parameters(trained.model):,} parameters",
        "took": f"{trained.seconds:.0f} s",
        "written to": out,
    }
    return Outcome(document, [_comparison(trained), facts_table("run", facts)])


def _comparison(trained: Trained) -> Table:
    data = trained.task
    title = f"{data.task.name}: {data.metric} on {trained.test_examples} test examples"
    table = Table("", "Density", f"Test {data.metric}", "Loss", title=title, title_justify="left")
    for label, evaluation in (("dense", trained.dense), ("LTE", trained.sparse)):
        quality = quality_text(data.metric, data.quality(evaluation))
        table.add_row(label, percent(evaluation.density), quality, f"{evaluation.loss:.4f}")
    return table
