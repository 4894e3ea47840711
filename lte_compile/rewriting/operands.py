"""Listening to the operands of a forward's own products: `F.linear(x, self.w)`, `x @ self.w.T`, `torch.einsum(...)`.

A forward that multiplies by a parameter itself has no submodule to hook. Its module gets an instance attribute
`forward` that runs the forward as written under a torch function mode; the mode recognises products with a parameter
and lets listeners see, and replace, the other operand. Class, parameters, control flow and training mode stay as they
were, the wrapper can be copied and pickled, and torch.compile and torch.export trace through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Listener = Callable[[nn.Module, Tensor], Tensor]  # (module, operand [..., width]) -> the operand to use


class Product(NamedTuple):
    """Where a product's other operand is among the arguments, and which of its axes is contracted."""

    position: int
    keyword: str
    axis: int


class WatchedForward:
    """The `forward` of one module, with listeners to its products by the parameter's name in that module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Any = module.__dict__.get("forward")  # an instance's own forward, as accelerate puts there
        self.listeners: dict[str, list[Listener]] = {}

    @property
    def __wrapped__(self) -> Any:
        """What it runs; inspect.signature reads the signature from it."""
        return type(self.module).forward.__get__(self.module) if self.inner is None else self.inner

    @property
    def __code__(self) -> Any:
        """Of what it runs: torch.onnx asks for it."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _ListeningMode(self):
            if self.inner is None:  # called through the class: torch 2.11's Dynamo does not trace a method being bound
                return type(self.module).forward(self.module, *args, **kwargs)
            return self.inner(*args, **kwargs)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.listeners:
            path, _, attribute = name.rpartition(".")
            yield name, _parameter(self.module.get_submodule(path), attribute)

    def replicate(self) -> nn.Module:
        """What nn.DataParallel copies a module with: the copy's forward has to run the copy."""
        replicate: Any = type(self.module)._replicate_for_data_parallel
        replica: Any = replicate(self.module)
        forward = replica.forward = WatchedForward(replica)
        forward.inner, forward.listeners = None, self.listeners
        return replica  # type: ignore[no-any-return]


def listen(module: nn.Module, parameter: str, listener: Listener, *, first: bool = False) -> Callable[[], None]:
    """Have `listener` see what `module`'s forward multiplies by `parameter`; returns a function that ends it.

    Args:
        first: before the listeners that are there.
    """
    present: Any = module.__dict__.get("forward")
    forward = present if isinstance(present, WatchedForward) else WatchedForward(module)
    listeners = forward.listeners.setdefault(parameter, [])
    listeners.insert(0 if first else len(listeners), listener)
    attributes: Any = module
    attributes.forward = forward
    attributes._replicate_for_data_parallel = forward.replicate

    def stop() -> None:
        listeners.remove(listener)
        if not listeners:
            del forward.listeners[parameter]
        if not forward.listeners:
            _unwrap(module, forward)

    return stop


def _unwrap(module: nn.Module, forward: WatchedForward) -> None:
    del module.__dict__["_replicate_for_data_parallel"]
    if forward.inner is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward.inner


def _parameter(owner: nn.Module, name: str) -> Tensor:
    tensor = owner._parameters.get(name)
    if tensor is None:
        tensor = owner.__dict__.get(name)  # nn.DataParallel's replicas hold plain tensors
    if not isinstance(tensor, Tensor):
        raise RuntimeError(
            f"{type(owner).__name__}.{name} is no parameter of its own any more (parametrized, pruned or quantized), "
            "so the FFN that multiplies by it cannot be routed; undo that, or do it before lte_compile.transform"
        )
    return tensor


class _ListeningMode(TorchFunctionMode):
    def __init__(self, forward: WatchedForward) -> None:
        super().__init__()
        self.forward = forward
        self.weights = list(forward.weights())  # grows by what is a view or cast of one

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self._weight_among(args, kwargs)
        if name is None:
            return func(*args, **kwargs)  # the common case: nothing to listen to
        product = find_product(func, args, kwargs, self._is_weight)
        if product is not None:
            for listener in self.forward.listeners[name]:
                args, kwargs = _with_operand(args, kwargs, product, listener, self.forward.module)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if args and self._is_weight(args[0]) and isinstance(result, Tensor) and result.numel() == args[0].numel():
            self.weights.append((name, result))
        return result

    def _weight_among(self, args: Any, kwargs: Any) -> str | None:
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                for name, weight in self.weights:
                    if _stands_for(item, weight):
                        return name
        return None

    def _is_weight(self, value: Any) -> bool:
        return any(_stands_for(value, weight) for _, weight in self.weights)


def _stands_for(value: Any, weight: Tensor) -> bool:
    """The weight itself or all of it in another view: under Dynamo, attributes such as `w.T` do not reach the mode."""
    if value is weight:
        return True
    if not isinstance(value, Tensor) or value.dim() != weight.dim():
        return False
    elements = value.numel()  # no int where torch.export keeps a size free: no weight's, and comparing it would bind it
    return isinstance(elements, int) and elements == weight.numel() and value._base is weight


def _with_operand(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], product: Product, listener: Listener, module: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    in_kwargs = product.keyword in kwargs
    operand = kwargs[product.keyword] if in_kwargs else args[product.position]
    if product.axis == -1:
        heard = listener(module, operand)
    else:
        heard = listener(module, operand.movedim(product.axis, -1)).movedim(-1, product.axis)
    if in_kwargs:
        return args, {**kwargs, product.keyword: heard}
    return (*args[: product.position], heard, *args[product.position + 1 :]), dict(kwargs)


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_MATMULS = ("matmul", "mm", "bmm", "__matmul__")


def find_product(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
) -> Product | None:
    """How a call multiplies by a weight; None when it does something else with it (a cast, a transpose)."""
    name = getattr(func, "__name__", "")
    if name == "linear":
        return Product(0, "input", -1)
    if name in _CONVOLUTIONS:
        return Product(0, "input", 1)
    if name in _MATMULS:
        return (
            Product(1, "other" if "other" in kwargs else "mat2", -2) if is_weight(args[0]) else Product(0, "input", -1)
        )
    if name == "addmm":
        right = kwargs.get("mat2", args[2] if len(args) > 2 else None)
        return Product(1, "mat1", -1) if is_weight(right) else Product(2, "mat2", -2)
    if name == "einsum":
        return _einsum_product(args, is_weight)
    return None


def _einsum_product(args: tuple[Any, ...], is_weight: Callable[[Any], bool]) -> Product | None:
    """Two operands; the contracted label is the one they share that the result lacks."""
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").replace("...", "_").partition("->")
    labels = inputs.split(",")
    at = 1 if is_weight(operands[0]) else 0
    shared = [label for label in labels[at] if label in labels[1 - at] and label not in output]
    if len(shared) != 1:
        return None
    place = labels[at].index(shared[0])
    return Product(at + 1, "operands", place - len(labels[at]) if "_" in labels[at][:place] else place)
