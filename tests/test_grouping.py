"""Grouping methods: valid permutations always, tight groups where the method promises them.

Shapes: F neurons, D model width, N tokens, S expert size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k_means_constrained import KMeansConstrained
from torch import Tensor

from lte_compile.config import Grouping
from lte_compile.grouping import GROUPING_METHODS, GroupingRequest, group_neurons, grouping_method

LEARNED = [Grouping.BALANCED_KMEANS, Grouping.COACTIVATION]


def request(
    method: Grouping | str, neurons: int, expert_size: int, *, width: int = 16, seed: int = 0
) -> GroupingRequest:
    generator = torch.Generator().manual_seed(1234 + neurons)
    return GroupingRequest(
        method=method,
        weights_FD=torch.randn(neurons, width, generator=generator),
        expert_size=expert_size,
        seed=seed,
        activations_NF=torch.randn(64, neurons, generator=generator),
        name="layers.0.mlp",
    )


def experts(permutation_F: Tensor, expert_size: int) -> set[frozenset[int]]:
    return {frozenset(chunk.tolist()) for chunk in torch.split(permutation_F, expert_size)}


def inertia(rows_FD: Tensor, permutation_F: Tensor, expert_size: int) -> float:
    chunks = torch.split(rows_FD[permutation_F], expert_size)
    return sum(float((chunk - chunk.mean(0)).square().sum()) for chunk in chunks)


def planted(groups: int, expert_size: int, width: int, spread: float) -> tuple[Tensor, Tensor]:
    """Rows scattered around orthogonal directions, shuffled; and which direction each belongs to."""
    generator = torch.Generator().manual_seed(groups)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:groups]
    label_F = torch.arange(groups).repeat_interleave(expert_size)
    label_F = label_F[torch.randperm(len(label_F), generator=generator)]
    noise_FD = torch.randn(len(label_F), width, generator=generator) / width**0.5
    return directions[label_F] + spread * noise_FD, label_F


@settings(max_examples=60, deadline=None)
@given(method=st.sampled_from(list(Grouping)), neurons=st.integers(1, 90), data=st.data())
def test_every_method_returns_a_permutation_for_awkward_sizes(
    method: Grouping, neurons: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, neurons))
    permutation_F = group_neurons(request(method, neurons, size))
    assert permutation_F.dtype == torch.int64
    assert sorted(permutation_F.tolist()) == list(range(neurons))


@pytest.mark.parametrize("method", list(Grouping))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_same_seed_same_permutation(method: Grouping, dtype: torch.dtype) -> None:
    asked = request(method, 70, 8, seed=3)
    asked = GroupingRequest(**{**vars(asked), "weights_FD": asked.weights_FD.to(dtype)})
    assert torch.equal(group_neurons(asked), group_neurons(asked))


def test_seed_matters_to_random_and_global_state_to_none() -> None:
    first = group_neurons(request(Grouping.RANDOM, 64, 8, seed=0))
    assert not torch.equal(first, group_neurons(request(Grouping.RANDOM, 64, 8, seed=1)))
    torch.manual_seed(99)
    assert torch.equal(first, group_neurons(request(Grouping.RANDOM, 64, 8, seed=0)))


def test_grouping_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    group_neurons(request(Grouping.BALANCED_KMEANS, 64, 8))
    assert torch.equal(state, torch.get_rng_state())


def test_contiguous_keeps_the_order() -> None:
    assert group_neurons(request(Grouping.CONTIGUOUS, 20, 8)).tolist() == list(range(20))


@pytest.mark.parametrize("groups, expert_size", [(2, 16), (7, 5), (24, 8), (12, 32)])
def test_kmeans_recovers_planted_clusters_whatever_the_row_lengths(groups: int, expert_size: int) -> None:
    rows_FD, label_F = planted(groups, expert_size, width=32, spread=0.4)
    lengths_F1 = torch.logspace(-3, 3, len(rows_FD))[:, None]  # normalisation must take these out
    found_F = group_neurons(
        GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=rows_FD * lengths_F1, expert_size=expert_size)
    )
    assert experts(found_F, expert_size) == experts(label_F.argsort(), expert_size)


def test_the_smaller_last_expert_is_a_planted_cluster_too() -> None:
    rows_FD, label_F = planted(6, 8, width=32, spread=0.3)
    keep_F = torch.cat([(label_F < 5).nonzero()[:, 0], (label_F == 5).nonzero()[:3, 0]])
    rows_FD, label_F = rows_FD[keep_F], label_F[keep_F]
    found_F = group_neurons(GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=rows_FD, expert_size=8))
    assert set(label_F[found_F[-3:]].tolist()) == {5}
    assert experts(found_F, 8) == experts(label_F.argsort(stable=True), 8)


@pytest.mark.parametrize("groups, expert_size", [(4, 16), (9, 7)])
def test_coactivation_recovers_neurons_that_fire_together(groups: int, expert_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    label_F = torch.randperm(groups * expert_size, generator=generator) % groups
    fires_NF = (torch.rand(400, groups, generator=generator) < 0.2).float()[:, label_F]
    signs_NF = torch.randn(400, groups * expert_size, generator=generator)  # magnitude counts, not sign
    found_F = group_neurons(
        GroupingRequest(
            method=Grouping.COACTIVATION,
            weights_FD=torch.zeros(groups * expert_size, 4),
            expert_size=expert_size,
            activations_NF=fires_NF * signs_NF,
        )
    )
    assert experts(found_F, expert_size) == experts(label_F.argsort(), expert_size)


def test_grouping_a_grouped_layer_finds_the_same_experts() -> None:
    rows_FD, _ = planted(8, 8, width=32, spread=0.3)
    asked = GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=rows_FD, expert_size=8)
    grouped_FD = rows_FD[group_neurons(asked)]
    again_F = group_neurons(GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=grouped_FD, expert_size=8))
    assert again_F.tolist() == list(range(64))  # experts are listed by their first neuron, neurons in order


@pytest.mark.parametrize("structure", ["none", "weak", "strong"])
def test_inertia_is_no_worse_than_k_means_constrained(structure: str) -> None:
    """Bound: 2 % above the exact-assignment k-means of the k-means-constrained package, best of three starts."""
    spread = {"none": 100.0, "weak": 2.0, "strong": 0.5}[structure]
    rows_FD, _ = planted(12, 16, width=48, spread=spread)
    rows_FD = torch.nn.functional.normalize(rows_FD, dim=1)
    theirs = KMeansConstrained(12, size_min=16, size_max=16, n_init=3, random_state=0).fit(rows_FD.numpy())
    for seed in range(3):
        ours_F = group_neurons(
            GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=rows_FD, expert_size=16, seed=seed)
        )
        assert inertia(rows_FD, ours_F, 16) <= 1.02 * theirs.inertia_


def test_kmeans_beats_a_random_order_on_unstructured_rows() -> None:
    asked = request(Grouping.BALANCED_KMEANS, 256, 16, width=64)
    rows_FD = torch.nn.functional.normalize(asked.weights_FD, dim=1)
    random_F = group_neurons(request(Grouping.RANDOM, 256, 16, width=64))
    # 10 %: far outside what chance gives (about 1 %), well inside what 16 clusters of 64-dimensional noise allow
    assert inertia(rows_FD, group_neurons(asked), 16) < 0.9 * inertia(rows_FD, random_F, 16)


@pytest.mark.parametrize("method", LEARNED)
def test_identical_and_zero_neurons_are_grouped_without_fuss(method: Grouping) -> None:
    zeros = GroupingRequest(
        method=method, weights_FD=torch.zeros(30, 4), expert_size=8, activations_NF=torch.zeros(5, 30)
    )
    assert sorted(group_neurons(zeros).tolist()) == list(range(30))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", list(Grouping))
def test_non_finite_weights_are_refused(method: Grouping, bad: float) -> None:
    asked = request(method, 48, 8)
    asked.weights_FD[5, 3] = bad
    with pytest.raises(ValueError, match=r"weights of layers\.0\.mlp hold NaN or infinity"):
        group_neurons(asked)


def test_non_finite_activations_are_refused() -> None:
    asked = request(Grouping.COACTIVATION, 48, 8)
    assert asked.activations_NF is not None
    asked.activations_NF[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"activations of layers\.0\.mlp hold NaN or infinity"):
        group_neurons(asked)


def test_too_large_an_expert_is_refused_with_the_largest_that_fits() -> None:
    expected = "expert_size 64 is larger than the 48 neurons of layers.0.mlp; choose at most 48"
    with pytest.raises(ValueError, match=expected):
        group_neurons(request(Grouping.CONTIGUOUS, 48, 64))


def test_coactivation_without_activations_says_how_to_get_them() -> None:
    asked = GroupingRequest(method=Grouping.COACTIVATION, weights_FD=torch.ones(8, 2), expert_size=4)
    with pytest.raises(ValueError, match="record the input of the down projection"):
        group_neurons(asked)


def test_activations_of_another_layer_are_refused() -> None:
    asked = GroupingRequest(
        method=Grouping.COACTIVATION, weights_FD=torch.ones(8, 2), expert_size=4, activations_NF=torch.ones(3, 9)
    )
    with pytest.raises(ValueError, match=r"must be \[tokens, 8\]"):
        group_neurons(asked)


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="balanced_kmeans, coactivation, contiguous, random; got 'metis'"):
        group_neurons(request("metis", 8, 4))


def test_a_new_method_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lte_compile.grouping.registry.GROUPING_METHODS", dict(GROUPING_METHODS))

    @grouping_method("by_length")
    def by_length(asked: GroupingRequest) -> Tensor:
        return torch.argsort(asked.weights_FD[:, 0])

    lengths_F = torch.tensor([3.0, 1.0, 2.0])
    asked = GroupingRequest(method="by_length", weights_FD=lengths_F[:, None], expert_size=1)
    assert group_neurons(asked).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="registered already"):
        grouping_method("by_length")(by_length)


def test_a_method_that_returns_no_permutation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lte_compile.grouping.registry.GROUPING_METHODS", dict(GROUPING_METHODS))

    @grouping_method("broken")
    def broken(asked: GroupingRequest) -> Tensor:
        return torch.zeros(len(asked.weights_FD), dtype=torch.long)

    with pytest.raises(ValueError, match="'broken' returned no permutation of the 8 neurons"):
        group_neurons(request("broken", 8, 4))
    assert broken(request("broken", 8, 4)).shape == (8,)


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNED)
def test_gpu_groups_as_tightly_as_the_cpu(method: Grouping) -> None:
    rows_FD, label_F = planted(24, 32, width=64, spread=0.4)
    asked = GroupingRequest(
        method=method, weights_FD=rows_FD.cuda(), expert_size=32, activations_NF=torch.nn.functional.relu(rows_FD.T)
    )
    found_F = group_neurons(asked)
    assert found_F.is_cuda
    assert torch.equal(found_F, group_neurons(asked))
    if method == Grouping.BALANCED_KMEANS:
        assert experts(found_F.cpu(), 32) == experts(label_F.argsort(), 32)
