"""From ATen ops on tensors to the statements of a region program: what each value holds, and what each op becomes.

`interpret` walks a graph of ATen ops. Element-wise ops emit statements; views only move elements about, which is
followed by applying them to the numbers of the channels. Adding an op is a row in kernels/pointwise.py; one
that is several of the table's operations is a row of `_WRITTEN_OUT`, unless torch decomposes it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.kernels.pointwise import BOOL, FLOAT, POINTWISE_OPS
from lte_compile.kernels.program import Instruction, Operand, Program, find_op


class ProgramError(ValueError):
    """A region that no program expresses; the message says why."""


@dataclass(frozen=True)
class Channels:
    """How a fused projection's 2F channels hold `parts`; no parts where gate and up are projections of their own."""

    hidden: int
    parts: tuple[str, ...]
    interleaved: bool

    def part_of(self, numbers: Tensor) -> Tensor:
        return numbers % 2 if self.interleaved else numbers // self.hidden

    def neuron_of(self, numbers: Tensor) -> Tensor:
        return numbers // 2 if self.interleaved else numbers % self.hidden


@dataclass(frozen=True)
class Traced:
    """A tensor: `operands` compute its elements, two while it still holds both parts of a fused projection.

    `numbers`, of its shape, says which channel (two operands) or neuron (one) an element belongs to; -1 for none.
    """

    operands: tuple[Operand, ...]
    numbers: Tensor
    per_neuron: bool = False


@dataclass
class Emitter:
    """Statements so far. Equal ones are written once; those on numbers alone are computed at once."""

    instructions: list[Instruction] = field(default_factory=list)
    known: dict[Instruction, str] = field(default_factory=dict)
    per_neuron: dict[str, bool] = field(default_factory=dict)  # the constants met

    def emit(self, op: str, *operands: Operand) -> Operand:
        row = find_op(op)
        kinds = row.takes
        typed = tuple(self._as_kind(operand, kind) for operand, kind in zip(operands, kinds, strict=True))
        if not any(isinstance(operand, str) for operand in typed):
            return _computed(op, [operand for operand in typed if isinstance(operand, float)])
        if (simpler := _simplified(op, typed)) is not None:
            return simpler
        instruction = Instruction(op, typed)
        if instruction not in self.known:
            self.known[instruction] = f"v{len(self.instructions)}"
            self.instructions.append(instruction)
        return self.known[instruction]

    def kind(self, operand: Operand) -> str:
        if isinstance(operand, float) or not operand.startswith("v"):
            return FLOAT
        return find_op(self.instructions[int(operand[1:])].op).gives

    def _as_kind(self, operand: Operand, kind: str) -> Operand:
        if self.kind(operand) == kind or isinstance(operand, float):  # a number is a truth value if one is wanted
            return operand
        return self.emit("where", operand, 1.0, 0.0) if kind == FLOAT else self.emit("ne", operand, 0.0)

    def finish(self, result: Operand) -> tuple[Program, tuple[str, ...]]:
        """The program of what `result` needs, and the constants' names in the order of its inputs."""
        if isinstance(result, float) or not result.startswith("v"):
            raise ProgramError(
                "it is not a function of the projections" if isinstance(result, float) else "it is empty"
            )
        needed = self._needed(self._as_kind(result, FLOAT))
        names = {old: f"v{new}" for new, old in enumerate(needed)}
        constants = self._constants(needed)
        for letter, is_per_neuron in (("n", True), ("s", False)):
            chosen = [name for name in constants if self.per_neuron[name] is is_per_neuron]
            names |= {name: f"{letter}{index}" for index, name in enumerate(chosen)}
        steps = (self.instructions[int(old[1:])] for old in needed)
        program = Program(
            tuple(
                Instruction(step.op, tuple(names.get(o, o) if isinstance(o, str) else o for o in step.operands))
                for step in steps
            )
        )
        return program, tuple(sorted(constants, key=lambda name: program.inputs.index(names[name])))

    def _needed(self, result: Operand) -> list[str]:
        needed = {result}
        for index in reversed(range(len(self.instructions))):
            if f"v{index}" in needed:
                needed |= {o for o in self.instructions[index].operands if isinstance(o, str)}
        return [f"v{index}" for index in range(len(self.instructions)) if f"v{index}" in needed]

    def _constants(self, needed: Sequence[str]) -> list[str]:
        """Names of the constants that are read, in the order of their first use."""
        read = (o for name in needed for o in self.instructions[int(name[1:])].operands if isinstance(o, str))
        return list(dict.fromkeys(name for name in read if name in self.per_neuron))


def _computed(op: str, numbers: Sequence[float]) -> float:
    row = find_op(op)
    dtypes = [torch.bool if kind == BOOL else torch.float64 for kind in row.takes]
    return float(row.apply(*(torch.tensor(n, dtype=dtype) for n, dtype in zip(numbers, dtypes, strict=True))))


def _simplified(op: str, operands: tuple[Operand, ...]) -> Operand | None:
    """What an operation with a number among its operands comes down to, if to one of the others or to a number."""
    first, second = operands[0], operands[-1]
    if op == "where" and isinstance(first, float):
        return operands[1] if first else operands[2]
    if op in ("logical_and", "logical_or") and (isinstance(first, float) or isinstance(second, float)):
        number, other = (first, second) if isinstance(first, float) else (second, first)
        return other if bool(number) is (op == "logical_and") else number
    if (op == "mul" and first == 1.0) or (op in ("mul", "div") and second == 1.0):
        return second if first == 1.0 else first
    return None


def interpret(graph: fx.Graph, inputs: Sequence[Traced], emitter: Emitter, channels: Channels) -> Operand:
    """The operand that holds the graph's result, which must have the neurons along its last axis, in order."""
    env: dict[fx.Node, Any] = {}
    for node, traced in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        env[node] = traced
        emitter.per_neuron |= {str(o): traced.per_neuron for o in traced.operands if str(o).startswith("constant ")}
    for node in graph.nodes:
        if node.op == "get_attr":
            env[node] = _held(getattr(graph.owning_module, str(node.target)))
        elif node.op == "call_function":
            env[node] = _call(node, env, emitter, channels)
    (result,) = graph.output_node().all_input_nodes
    traced = env[result]
    in_order = torch.arange(channels.hidden).expand(traced.numbers.shape[:-1] + (channels.hidden,))
    if len(traced.operands) != 1 or not torch.equal(traced.numbers, in_order):
        raise ProgramError("its hidden units are not in the order of the projections' outputs")
    operand: Operand = traced.operands[0]
    return operand


def _held(tensor: Tensor) -> Traced:
    """A constant that tracing met in the code, such as torch.tensor(0.5)."""
    if tensor.numel() != 1:
        raise ProgramError(f"it holds a constant of shape {list(tensor.shape)}")
    return Traced((float(tensor),), torch.full(tensor.shape, -1))


# Ops that give their first operand's elements as they are; and those that move elements about without a change.
_SAME = frozenset(
    ("clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "convert_element_type")
)
_MOVES = frozenset(
    ("view", "reshape", "_unsafe_view", "_reshape_alias", "transpose", "permute", "t", "unsqueeze", "squeeze", "slice")
    + ("select", "split", "split_with_sizes", "unbind", "expand", "narrow", "chunk", "view_of", "flip")
)
_FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


def _call(node: fx.Node, env: dict[fx.Node, Any], emitter: Emitter, channels: Channels) -> Any:
    if node.target is operator.getitem:
        return env[node.args[0]][node.args[1]]  # type: ignore[index]
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    is_in_place = name.endswith("_") and not name.startswith("__")
    name = name.removesuffix("_") if is_in_place else name
    result = _value(name, node, env, emitter, channels)
    if is_in_place:
        env[node.args[0]] = result  # type: ignore[index]
    return result


def _value(name: str, node: fx.Node, env: Mapping[fx.Node, Any], emitter: Emitter, channels: Channels) -> Any:
    if name in _SAME:
        return _cast(node, env[node.args[0]], emitter)  # type: ignore[index]
    if name in _MOVES:
        return _moved(node, env[node.args[0]], channels)  # type: ignore[index]
    if name == "copy":
        return env[node.args[1]]  # type: ignore[index]
    if (filled := _fill(name, node)) is not None:
        return Traced((filled,), torch.full(node.meta["tensor_meta"].shape, -1))
    write = _WRITTEN_OUT.get(name) or (_row(name) if name in POINTWISE_OPS else None)
    if write is None:
        raise ProgramError(f"op {name} is not in the table of element-wise operations")
    return _combined(node, env, emitter, write)


def is_written(name: str) -> bool:
    """Whether the ATen op of that name becomes statements as it is, so that it need not be decomposed."""
    return name.removesuffix("_") in POINTWISE_OPS or name in _WRITTEN_OUT or name.removesuffix("_") in _WRITTEN_OUT


def _cast(node: fx.Node, traced: Traced, emitter: Emitter) -> Traced:
    dtype = node.kwargs.get("dtype") or (node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dtype, torch.dtype) or dtype.is_floating_point:
        return traced
    if dtype != torch.bool:
        raise ProgramError(f"it casts values to {dtype}")
    return Traced(tuple(emitter.emit("ne", operand, 0.0) for operand in traced.operands), traced.numbers)


def _moved(node: fx.Node, traced: Traced, channels: Channels) -> Any:
    moved = node.target(traced.numbers, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    if isinstance(moved, (tuple, list)):
        return [_settled(traced, numbers, channels) for numbers in moved]
    return _settled(traced, moved, channels)


def _settled(traced: Traced, numbers: Tensor, channels: Channels) -> Traced:
    """With one operand as soon as the elements belong to one part."""
    if len(traced.operands) == 1:
        return Traced(traced.operands, numbers, traced.per_neuron)
    parts = sorted(set(channels.part_of(numbers).flatten().tolist()))
    if len(parts) != 1:
        return Traced(traced.operands, numbers)
    return Traced((traced.operands[parts[0]],), channels.neuron_of(numbers))


def _fill(name: str, node: fx.Node) -> float | None:
    value = _FILLED.get(name)
    if name in ("full", "full_like", "new_full", "scalar_tensor", "fill"):
        value = node.args[0 if name == "scalar_tensor" else 2 if name == "new_full" else 1]  # type: ignore[assignment]
    return float(value) if isinstance(value, (bool, int, float)) else None


def _combined(node: fx.Node, env: Mapping[fx.Node, Any], emitter: Emitter, write: Writer) -> Traced:
    """An element-wise op over values of one order of neurons; over both parts of a pair at once."""
    operands = [env[source] for source in node.all_input_nodes]
    numbers = _common_order([traced.numbers for traced in operands])
    parts = max(len(traced.operands) for traced in operands)
    if any(len(traced.operands) < parts and bool((traced.numbers >= 0).any()) for traced in operands):
        raise ProgramError("it combines both halves of a projection with one value per neuron")
    written = []
    for part in range(parts):

        def operand(value: Any, part: int = part) -> Any:
            if isinstance(value, fx.Node):
                of_parts = env[value].operands
                return of_parts[part if len(of_parts) > 1 else 0]
            return float(value) if isinstance(value, (bool, int, float)) else value

        kwargs = {key: operand(value) for key, value in node.kwargs.items()}
        written.append(write(emitter, *map(operand, node.args), **kwargs))
    return Traced(tuple(written), numbers)


def _common_order(numbers: Sequence[Tensor]) -> Tensor:
    aligned = torch.functional.broadcast_tensors(*numbers)  # type: ignore[no-untyped-call]
    common = torch.stack(aligned).amax(0)
    if any(bool(((each >= 0) & (each != common)).any()) for each in aligned):
        raise ProgramError("it combines different neurons")
    return common


Writer = Callable[..., Operand]


def _row(name: str) -> Writer:
    arity = find_op(name).arity

    def write(emitter: Emitter, *operands: Operand, **kwargs: Any) -> Operand:
        if len(operands) != arity or any(value is not None for value in kwargs.values()):
            raise ProgramError(f"op {name} has arguments that its row in the table has not")
        return emitter.emit(name, *operands)

    return write


def _add(emitter: Emitter, a: Operand, b: Operand, alpha: float = 1.0) -> Operand:
    return emitter.emit("add", a, b if alpha == 1 else emitter.emit("mul", b, alpha))


def _sub(emitter: Emitter, a: Operand, b: Operand, alpha: float = 1.0) -> Operand:
    return emitter.emit("sub", a, b if alpha == 1 else emitter.emit("mul", b, alpha))


def _clamp(
    emitter: Emitter, a: Operand, low: Operand | None = None, high: Operand | None = None, **named: Any
) -> Operand:
    low, high = named.get("min", low), named.get("max", high)
    bounded = a if low is None else emitter.emit("clamp_min", a, low)
    return bounded if high is None else emitter.emit("clamp_max", bounded, high)


def _div(emitter: Emitter, a: Operand, b: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode is not None:
        raise ProgramError(f"div with rounding_mode={rounding_mode!r} is not in the table of element-wise operations")
    return emitter.emit("div", a, b)


_MOST_FACTORS = 16  # of a power written as a product
_ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}


def _pow(emitter: Emitter, base: Operand, exponent: Operand) -> Operand:
    if isinstance(base, float) and base > 0:
        return emitter.emit("exp", emitter.emit("mul", exponent, math.log(base)))
    if isinstance(exponent, float) and exponent in _ROOTS:
        return emitter.emit(_ROOTS[exponent], base)
    if not isinstance(exponent, float) or not exponent.is_integer() or not 0 < abs(exponent) <= _MOST_FACTORS:
        raise ProgramError(f"op pow with exponent {exponent} is not in the table of element-wise operations")
    power = _product(emitter, base, int(abs(exponent)))
    return power if exponent > 0 else emitter.emit("reciprocal", power)


def _product(emitter: Emitter, base: Operand, factors: int) -> Operand:
    if factors == 1:
        return base
    half = _product(emitter, base, factors // 2)
    square = emitter.emit("mul", half, half)
    return emitter.emit("mul", square, base) if factors % 2 else square


def _elu(emitter: Emitter, a: Operand, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Operand:
    below = emitter.emit("expm1", emitter.emit("mul", emitter.emit("clamp_max", a, 0.0), input_scale))
    positive, negative = emitter.emit("mul", a, scale), emitter.emit("mul", below, alpha * scale)
    return emitter.emit("where", emitter.emit("gt", a, 0.0), positive, negative)


def _times(factor: float) -> Callable[[str], Writer]:
    return lambda name: lambda emitter, a: emitter.emit("mul", emitter.emit(name, a), factor)


# ATen ops that are several operations of the table: (emitter, *arguments as ATen has them) -> operand.
_WRITTEN_OUT: Mapping[str, Writer] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda emitter, a, b, alpha=1.0: _sub(emitter, b, a, alpha),
    "div": _div,
    "clamp": _clamp,
    "hardtanh": lambda emitter, a, low=-1.0, high=1.0: _clamp(emitter, a, low, high),
    "pow": _pow,
    "square": lambda emitter, a: emitter.emit("mul", a, a),
    "elu": _elu,
    "exp2": lambda emitter, a: emitter.emit("exp", emitter.emit("mul", a, math.log(2))),
    "log2": _times(1 / math.log(2))("log"),
    "log10": _times(1 / math.log(10))("log"),
    "masked_fill": lambda emitter, a, mask, value: emitter.emit("where", mask, value, a),
    "_prelu_kernel": lambda emitter, a, slope: emitter.emit(
        "where", emitter.emit("gt", a, 0.0), a, emitter.emit("mul", a, slope)
    ),
    "bitwise_and": lambda emitter, a, b: emitter.emit("logical_and", a, b),
    "bitwise_or": lambda emitter, a, b: emitter.emit("logical_or", a, b),
    "bitwise_not": lambda emitter, a: emitter.emit("logical_not", a),
}
