"""What each choice in LTE's training recipe does: a run per lever, from one fine-tuned start, on the same tokens.

    python -m benchmarks.experiments MODEL --task prose --out runs/levers --steps 400 --levers base lr-1e-3

Processes started with the same OUT share the levers out, also several on one GPU. A run that is killed goes on with the
levers that have no file in OUT/levers yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from lte_compile.baselines.claims import claim
from lte_compile.baselines.workbench import CountedBatches, Workbench
from lte_compile.calibration.density import place_thresholds, set_density
from lte_compile.cli.comparing import CompareSettings, Opened, open_workbench, prepare
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.preparing import pick_device
from lte_compile.config import FitTarget, Grouping, RouterKind, Stage, TransformConfig
from lte_compile.evaluation.quality import evaluate
from lte_compile.reports.results import write_atomically
from lte_compile.routing.router import set_stage
from lte_compile.training.config import BudgetDraw, Gates, Phase, TrainConfig
from lte_compile.training.loop import train
from lte_compile.training.progress import TrainingProgress


@dataclass(frozen=True, kw_only=True)
class Lever:
    """What differs from the base recipe.

    Args:
        train, transform: fields of `TrainConfig` and `TransformConfig`.
        length: of the training, times the base's steps.
        stage2: share of the steps with frozen routers.
        budgets: whether the model is also measured at the densities of `--curve`.
        stairs: densities to train at first, each for a fifth of the steps.
        soft_first: the paper's soft gates for this share of the steps before straight-through ones.
        is_dense: the dense model, as far as it applies.
    """

    train: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] = field(default_factory=dict)
    length: float = 1.0
    stage2: float = 0.0
    budgets: bool = False
    stairs: tuple[float, ...] = ()
    soft_first: float = 0.0
    is_dense: bool = False


def _soft(separability: float, stage2: float = 1 / 3) -> Lever:
    return Lever(train={"gates": Gates.SOFT, "separability": separability}, stage2=stage2)


def _budgets(low: float, high: float, draw: BudgetDraw = BudgetDraw.UNIFORM, **train: Any) -> Lever:
    return Lever(train={"budget_range": (low, high), "budget_draw": draw, **train}, budgets=True)


STAIR = 0.2  # of the steps
RATES = ("1e-4", "3e-4", "6e-4", "1e-3")
LEVERS: dict[str, Lever] = {
    "base": Lever(),
    **{f"lr-{rate}": Lever(train={"learning_rate": float(rate)}) for rate in (*RATES, "2e-3")},
    **{f"distillation-{weight:g}": Lever(train={"distillation": weight}) for weight in (0.0, 0.5, 0.9, 1.0)},
    **{f"layers-{weight:g}": Lever(train={"layer_distillation": weight}) for weight in (0.3, 1.0, 3.0, 10.0)},
    **{f"experts-of-{size}": Lever(transform={"expert_size": size}) for size in (4, 8, 16, 32)},
    **{f"grouping-{grouping.value}": Lever(transform={"grouping": grouping}) for grouping in Grouping},
    **{f"router-lr-{r}": Lever(train={"router_learning_rate": float(r)}) for r in ("1e-4", "3e-4", "1e-3", "3e-3")},
    **{f"soft-lambda-{weight:g}": _soft(weight) for weight in (0.0, 0.5, 1.0)},
    **{f"eta-{eta:g}": Lever(train={"eta": eta}) for eta in (0.0, 0.05, 0.2, 0.5, 1.0)},
    **{f"density-{density:g}": Lever(train={"target_density": density}) for density in (0.7, 0.6, 0.5, 0.4, 0.2, 0.1)},
    **{f"budgets-{draw.value}": _budgets(0.2, 0.6, draw) for draw in BudgetDraw},
    "budgets-wide": _budgets(0.15, 0.7),
    "budgets-wide-log-uniform": _budgets(0.15, 0.7, BudgetDraw.LOG_UNIFORM),
    "budgets-distillation-1": _budgets(0.2, 0.6, distillation=1.0),
    "budgets-eta-alone": _budgets(0.2, 0.6, hold_density=False),
    "budgets-shrinking": _budgets(0.2, 0.6, start_density=0.6),
    "one-budget": Lever(budgets=True),
    "router-two-layer": Lever(transform={"router": RouterKind.TWO_LAYER}),
    **{f"router-rank-{r}": Lever(transform={"router": RouterKind.TWO_LAYER, "router_rank": r}) for r in (72, 288)},
    "experts-of-4-two-layer": Lever(transform={"router": RouterKind.TWO_LAYER, "expert_size": 4}),
    "all": Lever(
        train={"learning_rate": 1e-3, "layer_distillation": 1.0},
        transform={"router": RouterKind.TWO_LAYER, "expert_size": 4},
    ),
    "hold-density": Lever(train={"hold_density": True}),
    "eta-alone": Lever(train={"hold_density": False}, budgets=True),
    "annealed": Lever(train={"start_density": 0.6}, budgets=True),
    "annealed-eta-alone": Lever(train={"start_density": 0.6, "hold_density": False}, budgets=True),
    "two-stages": Lever(stage2=1 / 3),
    "stairs": Lever(stairs=(0.7, 0.5)),
    "soft-first": Lever(soft_first=0.4),
    "no-fitted-routers": Lever(train={"fit_router": False}),
    "fit-effect": Lever(train={"fit_target": FitTarget.EFFECT}),
    "weight-decay-0.1": Lever(train={"weight_decay": 0.1}),
    "half-the-tokens": Lever(length=0.5),
    "twice-the-tokens": Lever(length=2.0),
    **{f"dense-lr-{r}": Lever(train={"learning_rate": float(r)}, is_dense=True) for r in RATES},
}


def run_lever(name: str, lever: Lever, bench: Workbench, opened: Opened, curve: Sequence[float] = ()) -> dict[str, Any]:
    """Train as the lever says and measure on the test split."""
    start, steps = perf_counter(), round(bench.steps * lever.length)
    stage2 = round(steps * lever.stage2)
    config = replace(bench.config, stage1_steps=steps - stage2, stage2_steps=stage2, **lever.train)
    batches, transform = CountedBatches(bench.new_batches()), replace(bench.transform, **lever.transform)
    row = {"lever": name, "seed": config.seed, "train": config.to_dict(), "transform": transform.to_dict()}
    if lever.is_dense:
        model, alone = bench.start_copy(), replace(config, distillation=0.0, layer_distillation=0.0)
        train(model, batches, alone, phases=[Phase(name=name, steps=steps)], on_step=opened.progress)
    else:
        model = bench.transformed(transform)
        _train_in_legs(model, _legs(config, lever), batches, bench)
    row |= {"tokens": batches.tokens, "training_seconds": round(perf_counter() - start, 1)}
    bench.keep(model, name)
    row |= _judged(model.eval(), opened)
    if lever.budgets:
        row["curve"] = [_at(model, density, bench, opened) for density in curve]
    elif not lever.is_dense and config.is_steered:
        set_density(model, config.target_density, floor=config.target_density, ceiling=config.target_density)
        row["equal_layers"] = _judged(model, opened)
    return row | {"seconds": round(perf_counter() - start, 1)}


def _legs(config: TrainConfig, lever: Lever) -> list[TrainConfig]:
    """The training cut into pieces that follow each other; the last one is the recipe's own."""
    steps = config.stage1_steps
    legs = [replace(config, target_density=stair, stage1_steps=round(STAIR * steps)) for stair in lever.stairs]
    if lever.soft_first:
        legs.append(replace(config, gates=Gates.SOFT, stage1_steps=round(lever.soft_first * steps)))
    legs = [replace(leg, stage2_steps=0) for leg in legs]
    return [*legs, replace(config, stage1_steps=steps - sum(leg.stage1_steps for leg in legs))]


def _train_in_legs(model: nn.Module, legs: Sequence[TrainConfig], batches: CountedBatches, bench: Workbench) -> None:
    for number, leg in enumerate(legs):
        if number:
            place_thresholds(model, bench.steering, leg.target_density)
        fitted = replace(leg, fit_router=leg.fit_router and number == 0)
        teacher = bench.start if leg.needs_teacher else None
        train(model, batches, fitted, held_out=bench.steering, teacher=teacher, on_step=bench.on_step)
    set_stage(model, Stage.HARD)
    if legs[-1].is_steered:
        place_thresholds(model, bench.calibration, legs[-1].target_density)


def _at(model: nn.Module, density: float, bench: Workbench, opened: Opened) -> dict[str, Any]:
    """The model with its thresholds moved, on test and on validation windows."""
    place_thresholds(model, bench.calibration, density)
    validation = evaluate(model, bench.calibration)
    return {"target": density, **_judged(model, opened), "valid_quality": opened.data.quality(validation)}


def _judged(model: nn.Module, opened: Opened) -> dict[str, Any]:
    data = opened.data
    measured = data.evaluate(model, data.test_examples())
    chosen = measured.selection
    row = {"quality": data.quality(measured), "loss": measured.loss, "density": measured.density}
    if chosen is None:
        return row
    layers = [round(site.neuron_density, 4) for site in chosen.sites.values()]
    return row | {"weight_share": chosen.weight_share, "dead_experts": chosen.dead_experts, "layers": layers}


def share_out(names: Sequence[str], opened: Opened, seed: int, until: float, curve: Sequence[float]) -> None:
    """Run what has no file yet and nobody else is at, while there is time."""
    directory = opened.settings.out / "levers"
    bench: Workbench | None = None
    started = time.time()
    for name in names:
        target = directory / f"{name}-seed{seed}.json"
        with claim(directory / f".{name}-seed{seed}.lock", wait=False) as is_mine:
            failed = target.with_suffix(".failed")
            failed_now = failed.exists() and failed.stat().st_mtime > started
            if not is_mine or target.exists() or failed_now or time.time() > until:
                continue
            bench = bench or open_workbench(opened, seed)
            try:
                row = run_lever(name, LEVERS[name], bench, opened, curve)
            except (ArithmeticError, AssertionError, RuntimeError, ValueError):  # costs the other levers nothing
                failed.write_text(traceback.format_exc())
                opened.progress.say(f"{name}: {failed.read_text()}")
                continue
            write_atomically(target, (json.dumps(row, indent=1) + "\n").encode())
            opened.progress.say(f"{name}: {row['quality']:.4g} at {row['density']:.3f}, {row['seconds']} s")


def table(out: Path) -> str:
    """All results of a directory as markdown, best first."""
    rows = sorted(
        (json.loads(path.read_text()) for path in (out / "levers").glob("*.json")), key=lambda r: r["quality"]
    )
    lines = ["| lever | seed | tokens | quality | density | weight bytes | with equal layers |", "|---" * 7 + "|"]
    for row in rows:
        equal = f"{row['equal_layers']['quality']:.2f}" if "equal_layers" in row else ""
        share = f"{row['weight_share']:.1%}" if "weight_share" in row else ""
        cells = (
            row["lever"],
            row["seed"],
            f"{row['tokens'] / 1e6:.2f} M",
            f"{row['quality']:.2f}",
            f"{row['density']:.3f}",
        )
        lines.append("| " + " | ".join(map(str, (*cells, share, equal))) + " |")
    return "\n".join(lines) + "\n"


def _settings(options: argparse.Namespace) -> CompareSettings:
    task = TaskOptions(
        name=options.task, batch_size=options.batch_size, window=options.window, test_examples=options.test_examples
    )
    return CompareSettings(
        model=options.model,
        out=options.out,
        task=task,
        methods=("lte",),
        densities=(options.density,),
        seeds=1,
        transform=TransformConfig(expert_size=options.expert_size, grouping=options.grouping, router=options.router),
        train=TrainConfig(
            target_density=options.density,
            stage1_steps=options.steps,
            stage2_steps=0,
            learning_rate=options.learning_rate,
            router_learning_rate=options.router_learning_rate,
            distillation=options.distillation,
            hold_density=options.hold_density,
            autocast=options.autocast,
            compile=options.compile,
            measure_every=options.measure_every,
            checkpoint_every=1_000_000,  # at the end of the fine-tuning, for the other processes
        ),
        finetune_steps=options.finetune_steps,
        dense_learning_rate=options.dense_learning_rate,
        keep_models=options.keep_models,
        device=options.device,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", default="prose")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--dense-learning-rate", type=float, default=3e-4)
    parser.add_argument("--router-learning-rate", type=float, default=6e-4)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--expert-size", type=int, default=8)
    parser.add_argument("--grouping", type=Grouping, default=Grouping.COACTIVATION)
    parser.add_argument("--router", type=RouterKind, default=RouterKind.LINEAR)
    parser.add_argument("--hold-density", action="store_true")
    parser.add_argument("--keep-models", action="store_true")
    parser.add_argument("--curve", type=float, nargs="*", default=(), help="densities for levers with many budgets")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--test-examples", type=int, default=256)
    parser.add_argument("--measure-every", type=int, default=20)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no lever after so many")
    options = parser.parse_args()
    settings, until = _settings(options), time.time() + options.seconds
    with TrainingProgress() as progress:
        opened = prepare(settings, pick_device(options.device), progress)
        share_out(options.levers, opened, options.seed, until, options.curve)
    text = table(options.out)
    write_atomically(options.out / "levers.md", text.encode())
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
