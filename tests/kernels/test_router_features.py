"""lte::router_features: the op on CPUs, and its kernel and those of small layers, interpreted and compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.router_features import features_reference
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE, relative_error

pytest.importorskip("triton")
from tests.kernels import interpreted_decode, interpreted_decode_small
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

features = torch.ops.lte.router_features


def arguments(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 7), (5, 7), (5,))
    return tuple(torch.randn(size, generator=draw, dtype=dtype).requires_grad_() for size in sizes)


def test_the_op_is_sound() -> None:
    torch.library.opcheck(features.default, arguments())
    assert torch.autograd.gradcheck(features, arguments())


def test_it_joins_x_and_its_features() -> None:
    assert torch.equal(features(*arguments()), features_reference(*arguments()))


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        (((3, 7), (5, 8), (5,)), "[3, 7], [5, 8] and [5]"),
        (((3, 7), (5, 7), (4,)), "[3, 7], [5, 7] and [4]"),
        (((), (5, 7), (5,)), "[], [5, 7] and [5]"),
    ],
)
def test_wrong_shapes_are_named(sizes: tuple[tuple[int, ...], ...], shapes: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"bias [R]; got shapes {shapes}")):
        features(*map(torch.randn, sizes))


def test_two_dtypes_are_refused() -> None:
    x, weight, bias = arguments()
    with pytest.raises(ValueError, match="needs one floating dtype"):
        features(x.float(), weight, bias)
    with pytest.raises(ValueError, match=r"needs one floating dtype; got torch\.int64"):
        features(*(tensor.long() for tensor in (x, weight, bias)))


def test_autocast_leaves_it_alone() -> None:
    given = arguments(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = features(*given)
    assert torch.equal(actual, features(*given))


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_decode_small")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernels_match_float64(interpreted_errors: dict[str, float], dtype: torch.dtype) -> None:
    cases = [f"{shape}, {dtype}, {form}" for shape in interpreted_decode.SHAPES for form in ("gated", "plain")]
    cases += [f"program {name}, {dtype}" for name in PROGRAMS]
    cases += [f"features {name}, {dtype}" for name in interpreted_decode_small.FEATURES]
    assert {case: interpreted_errors[case] for case in cases if interpreted_errors[case] >= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize(
    "case",
    [*ACTIVATIONS, "all active", "none active", "interleaved halves", "router input narrower", "router input wider"],
)
def test_interpreted_activations_and_extremes_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


TYPES = {
    **dict.fromkeys(("x_ptr", "router_x_ptr", "router_ptr", "up_ptr", "gate_ptr", "up_bias_ptr"), "*bf16"),
    **dict.fromkeys(("gate_bias_ptr", "weight_ptr", "bias_ptr", "joined_ptr", "down_ptr", "down_bias_ptr"), "*bf16"),
    **dict.fromkeys(("hidden_ptr", "router_bias_ptr"), "*fp32"),
    "y_ptr": "*bf16",
    "constants": (),
    "tau": "fp32",
    "F": "i32",
}
WIDE: dict[str, Any] = {"D": 576, "WIDTH": 1024, "ROUTER_D": 720, "ROUTER_WIDTH": 1024, "ROW_STRIDE": 576}
WIDE |= {"BIAS_STRIDE": 1, "EXPERT_SIZE": 4, "IS_PROGRAM": False}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("gated", [True, False])
def test_kernels_compile_without_spills(gated: bool, capability: int) -> None:
    from lte_compile.kernels import decode_small_kernels as kernels
    from lte_compile.kernels.triton_decode_small import SmallConfig

    config, dependent = SmallConfig(), {"DEPENDENT": 2 if capability >= 90 else 0}
    missing = ("up_bias_ptr", "gate_bias_ptr") if gated else ("gate_ptr", "gate_bias_ptr")
    up = WIDE | {**dict.fromkeys(missing), "ACTIVATION": "silu" if gated else "gelu"}
    down = {"D": 576, "ROWS": config.down_rows, "STEPS": config.down_steps, "BLOCK": config.down_block}
    for kernel, constants, warps in (
        (kernels.route_hidden, up, 1),
        (kernels.project_hidden, down, config.down_warps),
        (kernels.append_features, {"D": 576, "WIDTH": 1024}, 1),
    ):
        ptx = compile_ptx(kernel, TYPES, constants | dependent, capability, warps)
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
        assert spilled_bytes(ptx, capability) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("leading", "width", "rank"), [((1, 1), 576, 144), ((1,), 37, 5), ((2, 3), 37, 5)])
def test_features_on_a_gpu(leading: tuple[int, ...], width: int, rank: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=draw).to(dtype) for s in ((*leading, width), (rank, width), (rank,)))
    expected = features_reference(x.double(), weight.double(), bias.double())
    assert relative_error(features(x.cuda(), weight.cuda(), bias.cuda()).cpu(), expected) < TOLERANCE[dtype]
