"""What a baseline is, and the registry that `lte-compile compare` reads. A new one is a decorated function in a file:

    @method("mine", title="Mine", granularity=Granularity.NEURON, needs=Needs.TEXT)
    def mine(bench: Workbench) -> AtDensity:
        selectors = [Mine(site) for site in bench.sites]

        def at(density: float) -> AbstractContextManager[nn.Module]:
            fit(selectors, bench.calibration, density)
            return installed(bench.dense, selectors)

        return at

The function does what every density shares; what it returns yields, for one density, the model to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import TypeAlias

from torch import nn

from lte_compile.baselines.workbench import Workbench

AtDensity: TypeAlias = Callable[[float], AbstractContextManager[nn.Module]]
Fit: TypeAlias = Callable[[Workbench], AtDensity]


class Granularity(StrEnum):
    """What is kept or dropped as one: a whole FFN, an expert, a neuron, or an input channel of each projection."""

    FFN = "ffn"
    EXPERT = "expert"
    NEURON = "neuron"
    INPUT = "input"


class Needs(StrEnum):
    """What a method takes beside the dense model.

    nothing: weights only. text: the task's texts without labels, to fit thresholds or predictors, while the model stays
    as it is. training: it trains the model itself, on labels, for as many steps as the dense model was trained.
    """

    NOTHING = "nothing"
    TEXT = "text"
    TRAINING = "training"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One strategy.

    Args:
        name: on command lines and in file names.
        title: in tables and plots.
        is_oracle: it looks at values that it then leaves out, so it saves no work: a bound, not a competitor.
        only_density: the one density it can be run at; None for any.
        fits_each_density: nothing is shared by densities, so that several processes may take one each.
        fit: see this module's text.
    """

    name: str
    title: str
    granularity: Granularity
    needs: Needs
    is_oracle: bool = False
    only_density: float | None = None
    fits_each_density: bool = False
    fit: Fit


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    title: str,
    granularity: Granularity,
    needs: Needs,
    is_oracle: bool = False,
    only_density: float | None = None,
    fits_each_density: bool = False,
) -> Callable[[Fit], Fit]:
    """Register a function as the method of that name."""

    def register(fit: Fit) -> Fit:
        if name in METHODS:
            raise ValueError(f"a method named {name!r} is registered already; choose another name")
        METHODS[name] = Method(
            name=name,
            title=title,
            granularity=granularity,
            needs=needs,
            is_oracle=is_oracle,
            only_density=only_density,
            fits_each_density=fits_each_density,
            fit=fit,
        )
        return fit

    return register


def find_method(name: str) -> Method:
    """The method of that name, or a ValueError that lists the known ones."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no method {name!r}; known are {', '.join(METHODS)}{hint}")
