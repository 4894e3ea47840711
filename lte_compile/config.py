"""What a user chooses when transforming a model, validated on construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, TypeVar

E = TypeVar("E", bound=StrEnum)


class Stage(StrEnum):
    """Where the model is in LTE's life. dense: all gates 1. soft: gates are the scores. hard: gates are 0 or 1."""

    DENSE = "dense"
    SOFT = "soft"
    HARD = "hard"


class Grouping(StrEnum):
    """How neurons are gathered into experts (lte_compile.grouping)."""

    BALANCED_KMEANS = "balanced_kmeans"
    COACTIVATION = "coactivation"
    CONTIGUOUS = "contiguous"
    RANDOM = "random"


class RouterKind(StrEnum):
    """What computes an expert's score from the FFN's input. linear: the paper's. two-layer: see two_layer_router."""

    LINEAR = "linear"
    TWO_LAYER = "two-layer"


class FitTarget(StrEnum):
    """What routers are fitted to: the energy that an expert adds to its FFN's output, every layer with the target's
    share; or its effect on the model's outputs, with one cut for all layers (lte_compile.calibration.effects)."""

    ENERGY = "energy"
    EFFECT = "effect"


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """How FFNs become routers plus experts.

    Args:
        expert_size: neurons per expert. 32 is the paper's (arXiv 2402.06126, section 4.1).
        grouping: see `Grouping`. Balanced k-means on weights is the paper's choice.
        seed: of the grouping and the router initialisation.
        threshold: tau in gates = [score > tau]; 0.5 is the paper's.
        selection: name of the rule that turns scores into gates in the hard stage (lte_compile.kernels.selection).
        router_bias: give routers a bias. The paper's have none; a bias lets a router be "on by default", which the
            regression initialisation (lte_compile.routing.linear_fit) needs.
        router: see `RouterKind`.
        router_rank: features of a two-layer router; None leaves it to the width (lte_compile.routing.two_layer).
    """

    expert_size: int = 32
    grouping: Grouping = Grouping.BALANCED_KMEANS
    seed: int = 0
    threshold: float = 0.5
    selection: str = "threshold"
    router_bias: bool = True
    router: RouterKind = RouterKind.LINEAR
    router_rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grouping", choice_of(Grouping, self.grouping, "grouping"))
        object.__setattr__(self, "router", choice_of(RouterKind, self.router, "router"))
        if isinstance(self.expert_size, bool) or not isinstance(self.expert_size, int) or self.expert_size < 1:
            raise ValueError(f"expert_size must be a whole number of neurons, at least 1; got {self.expert_size!r}")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(
                f"threshold must lie strictly between 0 and 1 (scores are sigmoids); got {self.threshold!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number; got {self.seed!r}")
        self._check_rank()

    def _check_rank(self) -> None:
        rank = self.router_rank
        if rank is None:
            return
        if self.router is RouterKind.LINEAR:
            raise ValueError(f"router_rank belongs to two-layer routers; got {rank!r} with router='linear'")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"router_rank must be a whole number of features, at least 1; got {rank!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TransformConfig:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"TransformConfig has no fields {unknown}; known are {sorted(known)}")
        return cls(**record)


def choice_of(enum: type[E], value: str, what: str) -> E:
    """A member by its value, or a ValueError that lists the allowed ones."""
    try:
        return enum(value)
    except ValueError:
        allowed = [member.value for member in enum]
        near = get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {value!r}{hint}") from None


def parse_stage(value: str) -> Stage:
    """A `Stage` from its name, or a ValueError that lists the allowed names."""
    return choice_of(Stage, value, "stage")
