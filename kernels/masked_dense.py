"""lte::sparse_ffn by dense products: what serves best when skipping does not pay.

The projections are the library's; one kernel between them computes the hidden value and sets it to zero where a token
did not select the expert. Where the library computes hidden values with a product (some activations of plain FFNs with
biases), that kernel only clears. Router and up may run on streams of their own, beside gate, which fills what the last
waves of tiles leave of the device. Many tokens of a large layer go through in chunks, on two streams in turn: while one
chunk is between its products, the other multiplies. No host sync; one CUDA graph serves every mask.
Shape suffixes: S parts of the router's sums, T tokens, D model width, C columns the router reads, F neurons, E experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lte_compile.kernels.many_tokens import HALVES, beside, on_lane, rejoin, router_parts, router_product
from lte_compile.kernels.mask_kernels import mask_hidden
from lte_compile.kernels.program import is_program
from lte_compile.kernels.program_triton import generated_kernel
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import tokens_of

ROUTER_LANE, UP_LANE, CHUNK_LANE = 0, 1, 2
# Activations that cuBLASLt applies to a product with a bias before it rounds; whether it is its GELU.
FINISHED_BY_PRODUCTS = {"relu": False, "gelu_tanh": True}


class RouterPlace(StrEnum):
    """When the router's product runs."""

    BEFORE_GATE = "before_gate"
    BESIDE = "beside"  # on a stream of its own
    BEHIND_UP = "behind_up"  # on up's stream, so that its programs come last


@dataclass(frozen=True)
class MaskConfig:
    """Elements (a power of two) and warps of a program of the kernel between the projections; how work is laid out."""

    elements: int = 2048
    warps: int = 8
    from_end: bool = True  # that kernel starts with the last token
    in_gate: bool = False  # it leaves hidden values in gate's place, not in up's
    router: RouterPlace = RouterPlace.BESIDE
    up_beside: bool = True
    parts: int | None = None  # of the router's sums, where its width can be cut; None: as `router_parts` says
    finishes: bool = False  # products compute hidden values where they can
    chunk: int | None = None  # tokens


# By the first number of tokens. The fastest of 13 to 23 ways for 4096 x 11008 (one H100, docs/kernels.md).
_FORWARD = MaskConfig(elements=1024, warps=4, from_end=False, in_gate=True)
_CHUNKED = replace(_FORWARD, router=RouterPlace.BEFORE_GATE, up_beside=False, parts=2, chunk=1024)
LARGE_LAYER = {
    8192: replace(_CHUNKED, parts=1),
    2048: _CHUNKED,
    1024: replace(_FORWARD, from_end=True, parts=2),
    512: replace(_FORWARD, router=RouterPlace.BEHIND_UP, parts=4),
}
LARGE_LAYER_BYTES = 100e6  # LLaMA-2-7B's layer has 270 MB, 1024 x 2816 17 MB
# GPT-2's layer, and 1024 x 2816 with 2048 tokens: the fastest of 13 to 16 ways.
PLAIN_LAYER = {512: MaskConfig(router=RouterPlace.BEFORE_GATE, up_beside=False, finishes=True)}
GATED_LAYER = {8192: MaskConfig(), 2048: replace(_FORWARD, parts=2)}


def default_config(call: SparseFfnCall) -> MaskConfig:
    """For a layer and a number of tokens."""
    small = PLAIN_LAYER if call.weights.gate_FD is None else GATED_LAYER
    configs = LARGE_LAYER if call.weights.nbytes >= LARGE_LAYER_BYTES else small
    tokens = len(tokens_of(call.x_D))
    return next((config for first, config in configs.items() if tokens >= first), MaskConfig())


class _Scratch(NamedTuple):
    """Memory of one chunk: the first rows of `up_TF` and `gate_TF`, and as much of `logits` as its parts need."""

    logits: Tensor
    up_TF: Tensor
    gate_TF: Tensor | None

    def of(self, tokens: int, parts: int, experts: int) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_STE = self.logits[: parts * tokens * experts].view(parts, tokens, experts)
        return logits_STE, self.up_TF[:tokens], None if self.gate_TF is None else self.gate_TF[:tokens]


def sparse_ffn_masked_dense(call: SparseFfnCall, config: MaskConfig | None = None) -> Tensor:
    """Any number of tokens, experts of one size; only the last may be smaller."""
    config = config or default_config(call)
    x_TD = tokens_of(call.x_D)
    tokens, out_width = len(x_TD), call.weights.down_DF.shape[0]
    chunks = triton.cdiv(tokens, config.chunk) if config.chunk else 1
    step = tokens if chunks <= 1 else 128 * triton.cdiv(tokens, 128 * chunks)  # whole tiles of the library's products
    parts = _parts(call, step, config)
    scratch = [_scratch(call, step, parts) for _ in range(min(chunks, 2) or 1)]
    wide_TD, router_x_TC = x_TD.to(call.weights.up_FD.dtype), tokens_of(call.router_input)
    y_TD = torch.empty(tokens, out_width, dtype=wide_TD.dtype, device=x_TD.device)
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        if len(scratch) == 2:
            with beside(x_TD, CHUNK_LANE):
                pass  # the second stream goes on from here
        for index, first in enumerate(range(0, tokens, max(1, step))):
            rows = slice(first, min(first + step, tokens))
            with on_lane(x_TD, CHUNK_LANE) if index % 2 else nullcontext():
                _run_chunk(call, wide_TD[rows], router_x_TC[rows], y_TD[rows], scratch[index % 2], parts, config)
        if len(scratch) == 2:
            rejoin(x_TD, CHUNK_LANE)
    return y_TD.view(*call.x_D.shape[:-1], out_width)


def _parts(call: SparseFfnCall, tokens: int, config: MaskConfig) -> int:
    width = call.router_ED.shape[1]
    return config.parts if config.parts and width % 64 == 0 else router_parts(tokens, width)


def _scratch(call: SparseFfnCall, tokens: int, parts: int) -> _Scratch:
    up_FD, gate_FD, *_ = call.weights
    logits = torch.empty(parts * tokens * len(call.router_ED), dtype=torch.float32, device=up_FD.device)
    up_TF = torch.empty(tokens, len(up_FD), dtype=up_FD.dtype, device=up_FD.device)
    return _Scratch(logits, up_TF, None if gate_FD is None else torch.empty_like(up_TF))


def _run_chunk(
    call: SparseFfnCall,
    x_TD: Tensor,
    router_x_TC: Tensor,
    y_TD: Tensor,
    scratch: _Scratch,
    parts: int,
    config: MaskConfig,
) -> None:
    """The outputs of some tokens, on the current stream and those beside it."""
    weights, finished = call.weights, config.finishes and can_finish(call)
    logits_STE, up_TF, gate_TF = scratch.of(len(x_TD), parts, len(call.router_ED))
    with _lane(x_TD, UP_LANE, config.up_beside):
        _project(x_TD, weights.up_FD, weights.up_bias_F, up_TF, call.activation if finished else None)
        if config.router is RouterPlace.BEHIND_UP:
            router_product(router_x_TC, call.router_ED, logits_STE)
    router_beside = config.router is RouterPlace.BESIDE
    if config.router is not RouterPlace.BEHIND_UP:
        with _lane(x_TD, ROUTER_LANE, router_beside):
            router_product(router_x_TC, call.router_ED, logits_STE)
    if weights.gate_FD is not None and gate_TF is not None:
        _project(x_TD, weights.gate_FD, weights.gate_bias_F, gate_TF)
    for lane, is_beside in ((UP_LANE, config.up_beside), (ROUTER_LANE, router_beside)):
        if is_beside:
            rejoin(x_TD, lane)
    hidden_TF = gate_TF if config.in_gate and gate_TF is not None else up_TF
    _mask_hidden(call, logits_STE, up_TF, gate_TF, hidden_TF, config, finished)
    _project(hidden_TF, weights.down_DF, weights.down_bias_D, y_TD)


def _lane(x_TD: Tensor, lane: int, is_beside: bool) -> AbstractContextManager[None]:
    return beside(x_TD, lane) if is_beside else nullcontext()


def can_finish(call: SparseFfnCall) -> bool:
    """Whether the library's product can compute hidden values."""
    weights = call.weights
    is_plain = weights.gate_FD is None and weights.up_bias_F is not None
    return is_plain and weights.up_FD.dtype in HALVES and call.activation in FINISHED_BY_PRODUCTS


def _project(
    x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, out_TF: Tensor, activation: str | None = None
) -> None:
    if bias_F is None:
        torch.mm(x_TD, weight_FD.t(), out=out_TF)
    elif activation is None:
        torch.addmm(bias_F, x_TD, weight_FD.t(), out=out_TF)
    else:
        gelu = FINISHED_BY_PRODUCTS[activation]
        torch.ops.aten._addmm_activation.out(bias_F, x_TD, weight_FD.t(), use_gelu=gelu, out=out_TF)


def _mask_hidden(
    call: SparseFfnCall,
    logits_STE: Tensor,
    up_TF: Tensor,
    gate_TF: Tensor | None,
    hidden_TF: Tensor,
    config: MaskConfig,
    finished: bool,
) -> None:
    """Hidden values in the place of `up_TF` or `gate_TF`: the thread that reads a value writes it."""
    (tokens, neurons), (parts, _, experts) = up_TF.shape, logits_STE.shape
    activation, is_text = call.activation, is_program(call.activation)
    size = min(int(triton.next_power_of_2(call.expert_size)), config.elements)
    block_experts = max(1, config.elements // size)
    tiles = triton.cdiv(experts, block_experts) * triton.cdiv(call.expert_size, size)
    mask_hidden[(tokens * tiles,)](
        logits_STE,
        call.router_bias_E,
        up_TF,
        gate_TF,
        call.constants,
        hidden_TF,
        call.tau,
        tokens,
        neurons,
        PARTS=parts,
        EXPERTS=experts,
        EXPERT_SIZE=call.expert_size,
        ACTIVATION="finished" if finished else generated_kernel(activation) if is_text else activation,
        IS_PROGRAM=is_text,
        BLOCK_EXPERTS=block_experts,
        NEURONS=size,
        FROM_END=config.from_end,
        num_warps=config.warps,
    )
