"""Region programs: the element-wise function between an FFN's projections, as text that can be checked, run, compiled.

    v0 = clamp_max(gate, 7.0); v1 = mul(v0, 1.702); v2 = sigmoid(v1); v3 = mul(v0, v2); v4 = mul(v3, up)

One operation of lte_compile.kernels.pointwise a statement; the last one's result is the hidden value.
Operands: `up` and (in a gated FFN) `gate`, the projections' outputs [..., F]; `n0`, `n1` ... constants with a value per
neuron [F]; `s0`, `s1` ... constants of one element; numbers. A call's constants are n0 ... then s0 ..., in that order.

Programs compute in float32 (float64 for float64 inputs) and round once, to the projections' dtype.
Shape suffixes: F neurons; any leading dimensions come before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lte_compile.kernels.pointwise import BOOL, FLOAT, POINTWISE_OPS, PointwiseOp, Value

Operand = str | float  # the name of a value, or a number

_STATEMENT = re.compile(r"v(\d+) = (\w+)\(([^()]*)\)")
_INPUT = re.compile(r"up|gate|n\d+|s\d+")


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(o if isinstance(o, str) else repr(o) for o in self.operands)})"


@dataclass(frozen=True)
class Program:
    """A checked program: `instructions[i]` computes `v<i>`. `str()` is the text that `parse_program` reads."""

    instructions: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        _check(self.instructions)

    def __str__(self) -> str:
        return "; ".join(f"v{i} = {instruction}" for i, instruction in enumerate(self.instructions))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What it reads, in the order of the arguments: up, gate, n0 ..., s0 ..."""
        names = {o for i in self.instructions for o in i.operands if isinstance(o, str) and _INPUT.fullmatch(o)}
        return tuple(sorted(names, key=_input_order))

    @cached_property
    def gated(self) -> bool:
        return "gate" in self.inputs

    @cached_property
    def neuron_constants(self) -> int:
        return sum(name.startswith("n") for name in self.inputs)

    @cached_property
    def scalar_constants(self) -> int:
        return sum(name.startswith("s") for name in self.inputs)

    @cached_property
    def constant_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name not in ("up", "gate"))


def is_program(activation: str) -> bool:
    """Whether the `activation` argument of an op is a program rather than a name of ACTIVATIONS."""
    return "=" in activation


@lru_cache(maxsize=1024)
def parse_program(text: str) -> Program:
    """The program of a text, or a ValueError that says which statement is wrong and why."""
    instructions: list[Instruction] = []
    for statement in text.split(";"):
        found = _STATEMENT.fullmatch(statement.strip())
        if found is None or int(found[1]) != len(instructions):
            raise ValueError(
                f"cannot read {statement.strip()!r} of a region program; statement {len(instructions)} must look like "
                f"'v{len(instructions)} = mul(gate, 1.702)'"
            )
        operands = tuple(_operand(text.strip()) for text in found[3].split(",")) if found[3].strip() else ()
        instructions.append(Instruction(found[2], operands))
    return Program(tuple(instructions))


def _operand(text: str) -> Operand:
    try:
        return float(text)
    except ValueError:
        return text


def _input_order(name: str) -> tuple[int, int]:
    if name in ("up", "gate"):
        return ("up", "gate").index(name), 0
    return 2 + "ns".index(name[0]), int(name[1:])


def find_op(name: str) -> PointwiseOp:
    """The operation of that name, or a ValueError that names the closest one."""
    op = POINTWISE_OPS.get(name)
    if op is None:
        near = get_close_matches(name, POINTWISE_OPS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"region programs have no operation {name!r}{hint}")
    return op


def _check(instructions: Sequence[Instruction]) -> None:
    kinds = {"up": FLOAT, "gate": FLOAT}
    used: set[str] = set()
    for index, instruction in enumerate(instructions):
        _check_instruction(instruction, kinds)
        used |= {o for o in instruction.operands if isinstance(o, str)}
        kinds[f"v{index}"] = find_op(instruction.op).gives
    if not instructions or find_op(instructions[-1].op).gives != FLOAT or "up" not in used:
        raise ValueError("a region program computes a floating hidden value from `up`, and from `gate` if there is one")
    for kind in "ns":
        indices = sorted(int(name[1:]) for name in used if re.fullmatch(rf"{kind}\d+", name))
        if indices != list(range(len(indices))):
            raise ValueError(f"a region program numbers its constants without gaps; it reads {kind}{indices}")


def _check_instruction(instruction: Instruction, kinds: Mapping[str, str]) -> None:
    op = find_op(instruction.op)
    if len(instruction.operands) != op.arity:
        raise ValueError(f"{instruction.op} takes {op.arity} operands; got {instruction}")
    if not any(isinstance(operand, str) for operand in instruction.operands):
        raise ValueError(f"{instruction} reads no value; write the number it computes instead")
    for operand, wanted in zip(instruction.operands, op.takes, strict=True):
        is_constant = isinstance(operand, str) and re.fullmatch(r"[ns]\d+", operand)
        kind = FLOAT if isinstance(operand, float) or is_constant else kinds.get(operand)
        if kind is None:
            raise ValueError(f"{instruction} reads {operand!r}, which nothing before it computes")
        if kind != wanted:
            raise ValueError(f"{instruction}: {operand!r} must be {'boolean' if wanted == BOOL else 'floating'}")


def check_constants(program: Program, constants: Sequence[Tensor], num_neurons: int) -> None:
    """ValueError unless `constants` are what the program reads."""
    if len(constants) != len(program.constant_names):
        names = ", ".join(program.constant_names) or "none"
        raise ValueError(f"the region program reads the constants {names}; got {len(constants)} tensors")
    for name, constant in zip(program.constant_names, constants, strict=True):
        fits = tuple(constant.shape) == (num_neurons,) if name[0] == "n" else constant.numel() == 1
        if not (fits and constant.is_floating_point()):
            wanted = f"floating, [{num_neurons}]" if name[0] == "n" else "floating, of one element"
            raise ValueError(f"constant {name} must be {wanted}; got {constant.dtype} {list(constant.shape)}")


def run_program(program: Program, up_F: Tensor, gate_F: Tensor | None, constants: Sequence[Tensor]) -> Tensor:
    """The hidden value [..., F] in up's dtype. Plain torch, differentiable."""
    values = _inputs(program, up_F, gate_F, constants)
    wide = values["up"].dtype
    last_use = {o: i for i, step in enumerate(program.instructions) for o in step.operands if isinstance(o, str)}
    for index, instruction in enumerate(program.instructions):
        values[f"v{index}"] = _apply(instruction, values, wide)
        for operand in {o for o in instruction.operands if isinstance(o, str) and last_use[o] == index}:
            del values[operand]  # a hidden value of many tokens is large: keep no more of them than needed
    return values[f"v{len(program.instructions) - 1}"].expand(up_F.shape).to(up_F.dtype)


def program_gradients(
    program: Program, grad_F: Tensor, up_F: Tensor, gate_F: Tensor | None, constants: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradients of all inputs by name, in float32 at least: the chain rule, backwards."""
    values = _inputs(program, up_F, gate_F, constants)
    wide = values["up"].dtype
    for index, instruction in enumerate(program.instructions):
        values[f"v{index}"] = _apply(instruction, values, wide)
    last = f"v{len(program.instructions) - 1}"
    grads = {last: grad_F.to(wide).sum_to_size(values[last].shape)}
    for index, instruction in reversed(list(enumerate(program.instructions))):
        result = values.pop(f"v{index}")
        if (grad := grads.pop(f"v{index}", None)) is not None:
            _spread(instruction, grad, result, values, grads)
    return {name: grads.get(name, torch.zeros_like(values[name])) for name in program.inputs}


def _spread(
    instruction: Instruction, grad: Tensor, result: Tensor, values: Mapping[str, Tensor], grads: dict[str, Tensor]
) -> None:
    """Adds to `grads` what `instruction` passes back to its operands."""
    operands = [values[o] if isinstance(o, str) else o for o in instruction.operands]
    for operand, gradient in zip(instruction.operands, find_op(instruction.op).gradients, strict=True):
        if isinstance(operand, str) and gradient is not None:
            # What a `where` did not choose gets the gradient 0, also from an exp that overflowed there: 0 * inf is NaN.
            part = torch.where(grad == 0, 0.0, gradient(grad, result, *operands)).sum_to_size(values[operand].shape)
            grads[operand] = grads[operand] + part if operand in grads else part


def _inputs(program: Program, up_F: Tensor, gate_F: Tensor | None, constants: Sequence[Tensor]) -> dict[str, Tensor]:
    wide = torch.float64 if up_F.dtype == torch.float64 else torch.float32
    given: dict[str, Tensor] = {"up": up_F.to(wide)}
    if gate_F is not None:
        given["gate"] = gate_F.to(wide)
    for name, constant in zip(program.constant_names, constants, strict=True):
        given[name] = (constant.reshape(()) if name[0] == "s" else constant).to(wide)
    return given


def _apply(instruction: Instruction, values: Mapping[str, Tensor], wide: torch.dtype) -> Tensor:
    operands: list[Value] = [values[o] if isinstance(o, str) else o for o in instruction.operands]
    tensors = [o for o in operands if isinstance(o, Tensor)]
    if not any(t.is_floating_point() for t in tensors):  # where(condition, 1.0, 0.5): numbers alone have no dtype
        device = tensors[0].device
        operands = [o if isinstance(o, Tensor) else torch.full((), o, dtype=wide, device=device) for o in operands]
    result: Tensor = find_op(instruction.op).apply(*operands)
    return result
