"""What every method is given: the same start, the same data and the same number of training steps."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lte_compile.baselines.claims import claim
from lte_compile.baselines.traces import joined
from lte_compile.calibration.watching import collect_activations, locate_sites
from lte_compile.config import Grouping, TransformConfig
from lte_compile.data.epochs import Batches
from lte_compile.inspection.sites import inspect, require_sites
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import routers
from lte_compile.running.labels import without_labels
from lte_compile.training.checkpointing import write_tensors
from lte_compile.training.config import Phase, Teacher, TrainConfig
from lte_compile.training.loop import OnStep, peek_batches, train
from lte_compile.training.losses import Batch
from lte_compile.transform import transform

# Training batches that co-activation grouping looks at; docs/training.md's runs used as many.
GROUPING_BATCHES = 32


class CountedBatches:
    """Training batches that count the tokens they hand out, also over an interruption."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self.tokens = 0

    def next_batch(self) -> Batch:
        batch = self._batches.next_batch()
        mask = batch.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None else next(iter(batch.values())).numel()
        return batch

    def state_dict(self) -> Mapping[str, Any]:
        return {"batches": dict(self._batches.state_dict()), "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state["batches"])
        self.tokens = state["tokens"]


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """One seed's models and data.

    Args:
        start: the fine-tuned dense model that every training starts from. It is copied, never changed.
        new_batches: the training split from its beginning, always in the same order.
        steering: validation batches for a controller of the density.
        calibration: validation batches to place thresholds on.
        config: steps, rates and losses; `target_density` is set anew for every density.
        transform: how LTE forms its experts; the expert size is everybody's.
        directory: for checkpoints; None keeps none.
        example: keyword arguments to trace the model with; transformers models need none.
        dense_learning_rate: of the dense model, where another rate than everybody's suits it better.
        dense_distillation: the dense model's, from the start.
        dense_steps: of the dense model, where it is not trained for as long as the others.
        teacher: of distillation, the start or the dense model.
        keep: takes a trained LTE model, ready to run, and its name.
    """

    start: nn.Module
    new_batches: Callable[[], Batches]
    steering: Sequence[Batch]
    calibration: Sequence[Batch]
    config: TrainConfig
    transform: TransformConfig
    directory: Path | None = None
    example: Mapping[str, Any] | None = None
    on_step: OnStep = lambda event: None
    dense_learning_rate: float | None = None
    dense_distillation: float = 0.0
    dense_steps: int | None = None
    teacher: Teacher = Teacher.DENSE
    keep: Callable[[nn.Module, str], None] = lambda model, name: None
    _tokens: WeakKeyDictionary[nn.Module, int] = field(default_factory=WeakKeyDictionary, init=False)
    _grouped: dict[TransformConfig, Mapping[str, Tensor]] = field(default_factory=dict, init=False)

    @property
    def steps(self) -> int:
        """Of every training, whatever its phases."""
        return self.config.stage1_steps + self.config.stage2_steps

    @cached_property
    def dense(self) -> nn.Module:
        """The start trained on, densely, for `steps` or `dense_steps`: what methods without training are applied to.

        On the labels alone, if no `dense_distillation` is given: where text is plenty the start as its teacher would
        only hold it back. With the model's own dropout.
        """
        model, phase = self.start_copy(), Phase(name="dense", steps=self.dense_steps or self.steps)
        alone: dict[str, Any] = {"distillation": self.dense_distillation, "layer_distillation": 0.0, "dropout": None}
        rate = self.dense_learning_rate or self.config.learning_rate
        with self.alone("dense"):
            self.train(model, "dense", [phase], teacher=self.start, learning_rate=rate, **alone)
        return model.eval()

    def alone(self, name: str) -> AbstractContextManager[object]:
        """Among processes that share the directory: others wait, and then find what was trained."""
        return claim(self.directory / f"{name}.lock") if self.directory else nullcontext()

    @cached_property
    def sites(self) -> tuple[FfnSite, ...]:
        """The FFNs, with the places where the model runs them."""
        found = require_sites(inspect(self.start, self.example))
        return locate_sites(self.start, found, without_labels(self.start, self.steering[0]))

    def start_copy(self) -> nn.Module:
        return copy.deepcopy(self.start)

    def dense_copy(self) -> nn.Module:
        """A copy of `dense` to be changed."""
        model = copy.deepcopy(self.dense)
        self._tokens[model] = self.tokens_of(self.dense)
        return model

    def transformed(self, config: TransformConfig) -> nn.Module:
        """A copy of `start` with routers. Neurons are grouped once for all densities and processes."""
        if config not in self._grouped:
            self._grouped[config] = self._grouped_weights(config)
        model = self.start_copy()
        model.load_state_dict(self._grouped[config], strict=False)
        transform(model, replace(config, grouping=Grouping.CONTIGUOUS), self.example)
        for router in routers(model):
            router.config = replace(router.config, grouping=config.grouping)
        return model

    def _grouped_weights(self, config: TransformConfig) -> Mapping[str, Tensor]:
        """Those tensors of the start that have another order with neurons in groups."""
        name = f"{config.grouping}-{config.expert_size}"
        file = self.directory / f"{name}.safetensors" if self.directory else None
        with self.alone(name):
            if file and file.exists():
                loaded: dict[str, Tensor] = load_file(file, device=str(next(self.start.parameters()).device))
                return loaded
            model, start = self.start_copy(), self.start.state_dict()
            transform(model, config, self.example, activations=self.activations(model, config))
            state = model.state_dict()
            moved = {name: state[name].contiguous() for name in start if not torch.equal(state[name], start[name])}
            if file:
                write_tensors(moved, file.with_suffix(".partial"))
                file.with_suffix(".partial").rename(file)
            return moved

    def train(
        self,
        model: nn.Module,
        name: str,
        phases: Sequence[Phase],
        *,
        steer: bool = False,
        teacher: nn.Module | None = None,
        **changes: Any,
    ) -> nn.Module:
        """Train in place on the same batches as everybody, resuming from this name's checkpoints; returns the model.

        Args:
            steer: measure the density on held-out batches, for phases that train routers.
            teacher: of distillation; None is everybody's.
            changes: to the fields of `config`.
        """
        batches, config = CountedBatches(self.new_batches()), replace(self.config, **changes)
        train(
            model,
            batches,
            config,
            held_out=self.steering if steer else (),
            teacher=(teacher or self._teacher()) if config.needs_teacher else None,
            directory=self.directory / name if self.directory else None,
            phases=phases,
            on_step=self.on_step,
        )
        self._tokens[model] = batches.tokens
        return model

    def _teacher(self) -> nn.Module:
        return self.dense if self.teacher is Teacher.DENSE else self.start

    def tokens_of(self, model: nn.Module) -> int:
        """How many tokens the model was trained on, beyond the start."""
        return self._tokens.get(model, 0)

    def traces(self) -> Iterator[Batch]:
        """The inputs of a whole training, for predictors to learn from: equal data for them too."""
        batches = self.new_batches()
        yield from joined(without_labels(self.start, batches.next_batch()) for _ in range(self.steps))

    def activations(self, model: nn.Module, config: TransformConfig) -> Mapping[str, Any]:
        """What grouping by co-activation looks at; nothing for other groupings."""
        if config.grouping is not Grouping.COACTIVATION:
            return {}
        return collect_activations(model, self.sites, peek_batches(model, self.new_batches(), GROUPING_BATCHES))

    def forget(self, name: str) -> None:
        """Drop the checkpoints of a finished training."""
        if self.directory:
            shutil.rmtree(self.directory / name, ignore_errors=True)
