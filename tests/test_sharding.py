"""What FSDP2 gathers at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lte_compile.training.distributed import require_plain
from lte_compile.training.sharding import layers_of, whole
from tests.routed import Block
from tests.zoo import build


class Blocks(nn.Module):
    _no_split_modules = ("Block", "Pair")

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.last = Block()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()


def test_layers_of_a_transformers_model() -> None:
    model, _ = build("llama")
    assert {type(layer).__name__ for layer in layers_of(model)} == {"LlamaDecoderLayer"}
    assert len(layers_of(model)) == 2


def test_inner_layers_come_before_outer_ones() -> None:
    model = Blocks()
    assert layers_of(model) == (model.last, model.pair.second, model.pair.first, model.pair)


def test_a_layer_with_tied_weights_is_gathered_with_what_it_shares_them_with() -> None:
    model = Blocks()
    model.last.up.weight = model.pair.first.up.weight
    assert layers_of(model) == (model.pair.second,)
    model.pair.second.up = model.pair.first.up  # in one layer, the pair
    assert layers_of(model) == ()


def test_a_layer_that_runs_several_times_is_one() -> None:
    model = Blocks()
    model.pair.second = model.pair.first
    assert layers_of(model) == (model.last, model.pair.first, model.pair)


def test_models_without_known_layers_are_gathered_at_once() -> None:
    assert layers_of(nn.ModuleList([Block(), Block()])) == ()


def test_a_tensor_without_shards_is_whole() -> None:
    tensor = torch.randn(3, requires_grad=True)
    assert torch.equal(whole(tensor), tensor)
    assert not whole(tensor).requires_grad


def test_wrapped_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_plain(Block())
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module: nn.Module.__init__(self))
    with pytest.raises(ValueError, match="pass the model itself"):
        require_plain(DistributedDataParallel(Block()))
