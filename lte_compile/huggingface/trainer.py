"""LTE inside transformers' Trainer: the losses, a parameter group for routers, and the move from stage 1 to stage 2."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lte_compile.calibration.density import calibrate, evaluate_routers, set_density
from lte_compile.calibration.effects import fit_to
from lte_compile.config import Stage
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import require_routers, routers, set_stage
from lte_compile.running.labels import without_labels
from lte_compile.running.tracing import trace_routers
from lte_compile.training.config import Gates, TrainConfig
from lte_compile.training.controller import controller_of

# What only `lte_compile.train` does; asked for here it would have no effect.
_UNREAD = ("distillation", "layer_distillation", "hold_density", "start_density", "dropout")


class LteTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for transformed models.

        trainer = LteTrainer(model=model, args=args, train_dataset=..., lte=TrainConfig(...), held_out=[batch, ...])

    Steps and rates come from `args`; of `lte` it reads target_density, gates, separability, router_learning_rate,
    router_weight_decay, fit_router, eta and measure_every. Stage 2 begins after the share
    stage1_steps / (stage1_steps + stage2_steps) of the run. Checkpoints hold eta, thresholds and stage too: a run that
    goes on from one (`resume_from_checkpoint`) ends as it would have without the interruption.

    Args:
        lte: see `TrainConfig`.
        held_out: batches (keyword arguments for the model) on which the density is measured; fitted routers too.
    """

    def __init__(self, *args: Any, lte: TrainConfig, held_out: list[dict[str, Tensor]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not held_out:
            raise ValueError("held_out is empty: the density is steered by held-out batches; pass a few")
        if lte.budget_range is not None:
            raise ValueError("LteTrainer trains for one budget; lte_compile.train takes a budget_range")
        if unread := [f.name for f in fields(lte) if f.name in _UNREAD and getattr(lte, f.name) != f.default]:
            raise ValueError(f"LteTrainer does not do {', '.join(unread)}; leave it out, or use lte_compile.train")
        if not lte.stage1_steps + lte.stage2_steps:
            raise ValueError("stage1_steps and stage2_steps say how the run is divided; both are 0")
        require_routers(self.model)
        self.lte = lte
        self.controller = controller_of(lte)
        self.held_out = held_out
        self.add_callback(_Stages(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Also lets DistributedDataParallel do without gradients of the routers, which have none in stage 2."""
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train. FSDP gets contiguous weights, and routers are fitted before it shards them."""
        if self.is_fsdp_enabled:
            set_layout(self.model, "contiguous")
            if not resume_from_checkpoint:
                self.fit_routers()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def fit_routers(self) -> None:
        """Fit the routers to the held-out batches, if the configuration says so. Of labels only decoders see any."""
        if self.lte.fit_router:
            unlabelled = [without_labels(self.model, batch) for batch in self.held_out]
            fit_to(self.lte.fit_target, self.model, unlabelled, self.lte.target_density)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss, plus eta * L_eff + lambda * L_sep in stage 1."""
        if not model.training or next(routers(model)).stage is not Stage.SOFT:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with trace_routers(model) as trace:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        ramp = min((self.state.global_step + 1) / max(self.stage1_end, 1.0), 1.0)
        extra = self.controller.eta * trace.efficiency_loss()
        extra = extra + self.lte.separability * ramp * trace.separability_loss()
        extra = extra / self._own_division(kwargs.get("num_items_in_batch"))
        return (result[0] + extra, result[1]) if isinstance(result, tuple) else result + extra

    @property
    def stage1_end(self) -> float:
        """In steps of the run."""
        return self.lte.stage1_steps / (self.lte.stage1_steps + self.lte.stage2_steps) * int(self.state.max_steps)

    def _own_division(self, num_items: object) -> int:
        """The Trainer divides a step's losses by its micro-batches, unless the model did so by counting items."""
        counted = self.model_accepts_loss_kwargs and num_items is not None
        return int(self.current_gradient_accumulation_steps) if counted else 1

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the routers moved to a group of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        router_ids = {id(p) for router in routers(self.model) for p in router.parameters()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in router_ids]
        optimizer.add_param_group(
            {
                "params": [p for router in routers(self.model) for p in router.parameters()],
                "lr": self.lte.router_learning_rate,
                "weight_decay": self.lte.router_weight_decay,
            }
        )
        return optimizer


class _Stages(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Enters stage 1 at the beginning and stage 2 on time; measures the held-out density in between.

    What it exports goes into every checkpoint's trainer_state.json.
    """

    def __init__(self, trainer: LteTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step:
            self._restore(saved)
            return
        if not self.trainer.is_fsdp_enabled:
            self.trainer.fit_routers()
        self._enter(Stage.SOFT)

    def _enter(self, stage: Stage) -> None:
        straight_through = stage is Stage.SOFT and self.trainer.lte.gates is Gates.STRAIGHT_THROUGH
        set_stage(self.trainer.model, stage, selection="straight_through" if straight_through else None)

    def state(self) -> dict[str, Any]:
        """What beside weights and optimizer makes a resumed run the same."""
        found = require_routers(self.trainer.model)
        attributes = {
            "stage": found[0].stage.value,
            "controller": self.trainer.controller.state_dict(),
            "thresholds": [router.threshold for router in found],
            "quantiles": [list(router.score_quantiles) for router in found],
        }
        return {"args": {}, "attributes": attributes}

    def from_state(self, state: Any) -> _Stages:
        """For `restore_callback_states_from_checkpoint`: everything comes back when training begins."""
        return self

    def _restore(self, saved: dict[str, Any]) -> None:
        self.trainer.controller.load_state_dict(saved["controller"])
        found = require_routers(self.trainer.model)
        for router, threshold, quantiles in zip(found, saved["thresholds"], saved["quantiles"], strict=True):
            router.threshold, router.score_quantiles = threshold, tuple(quantiles)
        self._enter(Stage(saved["stage"]) if saved["stage"] != Stage.DENSE else Stage.SOFT)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        lte, model = self.trainer.lte, self.trainer.model
        in_stage1 = next(routers(model)).stage is Stage.SOFT
        if in_stage1 and state.global_step % lte.measure_every == 0:
            self.trainer.controller.measure(evaluate_routers(model, self.trainer.held_out).density())
        if in_stage1 and state.global_step >= self.trainer.stage1_end:
            if lte.is_steered:
                calibrate(model, self.trainer.held_out)
                set_density(model, lte.target_density)
            self._enter(Stage.HARD)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._enter(Stage.HARD)
        calibrate(self.trainer.model, self.trainer.held_out)
