"""Adding nodes to a captured graph so that they look as if the tracer had recorded them: fake values and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_arg

from lte_compile.passes.dataflow import fake_value
from lte_compile.passes.ir import CapturedGraph

LIMIT_REACHED = "the limit on rewrites is reached"  # why a pass with a `limit` left the rest alone
# What tells torch.export, AOTAutograd and error messages where a node came from.
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")


@dataclass(frozen=True)
class Builder:
    """Adds nodes just before `place`, which also lends them its module stack and stack trace."""

    graph: CapturedGraph
    place: fx.Node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call_function node whose fake value is what `target` returns on the arguments' fake values."""
        with self._graph.inserting_before(self.place):
            node: fx.Node = self._graph.create_node("call_function", target, args, kwargs, name=_op_name(target))
        with fake_mode_of(self.place):
            value = target(*map_arg(args, fake_value), **map_arg(kwargs, fake_value))
        return self._describe(node, value)

    def call_module(self, path: str, x: fx.Node) -> fx.Node:
        """A call of the submodule at `path` with one argument."""
        with self._graph.inserting_before(self.place):
            node = self._graph.call_module(path, (x,))
        return self._describe(node, _fake_module_call(self.graph.module.get_submodule(path), x))

    def reshape(self, node: fx.Node, sizes: list[int]) -> fx.Node:
        return self.call(torch.ops.aten.reshape.default, node, sizes)

    def parameter(self, name: str) -> fx.Node:
        """The node of a parameter; a new get_attr where the tracer kept its module whole and recorded none."""
        node: fx.Node
        for op in ("placeholder", "get_attr"):
            for node in self._graph.find_nodes(op=op, sort=False):
                if self.graph.parameters.get(node.name) == name:
                    return node
        tensor = self.graph.module.get_parameter(name)
        with self._graph.inserting_before(self.place):
            node = self._graph.get_attr(name)
        with fake_mode_of(self.place) as fakes:
            return self._describe(node, fakes.from_tensor(tensor, static_shapes=True))

    @property
    def _graph(self) -> fx.Graph:
        return self.graph.module.graph

    def _describe(self, node: fx.Node, value: Any) -> fx.Node:
        key = "val" if self.place.meta.get("val") is not None else "example_value"
        node.meta[key] = value
        node.meta.update({name: self.place.meta[name] for name in _PROVENANCE if name in self.place.meta})
        return node


def _op_name(target: Callable[..., Any]) -> str | None:
    """`expert_ffn` rather than fx's `expert_ffn_default`."""
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else None


@contextmanager
def fake_mode_of(node: fx.Node) -> Iterator[Any]:
    """The fake tensor mode of the node's recorded value, entered."""
    value = fake_value(node)
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        raise RuntimeError(f"node {node.name} carries no fake tensor; capture the graph with example inputs")
    with mode, torch.no_grad():
        yield mode


def _fake_module_call(module: torch.nn.Module, x: fx.Node) -> Any:
    with fake_mode_of(x) as fakes:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fake_tensors = {name: fakes.from_tensor(tensor, static_shapes=True) for name, tensor in tensors.items()}
        return torch.func.functional_call(module, fake_tensors, (fake_value(x),))


def same_sizes(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Equal sizes without asking the shape environment, which would specialise a symbolic size."""
    return len(left) == len(right) and all(_size_key(a) == _size_key(b) for a, b in zip(left, right, strict=True))


def _size_key(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def leading_sizes(node: fx.Node) -> tuple[Any, ...]:
    """A tensor node's sizes without the last, symbolic ones as they are."""
    value = fake_value(node)
    assert isinstance(value, Tensor), node
    return tuple(value.shape[:-1])
