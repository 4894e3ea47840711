"""How training runs: phases, rates, losses. Each default names its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from math import inf
from typing import Any

from lte_compile.config import FitTarget, Stage, choice_of


class Gates(StrEnum):
    """What multiplies expert outputs in stage 1.

    soft: the scores, as in the paper. straight_through: the hard 0/1 decision forward, the scores' gradient backward;
    no gap opens between what is trained and what is run, which on real weights cost more than anything else.
    """

    SOFT = "soft"
    STRAIGHT_THROUGH = "straight_through"


class BudgetDraw(StrEnum):
    """How densities are drawn from a range: evenly over it or over its logarithm, every other row at the target, or
    half of the rows at its ends."""

    UNIFORM = "uniform"
    LOG_UNIFORM = "log-uniform"
    HALF_AT_TARGET = "half-at-target"
    ENDS = "ends"


class Teacher(StrEnum):
    """Whose outputs a comparison's distillation has as targets: the fine-tuned model that all trainings start from, or
    that model trained on for as many steps as everybody takes, which is the dense model of the comparison."""

    START = "start"
    DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One LTE training run: stage 1 with routers, stage 2 with routers frozen.

    Args:
        target_density: share of neurons to keep active, in (0, 1).
        stage1_steps, stage2_steps: optimizer steps.
        learning_rate: of the model. The paper uses 1.5e-5 to 5e-5 on models of 125M parameters and more; 1e-4 suits
            the small models measured here (docs/training.md).
        router_learning_rate: of the routers. The authors use 1e-2 from random routers; fitted ones start close, and
            3e-4 kept their density (docs/training.md).
        router_weight_decay: the authors' 0.1 pulls scores towards 0.5, where fitted routers must not go: 0 here.
        warmup: share of each phase's steps with a rising rate, then it falls linearly to 0. The paper's 0.06.
        separability: lambda, reached linearly over stage 1: from the first step on, the term pins experts to the side
            of tau they start on (docs/training.md). The paper's 0.5 goes with soft gates; hard gates need none.
        fit_router: start stage 1 from regression-fitted routers (lte_compile.fit_routers).
        fit_target: what they are fitted to.
        eta: a fixed weight of the efficiency loss, as in the paper, instead of the controller's; the density is then
            what it comes to, the threshold stays where it was, and `target_density` is only where fitted routers start.
            With `hold_density` the density is the target, and eta the price that experts compete at for it.
        hold_density: at every measurement shift all routers' biases so that the held-out density is the target. eta
            alone takes hundreds of steps, in which a model of another density is trained.
        start_density, anneal: stage 1 begins at that density, if it is above the target, and falls to the target by
            equal factors over this share of its steps; None begins at the target. Of a `budget_range` it is the lowest
            density that falls: rows run at high ones first (progressive shrinking, Cai et al. 2020).
        dropout: of all dropout layers while routers or a teacher's pupils train; None leaves what the model has.
        budget_range: the lowest and the highest density to train at: every row of a batch runs at one of its own, so
            that `lte_compile.set_density` can move the model over the range; None trains at the target alone. The
            target's density is then held by one shift of all logits, and `eta`, if it is not given, is a price for each
            density, at which rows gain nothing by higher logits (lte_compile.training.controller.Multiplier).
        budget_draw: how rows' densities are drawn from that range. Log-uniform ones helped SmolLM2 at low densities
            (docs/results.md) and hurt MiniLM at all (docs/training.md).
        budget_weight: what a row's logits learn, from labels and teacher, counts as its density to this power; 0 counts
            all alike. Tried: 0, 1.5 and 3; 0 was best for SmolLM2 (docs/results.md) and MiniLM (docs/training.md).
        distillation: weight of KL(teacher, model) against the task loss, in [0, 1]; needs a teacher.
        temperature: both are softened by it before.
        layer_distillation: weight of the layers' distances from the teacher's
            (lte_compile.training.layer_distances); needs a teacher.
        accumulation: micro-batches per step: a batch is cut along its first axis, losses weigh as in the whole batch.
        autocast: bfloat16 autocast; routers stay in float32.
        compile: torch.compile for the layers that the model repeats, and a CUDA graph of a step (docs/training.md).
        step_graphs: CUDA graphs of steps without compiling anything: for short trainings of small models, and texts of
            many lengths.
        max_grad_norm: clipping, the transformers default.
        measure_every: steps between held-out density measurements, which steer eta.
        checkpoint_every: steps between checkpoints; 0 writes none.
    """

    target_density: float
    stage1_steps: int
    stage2_steps: int
    learning_rate: float = 1e-4
    router_learning_rate: float = 3e-4
    router_weight_decay: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.06
    gates: Gates = Gates.STRAIGHT_THROUGH
    separability: float = 0.0
    fit_router: bool = True
    fit_target: FitTarget = FitTarget.ENERGY
    eta: float | None = None
    hold_density: bool = False
    start_density: float | None = None
    anneal: float = 0.5
    dropout: float | None = None
    budget_range: tuple[float, float] | None = None
    budget_draw: BudgetDraw = BudgetDraw.UNIFORM
    budget_weight: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0
    layer_distillation: float = 0.0
    accumulation: int = 1
    autocast: bool = False
    compile: bool = False
    step_graphs: bool = False
    gradient_checkpointing: bool = False
    max_grad_norm: float = 1.0
    measure_every: int = 10
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", choice_of(Gates, self.gates, "gates"))
        object.__setattr__(self, "fit_target", choice_of(FitTarget, self.fit_target, "fit_target"))
        _require(0.0 < self.target_density < 1.0, "target_density must lie between 0 and 1", self.target_density)
        _require(0.0 <= self.distillation <= 1.0, "distillation must lie in [0, 1]", self.distillation)
        _require(self.layer_distillation >= 0.0, "layer_distillation must not be negative", self.layer_distillation)
        _require(0.0 <= self.warmup < 1.0, "warmup must lie in [0, 1)", self.warmup)
        _require(self.eta is None or self.eta >= 0.0, "eta must not be negative", self.eta)
        _require(0.0 <= self.anneal <= 1.0, "anneal must lie in [0, 1]", self.anneal)
        _require(self.dropout is None or 0.0 <= self.dropout < 1.0, "dropout must lie in [0, 1)", self.dropout)
        start = self.start_density
        _require(start is None or 0.0 < start < 1.0, "start_density must lie between 0 and 1", start)
        self._check_budgets()
        for name in ("stage1_steps", "stage2_steps", "checkpoint_every"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("accumulation", "measure_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("learning_rate", "router_learning_rate", "max_grad_norm", "temperature"):
            _require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))

    def _check_budgets(self) -> None:
        object.__setattr__(self, "budget_draw", choice_of(BudgetDraw, self.budget_draw, "budget_draw"))
        if self.budget_range is None:
            return
        object.__setattr__(self, "budget_range", tuple(self.budget_range))
        is_range = len(self.budget_range) == 2 and 0.0 < self.budget_range[0] < self.budget_range[1] < 1.0
        _require(is_range, "budget_range must be two densities between 0 and 1, the lower first", self.budget_range)
        _require(0.0 <= self.budget_weight < inf, "budget_weight must be 0 or more", self.budget_weight)

    @property
    def records_steps(self) -> bool:
        return self.compile or self.step_graphs

    @property
    def is_steered(self) -> bool:
        """Whether the target density is reached, whatever the weight of the efficiency loss."""
        return self.eta is None or self.holds

    @property
    def holds(self) -> bool:
        """Whether biases hold the density at every measurement."""
        return self.hold_density or self.budget_range is not None

    def density_after(self, share: float) -> float:
        """The density wanted after a share of stage 1."""
        return self.target_density if self.budget_range else self._fallen(self.target_density, share)

    def lowest_after(self, share: float) -> float:
        """The lowest density that rows run at after a share of stage 1; the target without a range."""
        return self._fallen(self.budget_range[0] if self.budget_range else self.target_density, share)

    def _fallen(self, end: float, share: float) -> float:
        start = max(self.start_density or 0.0, end)
        fallen = min(share / self.anneal, 1.0) if self.anneal else 1.0
        return float(start * (end / start) ** fallen)

    @property
    def needs_teacher(self) -> bool:
        return self.distillation != 0.0 or self.layer_distillation != 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one stage, one rule and one optimizer.

    `stage` None trains a model as it is, routed or not; `trains_routers` adds LTE's losses and steers the density.
    """

    name: str
    steps: int
    stage: Stage | None = None
    selection: str | None = None
    trains_routers: bool = False


def lte_phases(config: TrainConfig) -> tuple[Phase, ...]:
    """Stage 1 (routers and model train) and stage 2 (routers frozen), as the paper's section 4.2 has them."""
    rule = "straight_through" if config.gates is Gates.STRAIGHT_THROUGH else None
    stage1 = Phase(name="stage 1", stage=Stage.SOFT, steps=config.stage1_steps, selection=rule, trains_routers=True)
    stage2 = Phase(name="stage 2", stage=Stage.HARD, steps=config.stage2_steps)
    return tuple(phase for phase in (stage1, stage2) if phase.steps)


def _require(holds: bool, rule: str, given: object) -> None:
    if not holds:
        raise ValueError(f"{rule}; got {given!r}")
