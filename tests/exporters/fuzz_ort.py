"""Random `SparseFFN` nodes and inputs, valid and not, for a library built with sanitizers.

Nothing but a right answer or an error that names the node will do.

    python -m tests.exporters.fuzz_ort LIBRARY --seeds 0 500

The library's sanitizers have to be loaded before Python (tests/exporters/test_ort_fuzz.py does that). Every seed is
announced on stdout before it runs, so that the last line of a crash names it; `--seeds N N+1` repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort

from lte_compile.exporters.function import ACTIVATION_BODIES
from tests.exporters.single_node import DTYPES, NODE, Array, Case, exact_in_bfloat16, make_model, reference, run
from tests.exporters.test_function import sigmoid

SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
BIASES = ("b_router", "b_up", "b_gate", "b_down")
SPECIAL_VALUES = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 65504.0)
BAD_ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "activation": ("", "xielu", 1, 0.5, None, "relu\0gelu"),
    "expert_size": (0, -1, -(2**63), 2**63 - 1, 2**31, 1.5, "4", None),
    "gated": (0, 1, 2, -1, 0.0, None),
    "threshold": (float("nan"), float("inf"), -float("inf"), 3, "0.5", None),
}
# float32, and one or two roundings to the element type of values whose largest is 1
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}


def draw_case(draw: random.Random) -> Case:
    return Case(
        dtype=draw.choice(tuple(DTYPES)),
        activation=draw.choice(sorted(ACTIVATION_BODIES)),
        width=draw.choice((0, *SIZES)),
        neurons=draw.choice((0, *SIZES)),
        expert_size=draw.choice((*SIZES, 2**62)),
        gated=draw.random() < 0.5,
        biases=tuple(name for name in BIASES if draw.random() < 0.5),
        threshold=draw.choice((0.5, 0.5, draw.random(), -1.0, 0.0, 1.0, 2.0)),
        router_width=draw.choice((None, None, *SIZES)),
    )


def draw_tokens(draw: random.Random) -> tuple[int, ...]:
    if draw.random() < 0.1:
        return (draw.randint(250, 600),)
    if draw.random() < 0.2:
        return (draw.randint(16, 100),)
    return tuple(draw.choice((0, 1, 1, 2, 3, 5, 9)) for _ in range(draw.randint(0, 4)))


def spoil_shape(draw: random.Random, case: Case, arrays: dict[str, Array]) -> Case:
    name = draw.choice(tuple(arrays))
    shape = list(arrays[name].shape)
    if draw.random() < 0.5 and shape:
        axis = draw.randrange(len(shape))
        shape[axis] = max(0, shape[axis] + draw.choice((-1, 1, 7)))
    else:
        shape = [draw.choice((0, 1, 4, 33)) for _ in range(draw.randint(0, 4))]
    arrays[name] = np.ones(shape, np.float32)
    return case


def spoil_attribute(draw: random.Random, case: Case, arrays: dict[str, Array]) -> Case:
    name = draw.choice(tuple(BAD_ATTRIBUTES))
    return replace(case, attributes={name: draw.choice(BAD_ATTRIBUTES[name])})


def spoil_size(draw: random.Random, case: Case, arrays: dict[str, Array]) -> Case:
    """The attribute says another number of experts than the router has, most often."""
    return replace(case, attributes={"expert_size": draw.choice(SIZES)})


def spoil_values(draw: random.Random, case: Case, arrays: dict[str, Array]) -> Case:
    for array in arrays.values():
        if array.size and draw.random() < 0.5:
            array.reshape(-1)[draw.randrange(array.size)] = draw.choice(SPECIAL_VALUES)
    return case


Spoil = Callable[[random.Random, Case, dict[str, Array]], Case]
SPOILS: tuple[Spoil, ...] = (spoil_shape, spoil_shape, spoil_attribute, spoil_size, spoil_values)


def is_settled(case: Case, arrays: dict[str, Array]) -> bool:
    """No score so close to the threshold that float32 and float64 may disagree on it."""
    x, w_router = arrays.get("x_router", arrays["x"]).astype(np.float64), arrays["w_router"].astype(np.float64)
    scores = sigmoid(x @ w_router.T + arrays.get("b_router", 0.0))
    return bool((np.abs(scores - case.threshold) > 1e-5).all())


def attempt(seed: int, library: str, instruction_sets: tuple[str, ...]) -> None:
    draw = random.Random(seed)
    case, tokens = draw_case(draw), draw_tokens(draw)
    arrays = case.arrays(*tokens, seed=seed)
    if "b_router" in arrays:  # few experts or most
        arrays["b_router"] = exact_in_bfloat16(arrays["b_router"] + draw.choice((-2, 0, 3)))
    is_valid = draw.random() < 0.4
    wanted = reference(case, arrays) if is_valid and is_settled(case, arrays) else None
    if not is_valid:
        case = draw.choice(SPOILS)(draw, case, arrays)
    os.environ["LTE_ORT_SIMD"] = draw.choice(instruction_sets)
    try:
        y = run(open_session(case, library, draw.randint(1, 3)), arrays, case.dtype)
    except Exception as error:
        if is_valid or NODE not in str(error):
            raise
        return
    check(y, arrays["x"].shape, wanted, TOLERANCE[case.dtype])


def open_session(case: Case, library: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # an allocation for each tensor: what lies beyond it is guarded
    options.register_custom_ops_library(library)
    return ort.InferenceSession(make_model(case), options, providers=["CPUExecutionProvider"])


def check(y: Array, shape: tuple[int, ...], wanted: Array | None, tolerance: float) -> None:
    if y.shape != shape:
        raise AssertionError(f"y has shape {y.shape}; x has {shape}")
    if wanted is not None:
        scale = np.abs(wanted).max(initial=1.0)
        np.testing.assert_allclose(y / scale, wanted / scale, atol=tolerance, rtol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), default=(0, 500))
    parser.add_argument("--instruction-sets", nargs="+", default=["portable"])
    arguments = parser.parse_args()
    np.seterr(all="ignore")  # the reference overflows where the library may
    for seed in range(*arguments.seeds):
        sys.stdout.write(f"seed {seed}\n")
        sys.stdout.flush()
        attempt(seed, arguments.library, tuple(arguments.instruction_sets))
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
