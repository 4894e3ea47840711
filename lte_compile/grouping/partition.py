"""Partition points into groups of prescribed size so that groups are tight: balanced k-means in Gram space.

With points x_i and groups k of n_k points, inertia = sum_i |x_i|^2 - sum_k W_k / n_k, where W_k is the sum of all
dot products within group k. So only the Gram matrix is needed, and minimising inertia is maximising
sum_k W_k / n_k. Any symmetric positive affinity can take the Gram matrix's place.

Three steps, each monotone after the first: k-means++ seeds; Lloyd rounds whose balanced assignment is solved exactly
for two groups at a time; swaps of two points by their exact gain. Lloyd alone stalls in high dimension (a point
makes up 1 / n_k of its own centroid, so it hardly ever leaves), which the swaps mend.

Two groups at a time means K / 2 disjoint pairs in parallel, arranged as a round-robin tournament so that one sweep
of K - 1 rounds lets each pair of groups meet once.

Shapes: F points, S group size, K = ceil(F / S) groups, M = K * S slots, P pairs of groups.
Points F .. M-1 are padding: zero affinity, fixed in the last group, which is the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Lloyd and the swaps each stop when a sweep gains less than this share of sum_k W_k / n_k or of the inertia.
# 0.0001 instead lowers the inertia of SmolLM2-135M's first gate projection by another 0.3 % in six times the time.
TOLERANCE = 0.02
MAX_LLOYD_SWEEPS = 20
MAX_SWAP_SWEEPS = 30
SHORTLIST = 4  # 32 (all of a group) swaps no better and takes twice as long
SEEDINGS = 3  # a seeding that misses a cluster shows in its potential; the later steps cannot mend it


@dataclass(frozen=True)
class _Problem:
    affinity_MM: Tensor
    squares_M: Tensor  # the affinity's diagonal
    weights_K: Tensor  # 1 / n_k, padding not counted
    points: int
    noise: float  # a gain below this is rounding, and could be undone and redone forever

    def rows(self, points: Tensor) -> Tensor:
        """Affinities of some points to all, in the dtype that is computed in."""
        return self.affinity_MM[points].to(self.squares_M.dtype)


def balanced_partition(affinity_FF: Tensor, group_size: int, seed: int) -> Tensor:
    """Permutation of F points whose consecutive chunks of `group_size` are the groups (the last may be smaller).

    affinity_FF: symmetric Gram matrix in float32 or float64, or in float16, which is read as float32. Returns int64
    [F]; groups are listed by their smallest member, members in rising order, so that equal partitions give equal
    permutations.
    """
    points = affinity_FF.shape[0]
    groups = -(-points // group_size)
    if groups == 1 or group_size == 1:
        return torch.arange(points, device=affinity_FF.device)
    problem = _padded(affinity_FF, groups, group_size)
    generator = torch.Generator().manual_seed(seed)
    members_KS = _first_assignment(problem, groups, generator)
    members_KS = _lloyd(problem, members_KS, generator)
    members_KS = _improve_by_swaps(problem, members_KS, generator)
    return _canonical(members_KS, points)


def _padded(affinity_FF: Tensor, groups: int, group_size: int) -> _Problem:
    points = affinity_FF.shape[0]
    padding = groups * group_size - points
    affinity_MM = torch.nn.functional.pad(affinity_FF, (0, padding, 0, padding)) if padding else affinity_FF
    dtype = torch.promote_types(affinity_FF.dtype, torch.float32)
    sizes_K = torch.full((groups,), float(group_size), dtype=dtype, device=affinity_FF.device)
    sizes_K[-1] -= padding
    squares_M = affinity_MM.diagonal().to(dtype).contiguous()
    noise = 8 * torch.finfo(dtype).eps * float(squares_M.max())
    return _Problem(affinity_MM, squares_M, 1 / sizes_K, points, noise)


def _first_assignment(problem: _Problem, groups: int, generator: torch.Generator) -> Tensor:
    """Choose K points as centres and deal all points out to them, starting from a random deal."""
    draws = [_kmeans_plus_plus(problem, groups, generator) for _ in range(SEEDINGS)]
    potentials = torch.stack([potential for _, potential in draws])
    chosen_K = torch.stack([chosen_K for chosen_K, _ in draws])[potentials.argmin()]
    closeness_KM = problem.rows(chosen_K) - 0.5 * problem.squares_M[chosen_K, None]
    order_M = torch.arange(len(problem.affinity_MM))
    order_M[: problem.points] = torch.randperm(problem.points, generator=generator)
    members_KS = order_M.to(chosen_K.device).view(groups, -1)
    return _assignment_sweep(closeness_KM, members_KS, problem.points, generator)


def _kmeans_plus_plus(problem: _Problem, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007, with the 2 + ln K candidates a step they suggest).

    Returns the K points and the sum of squared distances to the nearest of them.
    """
    points = problem.points
    squares_F = problem.squares_M[:points]
    candidates = min(2 + int(math.log(groups)), points)
    chosen_K = torch.empty(groups, dtype=torch.long, device=squares_F.device)
    nearest_F = torch.full_like(squares_F, torch.inf)
    chance_F = torch.ones_like(squares_F)
    for k, race_F in enumerate(_races(groups, squares_F, generator)):
        # the largest of d / Exp(1) are draws in proportion to d, without a cumulative sum
        drawn_C = (chance_F / race_F).topk(candidates).indices
        squared_distance_CF = squares_F + squares_F[drawn_C, None] - 2 * problem.rows(drawn_C)[:, :points]
        nearest_CF = torch.minimum(nearest_F, squared_distance_CF.clamp(min=0))
        best = nearest_CF.sum(dim=1).argmin()
        chosen_K[k], nearest_F = drawn_C[best], nearest_CF[best]
        chance_F = nearest_F
    return chosen_K, nearest_F.sum()


def _races(groups: int, like_F: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Exponential numbers for every point, `groups` times. Drawn on the CPU, so that all devices draw the same; a GPU
    gets them at once, since a copy each would take half of the time."""
    rounds = (torch.empty(len(like_F)).exponential_(generator=generator) for _ in range(groups))
    return iter(torch.stack(list(rounds)).to(like_F)) if like_F.is_cuda else (race_F.to(like_F) for race_F in rounds)


def _lloyd(problem: _Problem, members_KS: Tensor, generator: torch.Generator) -> Tensor:
    reached = problem.weights_K.new_zeros(())
    for _ in range(MAX_LLOYD_SWEEPS):
        means_KM = _group_means(problem, members_KS)
        within_K = _within(means_KM, members_KS)
        before, reached = reached, within_K.sum()
        if reached - before <= _worthwhile(problem, reached):
            break
        closeness_KM = means_KM - 0.5 * (within_K * problem.weights_K)[:, None]
        members_KS = _assignment_sweep(closeness_KM, members_KS, problem.points, generator)
    return members_KS


def _assignment_sweep(closeness_KM: Tensor, members_KS: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Every pair of groups meets once and divides its points optimally for fixed centroids.

    For groups a and b the best division sorts their points by closeness to a minus closeness to b.
    """
    members_KS = members_KS.clone()
    size = members_KS.shape[1]
    for a_P, b_P in _tournament(len(members_KS), generator, members_KS.device):
        both_PT = torch.cat([members_KS[a_P], members_KS[b_P]], dim=1)
        preference_PT = closeness_KM[a_P[:, None], both_PT] - closeness_KM[b_P[:, None], both_PT]
        preference_PT.masked_fill_(both_PT >= points, -torch.inf)  # padding stays in the last group, which is a b
        order_PT = preference_PT.argsort(dim=1, descending=True, stable=True)
        both_PT = both_PT.gather(1, order_PT)
        members_KS[a_P], members_KS[b_P] = both_PT[:, :size], both_PT[:, size:]
    return members_KS


def _improve_by_swaps(problem: _Problem, members_KS: Tensor, generator: torch.Generator) -> Tensor:
    """Swap the best two points of each pair of groups while that raises sum_k W_k / n_k."""
    members_KS = members_KS.clone()
    means_KM = _group_means(problem, members_KS)
    reached = _within(means_KM, members_KS).sum()
    for _ in range(MAX_SWAP_SWEEPS):
        gained = torch.zeros_like(reached)
        for a_P, b_P in _tournament(len(members_KS), generator, members_KS.device):
            gained += _swap_round(problem, members_KS, means_KM, a_P, b_P)
        reached += gained
        if gained <= _worthwhile(problem, reached):
            break
    return members_KS


def _swap_round(problem: _Problem, members_KS: Tensor, means_KM: Tensor, a_P: Tensor, b_P: Tensor) -> Tensor:
    """One swap in each pair of groups where one helps; updates members and means in place, returns the total gain."""
    gain_P, slot_i_P, slot_j_P = _best_swaps(problem, members_KS, means_KM, a_P, b_P)
    helps_P = gain_P > problem.noise
    if not helps_P.is_cuda:  # which pairs swap is not asked of a GPU: the answer takes longer than idle swaps
        helped = helps_P.nonzero()[:, 0]
        a_P, b_P, slot_i_P, slot_j_P = a_P[helped], b_P[helped], slot_i_P[helped], slot_j_P[helped]
        gain_P, helps_P = gain_P[helped], helps_P[helped]
    i_P, j_P = members_KS[a_P, slot_i_P], members_KS[b_P, slot_j_P]
    new_a_P, new_b_P = torch.where(helps_P, j_P, i_P), torch.where(helps_P, i_P, j_P)
    members_KS[a_P, slot_i_P], members_KS[b_P, slot_j_P] = new_a_P, new_b_P
    change_PM = problem.rows(new_a_P) - problem.rows(i_P)
    means_KM.index_add_(0, a_P, change_PM * problem.weights_K[a_P, None])
    means_KM.index_add_(0, b_P, change_PM * problem.weights_K[b_P, None], alpha=-1)
    return torch.where(helps_P, gain_P, 0).sum()


def _best_swaps(
    problem: _Problem, members_KS: Tensor, means_KM: Tensor, a_P: Tensor, b_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pair of groups: the gain of the best swap found, and the slots in a and b that it exchanges.

    With m the group means and d = A_ii + A_jj - 2 A_ij, exchanging i of group a with j of group b makes W_a / n_a
    grow by 2 (m_a[j] - m_a[i]) + d / n_a and W_b / n_b by 2 (m_b[i] - m_b[j]) + d / n_b. All but A_ij is a sum of a
    term for i and one for j, so the best candidates of each side are shortlisted by their own term and only those are
    tried against each other.
    """
    leave_a_PS, leave_b_PS = _leaving_gains(problem, members_KS, means_KM, a_P, b_P)
    shortlist = min(SHORTLIST, members_KS.shape[1])
    gain_i_PC, slot_i_PC = leave_a_PS.topk(shortlist, dim=1)
    gain_j_PC, slot_j_PC = leave_b_PS.topk(shortlist, dim=1)
    i_PC, j_PC = members_KS[a_P].gather(1, slot_i_PC), members_KS[b_P].gather(1, slot_j_PC)
    per_point_P11 = (problem.weights_K[a_P] + problem.weights_K[b_P])[:, None, None]
    cross_PCC = problem.affinity_MM[i_PC[:, :, None], j_PC[:, None, :]]
    gain_PCC = gain_i_PC[:, :, None] + gain_j_PC[:, None, :] - 2 * per_point_P11 * cross_PCC
    gain_P, where_P = gain_PCC.flatten(1).max(dim=1)
    pick_i_P1, pick_j_P1 = (where_P // shortlist)[:, None], (where_P % shortlist)[:, None]
    return gain_P, slot_i_PC.gather(1, pick_i_P1)[:, 0], slot_j_PC.gather(1, pick_j_P1)[:, 0]


def _leaving_gains(
    problem: _Problem, members_KS: Tensor, means_KM: Tensor, a_P: Tensor, b_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The terms of a swap's gain that belong to one point: of a's members for going to b, and of b's for going to a."""
    in_a_PS, in_b_PS = members_KS[a_P], members_KS[b_P]
    a_P1, b_P1 = a_P[:, None], b_P[:, None]
    bonus_P1 = (problem.weights_K[a_P] + problem.weights_K[b_P])[:, None]
    leave_a_PS = 2 * (means_KM[b_P1, in_a_PS] - means_KM[a_P1, in_a_PS]) + bonus_P1 * problem.squares_M[in_a_PS]
    leave_b_PS = 2 * (means_KM[a_P1, in_b_PS] - means_KM[b_P1, in_b_PS]) + bonus_P1 * problem.squares_M[in_b_PS]
    leave_b_PS.masked_fill_(in_b_PS >= problem.points, -torch.inf)  # padding stays in the last group, which is a b
    return leave_a_PS, leave_b_PS


def _group_means(problem: _Problem, members_KS: Tensor) -> Tensor:
    """means[k, i] = affinity of point i to the members of group k, averaged; the dot product with its centroid."""
    means_KM = problem.rows(members_KS[:, 0])
    for slot in range(1, members_KS.shape[1]):  # one slot at a time: no [K, S, M] temporary
        means_KM += problem.rows(members_KS[:, slot])
    return means_KM * problem.weights_K[:, None]


def _within(means_KM: Tensor, members_KS: Tensor) -> Tensor:
    """W_k / n_k; its sum is the quantity to maximise."""
    return means_KM.gather(1, members_KS).sum(dim=1)


def _worthwhile(problem: _Problem, tightness: Tensor) -> Tensor:
    """The least gain of a sweep worth another one: a share of what is left to gain, or of what there is."""
    inertia = problem.squares_M.sum() - tightness
    return TOLERANCE * torch.minimum(tightness, inertia)


def _tournament(groups: int, generator: torch.Generator, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of disjoint pairs (a < b) in which each pair of groups meets once: the circle method, shuffled."""
    players = groups + groups % 2  # with an odd number, whoever meets player `groups` sits out
    turns = torch.arange(players - 1)
    seats_RP = torch.cat([torch.zeros(players - 1, 1, dtype=torch.long), 1 + (turns[:, None] + turns) % len(turns)], 1)
    players_RP = torch.randperm(players, generator=generator)[seats_RP]
    left_RP, right_RP = players_RP[:, : players // 2], players_RP[:, players // 2 :].flip(1)
    a_RP, b_RP = torch.minimum(left_RP, right_RP), torch.maximum(left_RP, right_RP)
    plays_RP = b_RP < groups  # drops the same number from each round
    a_RP, b_RP = a_RP[plays_RP].view(len(turns), -1).to(device), b_RP[plays_RP].view(len(turns), -1).to(device)
    return zip(a_RP, b_RP, strict=True)


def _canonical(members_KS: Tensor, points: int) -> Tensor:
    members_KS = members_KS.sort(dim=1).values
    full_KS, last_S = members_KS[:-1], members_KS[-1]
    if bool(last_S[-1] < points):  # the last group is no smaller: it may take any place
        full_KS, last_S = members_KS, last_S[:0]
    full_KS = full_KS[full_KS[:, 0].argsort()]
    return torch.cat([full_KS.flatten(), last_S[last_S < points]])
