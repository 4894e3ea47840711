"""What `lte_compile.train` is run on in one process and in several: awkward batches, both stages, in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.config import RouterKind, TransformConfig
from lte_compile.data.batches import Example, TextBatches
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import routers, set_stage
from lte_compile.training.config import Gates, TrainConfig
from lte_compile.training.loop import StepEvent, train
from lte_compile.transform import transform
from tests.test_training import SIZE, Clusters

Batch = dict[str, Tensor]


KILLED_AT = 7  # in stage 2, one step after a checkpoint


@dataclass(frozen=True)
class Case:
    """A training run, the same whatever it is run in."""

    model: Callable[[nn.Module], nn.Module]  # of a transformed llama
    examples: tuple[Example, ...]
    batch_size: int
    config: TrainConfig
    seed: int = 1

    def batches(self) -> TextBatches:
        return TextBatches(self.examples, batch_size=self.batch_size, pad_token_id=0, seed=self.seed, by_length=False)

    def held_out(self) -> list[Batch]:
        """An odd number: one process has none left when another measures the last."""
        source = self.batches()
        return [source.next_batch() for _ in range(3)]


def _texts(count: int, *, classes: int | None, vocabulary: int) -> tuple[Example, ...]:
    """Texts of 3 to 9 tokens; some of those without a class begin with a prompt that is nearly all of them."""
    generator = torch.Generator().manual_seed(count)
    texts = []
    for number in range(count):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        words = tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())
        label = None if classes is None else number % classes
        texts.append(Example(words, label, unscored=0 if classes else length * (number % 2)))
    return tuple(texts)


def _clusters(llama: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Clusters().double()
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    transform(model, TransformConfig(expert_size=SIZE, router=RouterKind.TWO_LAYER), inputs)
    return set_layout(model, "neuron_major")  # FSDP insists on contiguous weights, and gets them


def _llama(llama: nn.Module) -> nn.Module:
    model = set_stage(deepcopy(llama).double(), "dense")
    settable: Any = model
    settable.loss_function = _next_token_loss
    return model


def _next_token_loss(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """In float64, where transformers' own casts to float32: only then does the order of sums leave no trace."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _llama_with_dropout(llama: nn.Module) -> nn.Module:
    model = _llama(llama)
    layers: Any = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    for layer in layers:
        layer.attention_dropout = 0.2
    return model


_CONFIG = TrainConfig(
    target_density=0.4,
    stage1_steps=5,
    stage2_steps=4,
    learning_rate=3e-3,
    router_learning_rate=3e-3,
    max_grad_norm=0.3,  # clips most steps
    measure_every=2,
    checkpoint_every=2,
)
# Batches of 5, 5 and 1: uneven halves, and one with fewer texts than processes.
CASES: Mapping[str, Case] = {
    "classifier": Case(_clusters, _texts(11, classes=4, vocabulary=40), 5, _CONFIG),
    "language model": Case(
        _llama,
        _texts(11, classes=None, vocabulary=90),
        5,
        replace(_CONFIG, gates=Gates.SOFT, separability=0.3, distillation=0.5, accumulation=2),
    ),
    "many budgets": Case(
        _llama,
        _texts(11, classes=None, vocabulary=90),
        5,
        replace(_CONFIG, budget_range=(0.25, 0.6), budget_weight=1.5, hold_density=True),
    ),
    "with dropout": Case(_llama_with_dropout, _texts(8, classes=None, vocabulary=90), 4, _CONFIG),
}


def trained(
    case: Case,
    llama: nn.Module,
    directory: Path,
    *,
    shard: bool | None = None,
    copy_to: Path | None = None,
) -> dict[str, Any]:
    """Train; what came out. `copy_to` gets the directory as it is at step KILLED_AT, as if the run had ended there."""
    model, steps = case.model(llama), 0

    def on_step(event: StepEvent) -> None:
        nonlocal steps
        steps += 1
        if copy_to is not None and steps == KILLED_AT:
            shutil.copytree(directory, copy_to)

    events = train(
        model,
        case.batches(),
        case.config,
        held_out=case.held_out(),
        teacher=case.model(llama) if case.config.distillation else None,
        directory=directory,
        on_step=on_step,
        shard=shard,
    )
    return {
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "thresholds": [[router.threshold, *router.score_quantiles] for router in routers(model)],
        "curve": [[event.loss, event.eta, event.density or 0.0] for event in events],
        "steps": steps,
    }


def in_one_process(folder: Path, llama: nn.Module) -> dict[str, dict[str, Any]]:
    """Every case; the language model leaves what several processes go on from."""
    return {
        name: trained(case, llama, folder / name, copy_to=folder / f"{name} killed") for name, case in CASES.items()
    }


def in_processes(rank: int, folder: Path, llama: nn.Module) -> dict[str, Any]:
    """Cases in DistributedDataParallel and FSDP2, and runs that go on from checkpoints. `folder` has one process's."""

    def run(name: str, kind: str, directory: Path, **more: Path) -> dict[str, Any]:
        return trained(CASES[name], llama, directory, shard=kind == "fsdp2", **more)

    seen: dict[str, Any] = {f"{name} {kind}": run(name, kind, folder / f"{name} {kind}") for name, kind in PLAIN}
    for name, kind in RESUMED:
        whole, killed = f"{name} {kind}", folder / f"{name} {kind} killed"
        seen[whole] = run(name, kind, folder / whole, copy_to=killed)
        if rank == 0:
            shutil.copytree(killed, folder / f"{whole} killed for one")
        seen[f"{whole} resumed"] = run(name, kind, killed)
    seen["language model fsdp2 after one"] = run("language model", "fsdp2", folder / "language model killed")
    seen["own batches"] = _refusal(replace(CASES["classifier"], seed=rank), llama, folder / "own batches")
    seen["own directories"] = _refusal(CASES["language model"], llama, folder / ("language model", "nothing")[rank])
    return seen


def _refusal(case: Case, llama: nn.Module, directory: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        trained(case, llama, directory)
    return str(refusal.value)


PLAIN = [
    ("classifier", "ddp"),
    ("classifier", "fsdp2"),
    ("language model", "ddp"),
    ("many budgets", "ddp"),
    ("many budgets", "fsdp2"),
]
RESUMED = [("language model", "fsdp2"), ("with dropout", "ddp")]
