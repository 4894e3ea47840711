"""The control has no FFNs, however these are written: what is left is the down-projection's bias, and all around it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.baselines import Workbench, find_method, remove_ffns
from lte_compile.config import TransformConfig
from lte_compile.evaluation.quality import evaluate
from lte_compile.inspection.sites import inspect
from lte_compile.training.config import TrainConfig
from tests.zoo import build

WIDTH, HIDDEN, CLASSES, WORDS = 24, 52, 3, 30


class Raw(nn.Module):
    """Multiplies by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.w_up = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 5)
        self.w_down = nn.Parameter(torch.randn(WIDTH, HIDDEN) / 7)
        self.down_bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(self.norm(x), self.w_up))
        return x + F.linear(hidden, self.w_down, self.down_bias)

    def without(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down_bias
        return result


class Parallel(nn.Module):
    """The FFN is a part of layers that serve attention too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 3 * WIDTH + HIDDEN)
        self.second = nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor, keep: float = 1.0) -> Tensor:
        qkv, hidden = self.first(self.norm(x)).split([3 * WIDTH, HIDDEN], -1)
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
        result: Tensor = x + self.second(torch.cat([attended, keep * F.gelu(hidden)], -1))
        return result

    def without(self, x: Tensor) -> Tensor:
        return self.forward(x, keep=0.0)


class Encoder(nn.TransformerEncoderLayer):
    """torch's own, which in eval mode may read its layers' weights instead of calling them."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True, norm_first=True)

    def without(self, x: Tensor) -> Tensor:
        result: Tensor = x + self._sa_block(self.norm1(x), None, None) + self.linear2.bias
        return result


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, without: bool = False) -> Output:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block.without(x) if without else block(x)  # type: ignore[operator]
        logits = self.head(x.mean(1))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


class Words:
    def __init__(self, seed: int) -> None:
        self.seed, self.index = seed, 0

    def next_batch(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.seed + self.index)
        self.index += 1
        ids = torch.randint(WORDS, (6, 5), generator=draw)
        return {"input_ids": ids, "labels": torch.randint(CLASSES, (6,), generator=draw)}

    def state_dict(self) -> Mapping[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = state["index"]


def _bench(start: nn.Module) -> Workbench:
    held_out = [Words(1).next_batch()]
    return Workbench(
        start=start,
        new_batches=lambda: Words(0),
        steering=held_out,
        calibration=held_out,
        config=TrainConfig(target_density=0.5, stage1_steps=2, stage2_steps=1, learning_rate=1e-3),
        transform=TransformConfig(expert_size=13),
        example={"input_ids": held_out[0]["input_ids"]},
    )


@pytest.mark.parametrize("block", [Raw, Parallel, Encoder])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about nested tensors
def test_nothing_but_ffns_is_missing(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    start, batch = Classifier(block), Words(5).next_batch()
    with find_method("ffn-free").fit(_bench(start))(0.0) as model, torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits
        expected = copy.deepcopy(start)
        learned = model.state_dict()
        expected.load_state_dict({name: learned.get(name, value) for name, value in start.state_dict().items()})
        torch.testing.assert_close(logits, expected.eval()(batch["input_ids"], without=True).logits)
        assert not torch.equal(learned["embed.weight"], start.embed.weight)
        selection = evaluate(model, [batch]).selection
    if selection is not None:
        assert (selection.neuron_density, selection.weight_share) == (0.0, 0.0)


def test_a_layer_that_does_more_cannot_be_taken_out() -> None:
    model = Classifier(Parallel)
    sites = inspect(model, {"input_ids": Words(0).next_batch()["input_ids"]}).ffn_sites
    with pytest.raises(ValueError, match=r"blocks\.0\.second\.weight is no weight of a module that does nothing else"):
        remove_ffns(model, sites)


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_a_forward_that_asks_for_a_weights_dtype_still_runs(name: str) -> None:
    model, inputs = build(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    sites = inspect(model).ffn_sites
    gone = remove_ffns(model, sites)
    assert torch.isfinite(gone(**inputs).logits).all()
    matrices = sum((3 if site.gated else 2) * site.hidden * site.width for site in sites)
    assert sum(parameter.numel() for parameter in gone.parameters()) == before - matrices
