"""The training loop: density, exact resumption, and the same losses however a batch is cut."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.data.batches import Example, TextBatches
from lte_compile.evaluation.quality import evaluate
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.training.config import Gates, Phase, TrainConfig
from lte_compile.training.loop import StepEvent, build_optimizer, train
from lte_compile.training.losses import LossWeights, micro_batches, weighted_loss
from lte_compile.transform import transform
from tests.routed import routed
from tests.zoo import build

CLASSES, WIDTH, EXPERTS, SIZE = 4, 16, 8, 8


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Clusters(nn.Module):
    """Tokens of one of four kinds; each kind needs its own part of the FFN: known sparse structure."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, EXPERTS * SIZE)
        self.down = nn.Linear(EXPERTS * SIZE, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        x = self.embed(input_ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits = self.head(pooled)
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def _examples(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        label = int(torch.randint(CLASSES, (1,), generator=generator))
        length = int(torch.randint(3, 9, (1,), generator=generator))
        words = torch.randint(1, 10, (length,), generator=generator) + 10 * label
        rows.append(Example(tuple(words.clamp(max=39).tolist()), label))
    return rows


def _batches(seed: int = 0) -> TextBatches:
    return TextBatches(_examples(256, seed), batch_size=32, pad_token_id=0, seed=seed, by_length=True)


def _held_out() -> list[dict[str, Tensor]]:
    source = TextBatches(_examples(128, 99), batch_size=64, pad_token_id=0, seed=0, by_length=False)
    return [source.next_batch(), source.next_batch()]


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    batch = _held_out()[0]
    return transform(Clusters(), TransformConfig(expert_size=SIZE), {k: v for k, v in batch.items() if k != "labels"})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gates", list(Gates))
@pytest.mark.parametrize("target", [0.25, 0.5])
def test_training_reaches_the_target_density_and_learns(gates: Gates, target: float) -> None:
    model, held_out = _model(), _held_out()
    separability = 0.5 if gates is Gates.SOFT else 0.0
    config = TrainConfig(
        target_density=target,
        stage1_steps=150,
        stage2_steps=50,
        gates=gates,
        separability=separability,
        learning_rate=3e-3,
        router_learning_rate=3e-3,
    )
    events = train(model, _batches(), config, held_out=held_out)
    set_stage(model, "hard")
    result = evaluate(model, held_out)
    # +-0.03 is the product's promise for a small training; four separable kinds leave no excuse in accuracy.
    assert abs(result.density - target) <= 0.03
    assert result.accuracy > 0.95
    assert [e.phase for e in events] == ["stage 1"] * 150 + ["stage 2"] * 50
    assert not any(p.requires_grad for r in routers(model) for p in r.parameters())


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"target_density": 0.4, "stage1_steps": 13, "stage2_steps": 8, "checkpoint_every": 5, **changes}
    )


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("kill_at", [1, 5, 9, 13, 14, 17, 20])
def test_resumed_training_is_bit_identical(tmp_path: Path, kill_at: int) -> None:
    uninterrupted = _model()
    expected = train(uninterrupted, _batches(), _config(), held_out=_held_out(), directory=tmp_path / "a")

    seen: list[StepEvent] = []

    def kill(event: StepEvent) -> None:
        seen.append(event)
        if len(seen) == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(_model(), _batches(), _config(), held_out=_held_out(), directory=tmp_path / "b", on_step=kill)
    torch.manual_seed(12345)  # a new process would not have the old one's random state
    resumed = _model()
    events = train(resumed, _batches(), _config(), held_out=_held_out(), directory=tmp_path / "b")
    assert events == expected
    for name, value in _weights(uninterrupted).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [r.threshold for r in routers(resumed)] == [r.threshold for r in routers(uninterrupted)]


_CHILD = """
import sys, torch
from pathlib import Path
from tests.test_training import _batches, _config, _held_out, _model
from lte_compile.training.loop import train
print("ready", flush=True)
train(_model(), _batches(), _config(stage1_steps=4000, checkpoint_every=3), held_out=_held_out(),
      directory=Path(sys.argv[1]), on_step=lambda e: print(e.step, flush=True))
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "40":
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    resumed: list[StepEvent] = []

    def stop_soon(event: StepEvent) -> None:
        resumed.append(event)
        if len(resumed) == 2:
            raise KilledError

    config = _config(stage1_steps=4000, checkpoint_every=3)
    with pytest.raises(KilledError):
        train(_model(), _batches(), config, held_out=_held_out(), directory=tmp_path, on_step=stop_soon)
    assert resumed[0].step >= 37


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    train(_model(), _batches(), _config(), held_out=_held_out(), directory=tmp_path)
    newest = sorted(tmp_path.glob("step-*"))[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000021.*damaged.*delete its folder"):
        train(_model(), _batches(), _config(), held_out=_held_out(), directory=tmp_path)


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = build("bert", torch.float64)
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in inputs.items()}
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    transform(model, TransformConfig(expert_size=16), inputs)
    set_stage(model, "soft")
    return model, batch


def _gradients(
    model: nn.Module, batch: Mapping[str, Tensor], pieces: int, processes: int = 1, teacher: nn.Module | None = None
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    weights = LossWeights(efficiency=0.7, separability=0.3, distillation=0.5)
    total = 0.0
    for rank in range(processes):
        for part in micro_batches(batch, pieces, rank=rank, processes=processes):
            loss = weighted_loss(model, part, weights, teacher)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulation_gives_the_gradients_of_the_whole_batch(pieces: int) -> None:
    model, batch = _bert()
    whole, cut = _gradients(model, batch, 1), _gradients(model, batch, pieces)
    # float64 sums in another order
    assert cut[0] == pytest.approx(whole[0], rel=1e-12)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-9, atol=1e-12)


def _next_token_loss(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """In float64; transformers' own casts to float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rows of 12, 8 and 12 tokens, of which 11, 7 and none have a label."""
    model: Any
    model, inputs = routed("llama")
    model.loss_function = _next_token_loss
    batch = {k: torch.cat([v, v[:1]]) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    batch["labels"][2] = -100
    return set_stage(model, "soft"), batch


@pytest.mark.parametrize(("pieces", "processes"), [(3, 1), (1, 2), (2, 2), (1, 3), (2, 5)])
@pytest.mark.parametrize("build_model", [_bert, _llama])
def test_shares_of_processes_give_the_gradients_of_the_whole_batch(
    build_model: Callable[[], tuple[nn.Module, dict[str, Tensor]]], pieces: int, processes: int
) -> None:
    """Uneven ones, ones without a label, and more processes than rows; with distillation."""
    model, batch = build_model()
    teacher = set_stage(copy.deepcopy(model), "dense")
    whole, cut = (_gradients(model, batch, *how, teacher) for how in ((1, 1), (pieces, processes)))
    assert cut[0] == pytest.approx(whole[0], rel=1e-12)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-9, atol=1e-12)
    counts = {len(list(micro_batches(batch, pieces, rank=r, processes=processes))) for r in range(processes)}
    assert len(counts) == 1  # or processes would wait for each other forever


def test_gradient_checkpointing_gives_the_same_losses_and_gradients() -> None:
    model, batch = _bert()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = _gradients(model, batch, 1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    checkpointed = _gradients(model, batch, 1)
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-12)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_a_model_distilled_from_itself_has_no_distillation_loss() -> None:
    model, batch = _bert()
    set_stage(model, "dense")
    teacher = copy.deepcopy(model)
    [part] = micro_batches(batch, 1)
    loss = weighted_loss(model, part, LossWeights(distillation=1.0), teacher)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_routers_have_their_own_rate_and_are_left_out_once_frozen() -> None:
    model = _model()
    groups = build_optimizer(model, _config(router_learning_rate=0.01)).param_groups
    router_ids = {id(p) for r in routers(model) for p in r.parameters()}
    assert [g["lr"] for g in groups] == [1e-4, 0.01]
    assert {id(p) for p in groups[1]["params"]} == router_ids
    set_stage(model, "hard")
    assert len(build_optimizer(model, _config()).param_groups) == 1


def test_a_plain_phase_trains_a_dense_model() -> None:
    torch.manual_seed(0)
    model = Clusters()
    phase = Phase(name="fine-tune", steps=60)
    events = train(model, _batches(), _config(learning_rate=3e-3), phases=[phase])
    assert events[-1].loss < 0.5 * events[0].loss
    assert events[-1].density is None


def test_a_loss_that_is_not_finite_stops_training() -> None:
    model = _model()
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, nn.Embedding)).weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"stage 2, step 1"):
        train(model, _batches(), _config(stage1_steps=0, fit_router=False), phases=None, held_out=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_density": 0.0}, "target_density must lie between"),
        ({"distillation": 1.5}, "distillation must lie in"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"stage1_steps": -1}, "stage1_steps must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"eta": -0.1}, "eta must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.parametrize("stage2_steps", [0, 20])
def test_a_fixed_eta_decides_the_density_and_thresholds_stay(stage2_steps: int) -> None:
    densities = []
    for eta in (0.0, 4.0):
        model = _model()
        config = _config(
            eta=eta, stage1_steps=60, stage2_steps=stage2_steps, learning_rate=3e-3, router_learning_rate=3e-3
        )
        events = train(model, _batches(), config, held_out=_held_out())
        set_stage(model, "hard")
        assert {event.eta for event in events if event.phase == "stage 1"} == {eta}
        assert {router.threshold for router in routers(model)} == {0.5}
        densities.append(evaluate(model, _held_out()).density)
    assert densities[0] > densities[1] + 0.1  # from the same start


def test_a_held_density_is_the_target_at_every_measurement() -> None:
    worst = {}
    for held in (False, True):
        model = _model()
        rates = {"learning_rate": 3e-3, "router_learning_rate": 3e-2, "measure_every": 2}
        config = _config(hold_density=held, stage1_steps=60, stage2_steps=0, **rates)
        events = train(model, _batches(), config, held_out=_held_out())
        worst[held] = max(abs(event.density - 0.4) for event in events[10:] if event.density is not None)
        assert {router.threshold for router in routers(model)} == {0.5}
    # What two steps at that rate change; 8 experts on 128 texts make steps of about a hundredth.
    assert worst[True] < 0.08
    assert worst[True] < 0.6 * worst[False]


def test_missing_pieces_are_named() -> None:
    with pytest.raises(ValueError, match="held_out is empty"):
        train(_model(), _batches(), _config())
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        train(_model(), _batches(), _config(distillation=0.5), held_out=_held_out())
    with pytest.raises(ValueError, match="has no routers"):
        train(Clusters(), _batches(), _config(), held_out=_held_out())


def test_a_router_survives_deepcopy_with_its_settings() -> None:
    model = _model()
    set_stage(model, "hard")
    copied = next(routers(copy.deepcopy(model)))
    assert isinstance(copied, Router)
    assert (copied.stage, copied.rule) == ("hard", "threshold")
