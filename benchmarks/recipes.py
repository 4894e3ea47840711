"""LTE training recipes on MiniLM and a labelled task, several seeds each, beside the oracle and the FFN-free control.

    python -m benchmarks.recipes --recipes longest soft --seeds 0 1 2 --workers 4 --output recipes.json

One process per run; on a GPU about a minute each with a dozen side by side. A row holds test accuracies (dense, LTE at
its trained threshold, LTE at every budget of the density knob, oracle, control) and the measured densities.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lte_compile.baselines import oracle_selection, remove_ffns
from lte_compile.calibration.density import set_density
from lte_compile.calibration.watching import collect_activations
from lte_compile.checkpoints.loading import load_classifier
from lte_compile.config import Grouping, Stage, TransformConfig
from lte_compile.data.batches import TextBatches, classification_batches, encode_rows, evaluation_batches
from lte_compile.data.models import resolve_model
from lte_compile.data.tasks import load_task
from lte_compile.evaluation.quality import evaluate, sites_of
from lte_compile.inspection.sites import inspect
from lte_compile.reports.results import write_atomically
from lte_compile.routing.router import set_stage
from lte_compile.training.config import Phase, TrainConfig
from lte_compile.training.loop import FIT_BATCHES, peek_batches, train
from lte_compile.training.losses import Batch
from lte_compile.transform import transform

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Recipe:
    """What differs from `TrainConfig`'s defaults; the dense fine-tuning is the same for all of one length."""

    density: float = 0.1
    expert_size: int = 32
    finetune_steps: int = 270
    stage1_steps: int = 270
    stage2_steps: int = 135
    grouping: Grouping = Grouping.BALANCED_KMEANS
    train: dict[str, Any] = field(default_factory=dict)


COACTIVATION = Recipe(
    density=0.145,
    expert_size=16,
    grouping=Grouping.COACTIVATION,
    stage1_steps=405,
    stage2_steps=270,
    train={"learning_rate": 2e-4},
)
CHANGES: dict[str, dict[str, Any]] = {
    "co-activation": {},
    "co-activation, distillation .5": {"train": {"learning_rate": 2e-4, "distillation": 0.5}},
    "co-activation, 540 + 270": {"stage1_steps": 540},
    "co-activation, experts of 8": {"expert_size": 8},
    "co-activation, rate 1e-4, distillation .5": {"train": {"distillation": 0.5}},
    "co-activation, rate 3e-4": {"train": {"learning_rate": 3e-4}},
    "demo": {"expert_size": 8, "density": 0.137},
    "demo, 270 + 180": {"expert_size": 8, "density": 0.137, "stage1_steps": 270, "stage2_steps": 180},
    "demo, distillation .5": {
        "expert_size": 8,
        "density": 0.137,
        "train": {"learning_rate": 2e-4, "distillation": 0.5},
    },
    "demo, experts of 4": {"expert_size": 4, "density": 0.137},
    "demo, rate 1.5e-4": {"expert_size": 8, "density": 0.137, "train": {"learning_rate": 1.5e-4}},
    "demo, density .1": {"expert_size": 8, "density": 0.1},
}
RECIPES = {
    "plain": Recipe(),
    "distillation": Recipe(density=0.13, train={"distillation": 0.5}),
    "soft": Recipe(train={"gates": "soft", "separability": 0.5}),
    "router rate 1e-3": Recipe(train={"router_learning_rate": 1e-3}),
    "experts of 16": Recipe(expert_size=16),
    "longer": Recipe(density=0.13, stage1_steps=405, train={"learning_rate": 2e-4}),
    "longest": Recipe(density=0.14, expert_size=16, stage1_steps=405, stage2_steps=270, train={"learning_rate": 2e-4}),
    **{name: replace(COACTIVATION, **changes) for name, changes in CHANGES.items()},
}


@dataclass(frozen=True)
class Data:
    batches: TextBatches
    valid: list[Batch]
    test: list[Batch]


def run_recipe(name: str, seed: int, task_name: str, control: bool = True) -> dict[str, Any]:
    """One training run, with the control trained for as many steps."""
    torch.set_num_threads(1)
    recipe, device = RECIPES[name], "cuda" if torch.cuda.is_available() else "cpu"
    task = load_task(task_name)
    torch.manual_seed(seed)
    model, tokenizer = load_classifier(resolve_model(MODEL), task.labels)
    model.to(device)
    data = Data(
        classification_batches(task.train, tokenizer, seed=seed),
        list(evaluation_batches(encode_rows(task.valid, tokenizer), tokenizer)),
        list(evaluation_batches(encode_rows(task.test, tokenizer), tokenizer)),
    )
    config = TrainConfig(
        target_density=recipe.density,
        stage1_steps=recipe.stage1_steps,
        stage2_steps=recipe.stage2_steps,
        seed=seed,
        **recipe.train,
    )
    fine_tune = TrainConfig(target_density=recipe.density, stage1_steps=0, stage2_steps=0, seed=seed)
    train(model, data.batches, fine_tune, phases=[Phase(name="fine-tune", steps=recipe.finetune_steps)])
    dense = copy.deepcopy(model)
    _transform(model, data, recipe, seed)
    teacher = copy.deepcopy(dense) if config.distillation else None
    train(model, data.batches, config, held_out=data.valid[:4], teacher=teacher)
    set_stage(model, Stage.HARD)
    row = {"recipe": name, "seed": seed, **_measured(model, dense, data)}
    return row | _control(model, dense, data, config) if control else row


def _transform(model: nn.Module, data: Data, recipe: Recipe, seed: int) -> None:
    device = next(model.parameters()).device
    example = {k: v.to(device) for k, v in data.valid[0].items() if k != "labels"}
    config = TransformConfig(expert_size=recipe.expert_size, grouping=recipe.grouping, seed=seed)
    activations = None
    if recipe.grouping is Grouping.COACTIVATION:
        seen = peek_batches(model, data.batches, FIT_BATCHES)
        activations = collect_activations(model, inspect(model, example).sites, seen)
    transform(model, config, example, activations=activations)


def _measured(model: nn.Module, dense: nn.Module, data: Data) -> dict[str, Any]:
    trained = evaluate(model, data.test)
    row: dict[str, Any] = {
        "dense": evaluate(dense, data.test).accuracy,
        "lte": trained.accuracy,
        "dense_valid": evaluate(dense, data.valid).accuracy,
        "lte_valid": evaluate(model, data.valid).accuracy,
        "density": trained.density,
        "budgets": [],
        "oracle": [],
    }
    for budget in BUDGETS:
        set_density(model, budget)
        moved = evaluate(model, data.test)
        row["budgets"].append([budget, moved.density, moved.accuracy])
        with oracle_selection(dense, sites_of(model), budget):
            row["oracle"].append([budget, evaluate(dense, data.test).accuracy])
    return row


def _control(model: nn.Module, dense: nn.Module, data: Data, config: TrainConfig) -> dict[str, float]:
    control = remove_ffns(copy.deepcopy(dense), sites_of(model))
    phase = Phase(name="FFN-free control", steps=config.stage1_steps + config.stage2_steps)
    train(control, data.batches, config, phases=[phase])
    return {"control": evaluate(control, data.test).accuracy}


def run_all(
    names: Sequence[str], seeds: Sequence[int], task: str, workers: int, control: bool
) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_recipe, name, seed, task, control) for name, seed in product(names, seeds)]
        for future in as_completed(futures):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", default="trec")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    console, rows = Console(), []
    for row in run_all(options.recipes, options.seeds, options.task, options.workers, options.control):
        rows.append(row)
        console.print_json(json.dumps(row))
        if options.output:
            write_atomically(options.output, (json.dumps(rows, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
