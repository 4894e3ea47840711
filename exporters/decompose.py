"""Which `lte` ops of a program stay nodes of the ONNX graph, and the standard operators that the others become.

Only `lte::sparse_ffn` has an ONNX operator. Everything else (a soft or dense stage, another selection rule, an FFN that
no pass could fuse) is replaced by the torch reference of the op before translation, so every stage exports.
Shape suffixes: F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.fx as fx
from torch import Tensor
from torch._ops import OpOverload

from lte_compile.kernels.expert_ffn import expert_ffn_reference
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.gate_hidden import gate_hidden_reference
from lte_compile.kernels.program import is_program
from lte_compile.kernels.route import route_reference
from lte_compile.kernels.selection import select_reference
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from lte_compile.passes.anchors import arguments, computed_value, is_lte
from lte_compile.passes.ir import Rejection

lte = torch.ops.lte  # passes.anchors registers the ops
SPARSE_FFN: Final[OpOverload] = lte.sparse_ffn.default

# What the ONNX schema's type variable allows.
NODE_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def why_not_a_node(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor | None,
    w_up: Tensor,
    activation: str,
    expert_offsets: Tensor | None,
    x_router: Tensor | None,
) -> str | None:
    """Why a `lte::sparse_ffn` call cannot be one `SparseFFN` node, or None when it can."""
    if is_program(activation):
        return "its hidden region is a program, and SparseFFN knows named activations only"
    if expert_offsets is not None:
        return "experts of unequal sizes have no ONNX operator"
    if x.dtype not in NODE_DTYPES:
        return f"{x.dtype} has no ONNX operator; export in float32, float16 or bfloat16"
    if x_router is not None and x_router.dtype != x.dtype:
        return f"input is {x.dtype} but the router reads {x_router.dtype}; give the model one dtype"
    others = [t.dtype for t in (w_router, b_router, w_up) if t is not None and t.dtype != x.dtype]
    if others:
        return f"input is {x.dtype} but a weight is {others[0]}; give the model one dtype"
    return None


def _sparse_ffn(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor | None,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    tau: float,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
    x_router: Tensor | None = None,
) -> Any:
    if why_not_a_node(x, w_router, b_router, w_up, activation, expert_offsets, x_router) is None:
        return NotImplemented  # torch's way to say: keep the op
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    given = tuple(constants or ())
    call = SparseFfnCall(x, w_router, b_router, weights, activation, expert_size, tau, expert_offsets, given)
    return sparse_ffn_reference(call._replace(router_x_C=x_router))


def _expert_ffn(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    return expert_ffn_reference(x, gates, weights, activation, expert_size, expert_offsets, constants or ())


def _gate_hidden(hidden: Tensor, gates: Tensor, expert_size: int, expert_offsets: Tensor | None = None) -> Tensor:
    return gate_hidden_reference(hidden, gates, expert_size, expert_offsets)


def _select(scores: Tensor, rule: str, tau: float, density: float | None = None) -> Tensor:
    return select_reference(scores, rule, tau)


DECOMPOSITIONS: Final[Mapping[OpOverload, Callable[..., Any]]] = {
    lte.route.default: route_reference,
    lte.select.default: _select,
    lte.gate_hidden.default: _gate_hidden,
    lte.expert_ffn.default: _expert_ffn,
    SPARSE_FFN: _sparse_ffn,
}


def to_standard_ops(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` with no `lte` op left but those `lte::sparse_ffn` calls that become nodes."""
    if not any(is_lte(node) and not _is_kept(node) for node in program.graph.nodes):
        return program  # decomposing traces the program anew, which takes as long as the export itself
    decomposed: torch.export.ExportedProgram = program.run_decompositions(dict(DECOMPOSITIONS))
    return decomposed


def _is_kept(node: fx.Node) -> bool:
    return is_lte(node, "sparse_ffn") and _why_masked(node) is None


def find_masked_dense(
    program: torch.export.ExportedProgram, refusals: Sequence[Rejection] = ()
) -> tuple[Rejection, ...]:
    """The routed FFNs that will be written as dense FFNs with a mask, each with the reason.

    What a pass gave as its reason for the same node or weight says more and wins; the earliest pass first.
    """
    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = []
    for node in program.graph.nodes:
        reason = _why_masked(node)
        if reason is not None:
            parameter = _down_weight(node, parameters)
            given = (r.reason for r in refusals if r.node == node.name or (parameter and r.parameter == parameter))
            found.append(Rejection(node=node.name, parameter=parameter, reason=next(given, reason)))
    return tuple(found)


_NODE_ARGUMENTS = ("x", "w_router", "b_router", "w_up", "activation", "expert_offsets", "x_router")


def _why_masked(node: fx.Node) -> str | None:
    """Why `node` is a routed FFN without an operator of its own; None for every other node."""
    if is_lte(node, "sparse_ffn"):
        given = {name: _value(argument) for name, argument in arguments(node).items()}
        return why_not_a_node(*(given[name] for name in _NODE_ARGUMENTS))
    if not is_lte(node, "expert_ffn", "gate_hidden"):
        return None
    select = computed_value(arguments(node)["gates"])
    rule = arguments(select)["rule"] if is_lte(select, "select") else "threshold"
    if rule != "threshold":
        return f"gates come from selection rule {rule!r}; SparseFFN knows 'threshold' only"
    return "router, selection and FFN were not fused into one op"


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _down_weight(node: fx.Node, parameters: Mapping[str, str]) -> str | None:
    """Name of the down-projection's weight, if it is a parameter of the program."""
    if is_lte(node, "gate_hidden"):
        return _first_weight_after(node, parameters)
    return parameters.get(computed_value(arguments(node)["w_down"]).name)


def _first_weight_after(anchor: fx.Node, parameters: Mapping[str, str]) -> str | None:
    """The parameter that the first node downstream with one reads."""
    pending = list(anchor.users)
    while pending:
        user = pending.pop(0)
        names = [parameters.get(computed_value(source).name) for source in user.all_input_nodes]
        if found := [name for name in names if name is not None]:
            return found[0]
        pending += user.users
    return None
