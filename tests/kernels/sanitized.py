"""Every GPU kernel once on awkward shapes, for NVIDIA's checkers; prints what ran.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.sanitized
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitized [triton-whole ...]

With names of FOR_LARGE_LAYERS only those run.

Without torch's caching allocator every tensor is an allocation of its own, so that one read past its end is found.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from itertools import product

import torch

from lte_compile.kernels.lowering import choose, describe
from lte_compile.kernels.masked_dense import MaskConfig, sparse_ffn_masked_dense
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from lte_compile.kernels.triton_batch import sparse_ffn_batch
from lte_compile.kernels.triton_decode import sparse_ffn_two_launches
from lte_compile.kernels.triton_decode_whole import sparse_ffn_decode_whole
from lte_compile.kernels.triton_prefill import sparse_ffn_prefill
from tests.kernels.interpreted import Kernel
from tests.kernels.problems import Shape, in_float64, make_call, make_weights, relative_error, run_op
from tests.kernels.test_gpu import on_gpu

# (tokens, density to expect): with FOR_LARGE_LAYERS they reach every row of the table that a GPU has.
CALLS = [(1, None), (1, 1.0), (5, None), (33, 1.0), (100, None), (300, 0.1)]
# Rows that the table takes for large layers only.
FOR_LARGE_LAYERS: dict[str, tuple[int, Kernel]] = {
    "triton-whole": (1, sparse_ffn_decode_whole),
    "two launches": (1, sparse_ffn_two_launches),
    "triton-batch": (5, sparse_ffn_batch),
    "triton-prefill": (300, sparse_ffn_prefill),
    "masked-dense": (300, sparse_ffn_masked_dense),
    "chunked-dense": (300, partial(sparse_ffn_masked_dense, config=MaskConfig(chunk=128))),
}
SIZES = [(37, 61, 12), (64, 96, 32), (8, 11, 1)]  # width, neurons, expert size
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(call: SparseFfnCall) -> str:
    """The lowering that served the call; an AssertionError if its result is wrong."""
    error = relative_error(run_op(call), sparse_ffn_reference(in_float64(call)))
    name = choose(describe(call)).lowering.name
    assert error <= TOLERANCE[call.weights.up_FD.dtype], (name, call.x_D.shape, error)
    return name


def train(shape: Shape, dtype: torch.dtype, density: float | None = None) -> None:
    """Forward and backward of lte::expert_ffn; with a density, gates select so many experts and are not trained."""
    weights = [None if t is None else t.cuda().requires_grad_() for t in make_weights(shape, gated=True, biases=True)]
    weights = [None if t is None else t.detach().to(dtype).requires_grad_() for t in weights]
    x = torch.randn(*shape.tokens, shape.width, device="cuda", dtype=dtype, requires_grad=True)
    gates = torch.rand(*shape.tokens, shape.experts, device="cuda", requires_grad=density is None)
    gates = gates if density is None else (gates < density).float()
    y = torch.ops.lte.expert_ffn(x, gates, *weights, "silu", shape.expert_size, density=density)
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def every_row(served: Counter[str]) -> None:
    """Through the table, and training."""
    for (tokens, density), (width, neurons, size), dtype in product(CALLS, SIZES, DTYPES):
        shape = Shape((tokens,), width, neurons, size)
        for gated, tau in ((True, 0.5), (False, 0.0), (True, 1.0)):  # some, all and no experts active
            served[check(on_gpu(make_call(shape, gated=gated, dtype=dtype, tau=tau))._replace(density=density))] += 1
        train(shape, dtype)
    for width, neurons, size in SIZES:
        train(Shape((1030,), width, neurons, size), torch.bfloat16, density=0.2)


def main() -> int:
    names = sys.argv[1:]
    torch.manual_seed(0)
    served: Counter[str] = Counter()
    if not names:
        every_row(served)
    direct = {name: row for name, row in FOR_LARGE_LAYERS.items() if not names or name in names}
    for (name, (tokens, kernel)), (width, neurons, size), dtype in product(direct.items(), SIZES, DTYPES):
        call = on_gpu(make_call(Shape((tokens,), width, neurons, size), dtype=dtype))
        error = relative_error(kernel(call), sparse_ffn_reference(in_float64(call)))
        assert error <= TOLERANCE[dtype], (name, error)
        served[name] += 1
    torch.cuda.synchronize()
    sys.stdout.write(f"{dict(served)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
