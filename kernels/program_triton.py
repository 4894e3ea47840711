"""Region programs compiled to Triton: a program's text becomes a @triton.jit function that a kernel calls.

The function's source is written from the checked program, never from its text, so that it holds nothing but the table's
expressions, numbers and names of this module. It lives in memory, in `linecache`, where Triton reads it like a file's.
"""

from __future__ import annotations

import linecache
import struct
from functools import lru_cache
from hashlib import sha256
from typing import Any

import triton
import triton.language as tl

from lte_compile.kernels import triton_math
from lte_compile.kernels.program import Instruction, Operand, Program, find_op, parse_program


@lru_cache(maxsize=1024)
def generated_kernel(text: str) -> Any:
    """`hidden(up, gate, constants, neuron, exists)` of a program, for blocks of neurons in fp32; one per text."""
    return compiled(triton_source(parse_program(text)), "hidden")


def compiled(source: str, function: str) -> Any:
    """A function of a source that was written from a checked program."""
    name = f"<lte region program {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"triton": triton, "tl": tl, "__name__": __name__}
    namespace |= {helper: getattr(triton_math, helper) for helper in ("expm1", "log1p", "tanh")}
    exec(compile(source, name, "exec"), namespace)  # made from a checked program, see above
    return namespace[function]


def triton_source(program: Program) -> str:
    """The function as text: loads of the constants, a line an instruction, the last one's value returned."""
    head = ["@triton.jit", "def hidden(up, gate, constants, neuron, exists):"]
    return "\n".join([*head, *loads(program), *statements(program), f"    return v{len(program.instructions) - 1}", ""])


def loads(program: Program) -> list[str]:
    """Lines that load the constants."""
    lines = []
    for index, name in enumerate(program.constant_names):
        place = f"constants[{index}] + neuron, mask=exists, other=0.0" if name[0] == "n" else f"constants[{index}]"
        lines.append(f"    {name} = tl.load({place}).to(tl.float32)")
    return lines


def statements(program: Program) -> list[str]:
    """A line an instruction."""
    return [f"    v{i} = {_expression(instruction)}" for i, instruction in enumerate(program.instructions)]


def _expression(instruction: Instruction) -> str:
    return find_op(instruction.op).triton.format(*map(_operand, instruction.operands))


def _operand(operand: Operand) -> str:
    return operand if isinstance(operand, str) else number(operand)


def number(value: float) -> str:
    """A number as fp32, as text."""
    single = _single_precision(value)
    return f"({single!r})" if abs(single) < float("inf") else f'float("{single}")'


def _single_precision(number: float) -> float:
    """The fp32 number nearest to it: Triton would compute in fp64 with one that fp32 cannot hold."""
    try:
        (single,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")
    return float(single) if abs(single) >= 2.0**-126 else 0.0  # subnormals: Triton takes those for fp64 numbers
