"""Batches as callers have them: lists, DataLoaders, tensors; models that return a bare tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lte_compile as lte
from lte_compile.data.epochs import Epochs, endless
from lte_compile.training.config import TrainConfig
from tests.planted import Planted, batches, example

CONFIG = TrainConfig(target_density=0.5, stage1_steps=6, stage2_steps=3, checkpoint_every=2)
Rows = list[dict[str, Tensor]]


class Bare(nn.Module):
    """An FFN in a model that returns a tensor and takes no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, shift: float = 0.0) -> Any:
        return self.head(x + self.down(torch.relu(self.up(x))) + shift)


def _bare() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x_BD = Bare(), torch.randn(64, 8)
    return lte.transform(model, lte.TransformConfig(expert_size=8), x_BD), x_BD


def _rows(count: int = 22) -> Rows:
    [batch] = batches(3, 1, size=count)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def _planted() -> nn.Module:
    torch.manual_seed(0)
    return lte.transform(Planted(), lte.TransformConfig(expert_size=8), example())


def _quantiles(model: nn.Module) -> list[tuple[float, ...]]:
    return [router.score_quantiles for router in lte.routers(model)]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x, 0.0]])
def test_positional_batches_are_those_of_their_names(wrap: Callable[[Tensor], Any]) -> None:
    (model, x_BD), (named, _) = _bare(), _bare()
    for fit in (lte.fit_routers, lte.fit_routers_to_effects):
        fit(model, [wrap(x_BD)], 0.4)
        fit(named, [{"x": x_BD}], 0.4)
        lte.calibrate(model, [wrap(x_BD)])
        lte.calibrate(named, [{"x": x_BD}])
        assert _quantiles(model) == _quantiles(named) != [()]


def test_a_loader_of_tensors_is_walked() -> None:
    (model, x_BD), (named, _) = _bare(), _bare()
    lte.calibrate(model, DataLoader(TensorDataset(x_BD), batch_size=16))
    lte.calibrate(named, [{"x": part_BD} for part_BD in torch.split(x_BD, 16)])
    assert _quantiles(model) == _quantiles(named)


def test_activations_of_positional_batches() -> None:
    model, x_BD = Bare(), torch.randn(10, 8)
    [hidden_NF] = lte.collect_activations(model, lte.inspect(model, x_BD).ffn_sites, torch.split(x_BD, 5)).values()
    torch.testing.assert_close(hidden_NF, torch.relu(model.up(x_BD)))


def test_evaluation_of_a_model_that_returns_a_tensor() -> None:
    model, x_BD = _bare()
    with torch.no_grad():
        logits_BC = model(x_BD)
    labels_B = logits_BC.argmax(-1)
    found = lte.evaluate(model, [{"x": x_BD, "labels": labels_B}])
    assert found.accuracy == 1.0
    expected = nn.functional.cross_entropy(logits_BC, labels_B)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("given_batches", "reason"),
    [
        (torch.zeros(4, 8), "put a single one into a list"),
        ({"x": torch.zeros(4, 8)}, "put a single one into a list"),
        (None, "put a single one into a list"),
        ([], "no batches were given"),
        (["text"], r"or one tensor; got str"),
        ([(torch.zeros(4, 8), 0.0, torch.zeros(4))], "forward takes x, shift, and a batch has 3 values"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lte.calibrate,
        lambda model, given: lte.fit_routers(model, given, 0.3),
        lambda model, given: lte.fit_routers_to_effects(model, given, 0.3),
        lte.evaluate,
    ],
)
def test_what_is_no_batch_is_refused(use: Callable[..., Any], given_batches: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        use(_bare()[0], given_batches)


@pytest.mark.parametrize("densities", [(0.2, 0.0), (1.5,)])
def test_densities_out_of_range_leave_the_thresholds_alone(densities: tuple[float, ...]) -> None:
    model, x_BD = _bare()
    before = [router.threshold for router in lte.routers(model)]
    with pytest.raises(ValueError, match=r"densities must lie in \(0, 1\]"):
        lte.calibrate(model, [x_BD], densities=densities)
    with pytest.raises(ValueError, match="put a single one into a list"):
        lte.calibrate(model, x_BD, densities=(0.2,))
    assert [router.threshold for router in lte.routers(model)] == before


def test_a_model_without_logits_is_refused() -> None:
    class Pair(Bare):
        def forward(self, x: Tensor, shift: float = 0.0) -> Any:
            return super().forward(x), shift

    model = Pair()
    with pytest.raises(ValueError, match="returned a tuple without logits"):
        lte.evaluate(model, [{"x": torch.zeros(2, 8), "labels": torch.zeros(2).long()}])


def test_inputs_by_position_alone_are_refused() -> None:
    class Positional(Bare):
        def forward(self, x: Tensor, /, shift: float = 0.0) -> Any:
            return super().forward(x)

    model = lte.transform(Positional(), lte.TransformConfig(expert_size=8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="takes x by position alone"):
        lte.calibrate(model, [torch.zeros(2, 8)])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kill_at", [2, 5, 8])
def test_training_on_a_loader_resumes_bit_identically(tmp_path: Path, kill_at: int, *, shuffle: bool) -> None:
    held_out = batches(1, 1)

    def loader() -> DataLoader[Any]:
        return DataLoader(_rows(), batch_size=8, shuffle=shuffle)  # type: ignore[arg-type]  # three batches an epoch

    whole = _planted()
    lte.train(whole, loader(), CONFIG, held_out=held_out, directory=tmp_path / "a")

    class KilledError(RuntimeError):
        pass

    def kill(event: Any) -> None:
        done = event.step + (CONFIG.stage1_steps if event.phase == "stage 2" else 0)
        if done == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        lte.train(_planted(), loader(), CONFIG, held_out=held_out, directory=tmp_path / "b", on_step=kill)
    torch.manual_seed(99)  # another process's
    resumed = _planted()
    lte.train(resumed, loader(), CONFIG, held_out=held_out, directory=tmp_path / "b")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_list_trains_as_its_loader_does() -> None:
    held_out: DataLoader[Any] = DataLoader(_rows(), batch_size=11)  # type: ignore[arg-type]
    rows: DataLoader[Any] = DataLoader(_rows(), batch_size=8)  # type: ignore[arg-type]
    listed, loaded = _planted(), _planted()
    a = lte.train(listed, list(rows), CONFIG, held_out=held_out)
    b = lte.train(loaded, rows, CONFIG, held_out=held_out)
    assert [event.loss for event in a] == [event.loss for event in b]
    assert a[-1].density is not None


def test_a_checkpoint_of_other_batches_is_refused(tmp_path: Path) -> None:
    held_out = batches(1, 1)
    lte.train(_planted(), batches(0, 3), CONFIG, held_out=held_out, directory=tmp_path)
    with pytest.raises(ValueError, match=r"position belongs to other batches: batches 3 \(now 4\)"):
        lte.train(_planted(), batches(0, 4), replace(CONFIG, stage2_steps=9), held_out=held_out, directory=tmp_path)


class _Stream(IterableDataset[dict[str, Tensor]]):
    """Data of unknown length."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"x": torch.tensor(row)} for row in self.rows)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_saved_position_is_where_the_next_batch_is(rows: list[int], first: int, then: int, is_sized: bool) -> None:
    data: Iterable[dict[str, Tensor]] = list(_Stream(rows)) if is_sized else DataLoader(_Stream(rows), batch_size=None)
    source, other = Epochs(data, seed=0), Epochs(data, seed=0)
    for _ in range(first):
        source.next_batch()
    position = source.state_dict()
    expected = [source.next_batch()["x"].item() for _ in range(then)]
    other.load_state_dict(position)
    assert [other.next_batch()["x"].item() for _ in range(then)] == expected
    assert expected == [rows[(first + number) % len(rows)] for number in range(then)]


def test_epochs_are_shuffled_each_in_its_own_order_and_leave_the_generator_alone() -> None:
    data = [{"x": torch.tensor(row)} for row in range(16)]
    source = Epochs(DataLoader(data, batch_size=16, shuffle=True), seed=0)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    first, second = (source.next_batch()["x"].tolist() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(16))


def test_a_position_behind_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch at epoch 0, index 3: an epoch has fewer now"):
        Epochs(_Stream([1, 2]), seed=0).load_state_dict({"epoch": 0, "index": 3, "seed": 0})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (iter([{"x": torch.zeros(1)}]), "type list_iterator can be gone through once.*give a list or a DataLoader"),
        (torch.zeros(3), "are a list or a DataLoader of mappings.*got Tensor"),
        ({"x": torch.zeros(3)}, "are a list or a DataLoader of mappings.*got dict"),
        (None, "got NoneType"),
    ],
)
def test_data_that_cannot_be_gone_through_again_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        endless(data, seed=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "no batches were given"),
        ([torch.zeros(3)], "a batch to train on is a mapping.*got Tensor"),
        ([{"inputs": [1, 2], "labels": [0]}], "holds tensors, rows first; 'inputs' is a list"),
    ],
)
def test_batches_that_cannot_be_trained_on_are_refused(data: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lte.train(_planted(), data, CONFIG, held_out=batches(1, 1))
