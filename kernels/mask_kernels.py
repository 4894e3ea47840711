# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernel between the library's dense products; lte_compile.kernels.masked_dense says how it is used.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself;
"finished" where `up` holds hidden values already, so that only zeros are written.

Shape suffixes: T tokens, F neurons, E experts of a tile, S neurons of one expert.
Interpretable (no inline assembly), Triton 3.6 and later.
"""

import triton
import triton.language as tl

from lte_compile.kernels.decode_kernels import hidden_of
from lte_compile.kernels.token_lists import selects, sum_of_parts


@triton.jit
def mask_hidden(
    logits_ptr,
    router_bias_ptr,
    up_ptr,
    gate_ptr,
    constants,
    hidden_ptr,
    tau,
    tokens,
    F,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    NEURONS: tl.constexpr,
    FROM_END: tl.constexpr,
):
    """Hidden values of up and gate [T, F], zero where the token did not select the expert.

    Those are read all the same: else reading would wait for the scores. A program takes a tile [E, S] of one token:
    experts, and neurons of each, padded to a power of two.
    """
    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    tiles: tl.constexpr = (EXPERTS + BLOCK_EXPERTS - 1) // BLOCK_EXPERTS * parts
    token = (tl.program_id(0) // tiles).to(tl.int64)
    if FROM_END:
        token = tokens - 1 - token
    tile = tl.program_id(0) % tiles
    expert_E = (tile // parts) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    in_expert_S = (tile % parts) * NEURONS + tl.arange(0, NEURONS)
    exists_E = expert_E < EXPERTS
    logit_E = sum_of_parts(logits_ptr, token * EXPERTS + expert_E, tokens * EXPERTS, exists_E, PARTS)
    selects_E = selects(logit_E, router_bias_ptr, expert_E, exists_E, tau, True)
    neuron_ES = expert_E[:, None] * EXPERT_SIZE + in_expert_S[None, :]
    exists_ES = neuron_ES < F
    if EXPERT_SIZE % NEURONS != 0:
        exists_ES = exists_ES & (in_expert_S < EXPERT_SIZE)[None, :]
    place_ES = token * F + neuron_ES
    half: tl.constexpr = hidden_ptr.dtype.element_ty
    if ACTIVATION == "finished":
        zero_ES = tl.zeros([BLOCK_EXPERTS, NEURONS], half)
        tl.store(hidden_ptr + place_ES, zero_ES, mask=exists_ES & (selects_E[:, None] == 0))
    else:
        up_ES = tl.load(up_ptr + place_ES, mask=exists_ES, other=0.0).to(tl.float32)
        gate_ES = up_ES
        if gate_ptr is not None:
            gate_ES = tl.load(gate_ptr + place_ES, mask=exists_ES, other=0.0).to(tl.float32)
        gated: tl.constexpr = gate_ptr is not None
        hidden_ES = hidden_of(up_ES, gate_ES, constants, neuron_ES, exists_ES, ACTIVATION, IS_PROGRAM, gated)
        tl.store(hidden_ptr + place_ES, tl.where(selects_E[:, None], hidden_ES, 0.0).to(half), mask=exists_ES)
