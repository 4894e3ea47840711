"""Where a model runs its FFNs, seen by running it once: which modules project, and which forwards multiply themselves.

A module can be hooked if it is called with the FFN's input (or the hidden value) and a forward inside of it hands that
very tensor to the product. Otherwise the product is listened to, in the innermost module that runs the whole FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from torch import Tensor, nn

from lte_compile.passes.ir import FfnSite, Place
from lte_compile.rewriting.attach import router_host
from lte_compile.rewriting.hooks import is_convolution
from lte_compile.rewriting.operands import listen


@dataclass(frozen=True)
class _Frame:
    """One module call in progress: the module's name, and the tensor it was called with."""

    name: str
    module: nn.Module
    given: Tensor | None


@dataclass(frozen=True)
class _Event:
    """A product with a weight: the calls in progress, outermost first, and the operand with its width last."""

    weight: str
    frames: tuple[_Frame, ...]
    operand: Tensor


def locate(model: nn.Module, sites: Sequence[FfnSite], run: Callable[[], object]) -> tuple[FfnSite, ...]:
    """The sites with `places` and names for their routers. `run` calls the model.

    Raises:
        ValueError: an FFN's products are not seen, or several are under way at once.
    """
    weights = dict.fromkeys(name for site in sites for name in _watched(site))
    with _recorded(model, tuple(weights)) as events:
        run()
    located = [replace(site, places=_places(model, site, events)) for site in sites]
    return tuple(name_routers(model, located))


def _watched(site: FfnSite) -> tuple[str, ...]:
    return (site.first_projection, site.down, *site.down_low_rank)


@contextmanager
def _recorded(model: nn.Module, weights: Sequence[str]) -> Iterator[list[_Event]]:
    events: list[_Event] = []
    frames: list[_Frame] = []
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        frames.append(_Frame(names[module], module, given if isinstance(given, Tensor) else None))

    def leave(*_: object) -> None:
        frames.pop()

    def listener(weight: str) -> Callable[[nn.Module, Tensor], Tensor]:
        def hear(module: nn.Module, operand: Tensor) -> Tensor:
            events.append(_Event(weight, tuple(frames), operand))
            return operand

        return hear

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for weight in weights:
            stack.callback(listen(model, weight, listener(weight)))
        yield events


def _places(model: nn.Module, site: FfnSite, events: Sequence[_Event]) -> tuple[Place, ...]:
    """Every pair of first projection and down-projection, where they alternate as they should."""
    places: dict[Place, None] = {}
    runs = _runs([event for event in events if event.weight in _watched(site)], site)
    if not runs:
        raise ValueError(
            f"the FFN {site.name or site.down!r} multiplies by {site.first_projection} and {site.down} out of sight of "
            "Python (in scripted or compiled code), so no router can be attached; transform the model before compiling"
        )
    for first, *downs in runs:
        places[_place(model, site, first, downs)] = None
    return tuple(places)


def _runs(events: Sequence[_Event], site: FfnSite) -> list[list[_Event]]:
    runs: list[list[_Event]] = []
    readers = {site.down, *site.down_low_rank}
    for event in events:
        if event.weight == site.first_projection:
            runs.append([event])
        elif runs and event.weight not in {seen.weight for seen in runs[-1]}:
            runs[-1].append(event)
        else:
            raise ValueError(_out_of_turn(site))
    if any({event.weight for event in run[1:]} != readers for run in runs):
        raise ValueError(_out_of_turn(site))
    return runs


def _out_of_turn(site: FfnSite) -> str:
    return (
        f"the FFN {site.name or site.down!r} is started again before its down-projection ran, so its gates cannot be "
        "told apart; compute one input after the other"
    )


def _place(model: nn.Module, site: FfnSite, first: _Event, downs: Sequence[_Event]) -> Place:
    base = next(event for event in downs if event.weight == site.down)
    around = _common_frames(downs)[-1]  # calls every layer that reads the hidden value
    leaf = base.frames[-1]
    down = wrapper = None
    if _hands_on(around, base):
        down = leaf.name if _hands_on(leaf, base) else around.name
        wrapper = around.name if around.name != down else None
    first_name = first.frames[-1].name if _hands_on(first.frames[-1], first) else None
    listened = [first.weight] if first_name is None else []
    listened += [event.weight for event in downs] if down is None else []
    owned = {id(model.get_parameter(name)) for name in listened}
    frames = _common_frames([first, *downs])
    scope = next(frame for frame in reversed(frames) if owned <= set(map(id, frame.module.parameters())))
    if down is None and first_name == scope.name:
        first_name = None  # its forward is listened to anyway
    return Place(scope=scope.name, first=first_name, down=down, wrapper=wrapper)


def _common_frames(events: Sequence[_Event]) -> tuple[_Frame, ...]:
    """The calls that all events are inside of; the model's own at least."""
    shared = []
    for frames in zip(*(event.frames for event in events), strict=False):
        if any(frame is not frames[0] for frame in frames):
            break
        shared.append(frames[0])
    return tuple(shared)


def _hands_on(frame: _Frame, event: _Event) -> bool:
    """Whether the product reads what the module was called with, width on the axis where hooks look for it."""
    given, operand = frame.given, event.operand
    if given is None or given.numel() != operand.numel():
        return False
    if operand is given:
        return True
    is_view = _base(operand) is _base(given)
    return is_view and (is_convolution(frame.module) or operand.stride()[-1:] == given.stride()[-1:])


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def name_routers(model: nn.Module, sites: Iterable[FfnSite]) -> Iterator[FfnSite]:
    """The sites with a place for each router that nothing else in the model has."""
    taken: set[str] = set()
    for site in sites:
        host = router_host(site)
        module = model.get_submodule(host)
        suffix = site.first_projection.rpartition(".")[2]
        names = chain(("router", f"router_{suffix}"), (f"router_{suffix}_{number}" for number in count(2)))
        paths = ((name, f"{host}.{name}" if host else name) for name in names)
        path = next(path for name, path in paths if path not in taken and not hasattr(module, name))
        taken.add(path)
        usual = replace(site, router="")
        yield usual if usual.router_path == path else replace(site, router=path)
