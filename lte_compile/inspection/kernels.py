"""explain: which kernel serves each FFN of a model, and why no faster one does. Nothing is run or timed.

The answer is read off the lowered graph and the table of kernels, so it holds for devices that are not there as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from lte_compile.capture.capture import Inputs, capture_all
from lte_compile.config import Stage
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.lowering import Request, choose, describe
from lte_compile.kernels.selection import check_density
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.passes.anchors import arguments, is_lte, level_of
from lte_compile.passes.copying import copy_captured
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.ir import CapturedGraph, Level
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.routing.router import require_routers
from lte_compile.running.modes import in_stage

REFERENCE_FORM = "reference form"
TOKENS = (1, 16, 512)  # one-token decode, a small batch, a prompt: what the kernels are made for
DEVICES = ("cpu", "cuda")
_WEIGHTS = ("w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down")


@dataclass(frozen=True)
class KernelOfSite:
    """The kernel that serves one FFN, named by its down-projection, at a number of tokens.

    `kernel` is a row of lte_compile.kernels.lowering, or "reference form" where the FFN did not become one op;
    `refusals` hold the reason of each row above it (or of the pass).
    """

    site: str
    tokens: int
    density: float | None
    kernel: str
    refusals: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    density: float | None = None,
) -> tuple[KernelOfSite, ...]:
    """For inference of a transformed model in its hard stage: each FFN, in the graph's order, at each number of tokens.

    Args:
        example_inputs: see `lte_compile.capture.capture.capture`; transformers models need none.
        device: "cpu" or "cuda", by default where the model is.
        dtype: of the weights, by default the model's.
        density: share of active experts to expect, by default what each router was calibrated to.

    Raises:
        ValueError: a model without routers, another device, a number of tokens below 1, or a density outside [0, 1].
    """
    require_routers(model)
    check_density(density)
    if device not in (None, *DEVICES):
        raise ValueError(f"device must be {' or '.join(map(repr, DEVICES))}; got {device!r}")
    if wrong := [count for count in tokens if count < 1]:
        raise ValueError(f"tokens must be at least 1; got {wrong[0]}")
    asked: dict[str, Any] = {
        "device": device or next(model.parameters()).device.type,
        "dtype": dtype,
        "density": density,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    found: list[KernelOfSite] = []
    with torch.no_grad(), in_stage(model, Stage.HARD):
        for captured in map(copy_captured, capture_all(model, example_inputs)):
            found += _left_alone(captured, tokens) if level_of(captured) is Level.ROUTED else []
            for node in captured.module.graph.nodes:
                if is_lte(node, "sparse_ffn"):
                    found += _served(captured, node, tokens, changes)
    return tuple(found)


def _left_alone(captured: CapturedGraph, tokens: Sequence[int]) -> list[KernelOfSite]:
    """Lowers the graph; the FFNs that a pass could not lower, with its reason."""
    reasons: dict[str, dict[str, str]] = {}
    for report in run_pipeline(captured, (FuseExperts(), LowerSparse())):
        for refusal in report.refusals:
            reasons.setdefault(refusal.parameter or refusal.node, {}).setdefault(report.name, refusal.reason)
    return [KernelOfSite(site, count, None, REFERENCE_FORM, why) for site, why in reasons.items() for count in tokens]


def _served(
    captured: CapturedGraph, node: fx.Node, tokens: Sequence[int], changes: Mapping[str, Any]
) -> list[KernelOfSite]:
    request = describe(_fake_call(node))._replace(**changes)
    return [_chosen(_site_name(captured, node), request._replace(tokens=count)) for count in tokens]


def _chosen(site: str, request: Request) -> KernelOfSite:
    choice = choose(request)
    return KernelOfSite(site, request.tokens, request.density, choice.lowering.name, choice.refusals)


def _site_name(captured: CapturedGraph, node: fx.Node) -> str:
    source = arguments(node)["w_down"]
    while source.name not in captured.parameters and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return captured.parameters.get(source.name, node.name)


def _fake_call(node: fx.Node) -> SparseFfnCall:
    """The call that the node makes, with tensors that have sizes and strides but no values."""
    given = {name: _value(argument) for name, argument in arguments(node).items()}
    return SparseFfnCall(
        given["x"],
        given["w_router"],
        given["b_router"],
        FfnWeights(*(given[name] for name in _WEIGHTS)),
        given["activation"],
        given["expert_size"],
        given["tau"],
        given["expert_offsets"],
        tuple(given["constants"] or ()),
        given["density"],
        given["x_router"],
    )


def _value(argument: Any) -> Any:
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return [_value(item) for item in argument]
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    assert not isinstance(argument, fx.Node) or isinstance(value, Tensor), argument
    return value
