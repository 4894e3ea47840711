"""The gradients of region programs as Triton functions, written from the same table as the gradients in torch.

A row's gradient (kernels.pointwise) is called once with symbols in place of tensors; what it computes with them is the
text of the expression. So there is one definition of every gradient, and the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from lte_compile.kernels.program import Instruction, Operand, Program, find_op, parse_program
from lte_compile.kernels.program_triton import compiled, loads, number, statements


class _Symbol:
    """A value of the generated function; computing with it writes an expression."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> _Symbol:
        """torch.where, torch.exp ...: rows of the table themselves."""
        return cls(find_op(function.__name__).triton.format(*map(_text, args)))

    def __neg__(self) -> _Symbol:
        return _Symbol(f"(-{self.text})")


def _text(value: Any) -> str:
    return value.text if isinstance(value, _Symbol) else number(float(value))


def _binary(sign: str, *, reflected: bool = False) -> Callable[[_Symbol, Any], _Symbol]:
    def write(self: _Symbol, other: Any) -> _Symbol:
        left, right = (other, self) if reflected else (self, other)
        return _Symbol(f"({_text(left)} {sign} {_text(right)})")

    return write


for _name, _sign in {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}.items():
    setattr(_Symbol, f"__{_name}__", _binary(_sign))
    setattr(_Symbol, f"__r{_name}__", _binary(_sign, reflected=True))
for _name, _sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}.items():
    setattr(_Symbol, f"__{_name}__", _binary(_sign))


@lru_cache(maxsize=1024)
def generated_gradient(text: str) -> Any:
    """`gradients(grad, up, gate, constants, neuron, exists)` of a program: (hidden value, up's gradient, gate's).

    For blocks of neurons in fp32; of a plain FFN's program, gate's gradient is up's again.
    """
    return compiled(gradient_source(parse_program(text)), "gradients")


def gradient_source(program: Program) -> str:
    """The function as text: the program's own statements, then the chain rule, backwards."""
    head = ["@triton.jit", "def gradients(grad, up, gate, constants, neuron, exists):"]
    last = f"v{len(program.instructions) - 1}"
    parts: dict[str, str] = {last: "grad"}
    lines: list[str] = []
    reached = _reached(program)
    for index, instruction in reversed(list(enumerate(program.instructions))):
        if f"v{index}" in parts:
            lines += _spread(instruction, index, parts, reached)
    zero = "tl.zeros_like(up)"
    up, gate = parts.get("up", zero), parts.get("gate", zero)
    result = f"    return {last}, {up}, {gate if program.gated else up}"
    return "\n".join([*head, *loads(program), *statements(program), *lines, result, ""])


def _reached(program: Program) -> set[str]:
    """The values that depend on up or gate: only they pass a gradient on."""
    reached = {"up", "gate"}
    for index, instruction in enumerate(program.instructions):
        if reached.intersection(o for o in instruction.operands if isinstance(o, str)):
            reached.add(f"v{index}")
    return reached


def _spread(instruction: Instruction, index: int, parts: dict[str, str], reached: set[str]) -> list[str]:
    """Statements that add what an instruction passes back; `parts` names each value's gradient so far."""
    grad, result = _Symbol(parts[f"v{index}"]), _Symbol(f"v{index}")
    operands = [_operand(operand) for operand in instruction.operands]
    lines = []
    for place, (name, gradient) in enumerate(zip(instruction.operands, find_op(instruction.op).gradients, strict=True)):
        if not isinstance(name, str) or name not in reached or gradient is None:
            continue
        # Zero where nothing comes back, also from an exp that overflowed there: 0 * inf is NaN.
        kept: Any = gradient(grad, result, *operands)
        lines.append(f"    d{index}_{place} = tl.where({grad.text} == 0.0, 0.0, {_text(kept)})")
        if name in parts:
            lines.append(f"    d{index}_{place} += {parts[name]}")
        parts[name] = f"d{index}_{place}"
    return lines


def _operand(operand: Operand) -> Any:
    return _Symbol(operand) if isinstance(operand, str) else operand
