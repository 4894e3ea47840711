"""What users pass as torch.compile(model, backend="lte", mode=..., options={...}), checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch._dynamo
import torch.fx as fx

Compiled = Callable[..., Any]

COMPILERS = ("inductor", "aot_eager", "eager")
FALLBACKS = ("allow", "refuse")
_OWN = ("compiler", "lower", "fallback")


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Options of the backend, in torch.compile's spelling.

    Args:
        compiler: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        lower: in inference, let lte.sparse_ffn run selected experts only. False keeps lte.expert_ffn.
        fallback: what to do with a routed FFN that a pass has to leave in reference form: "allow" it, which is correct
            and slow, or "refuse" it with a RuntimeError that says why.
        inductor: further options, for compiler "inductor" only: its own, as torch.compile(options=...) takes them.
    """

    compiler: str = "inductor"
    lower: bool = True
    fallback: str = "allow"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("compiler", self.compiler, COMPILERS)
        _check_choice("fallback", self.fallback, FALLBACKS)
        if not isinstance(self.lower, bool):
            raise ValueError(f"lower must be True or False; got {self.lower!r}")

    def compile_with(self) -> Compiled:
        """The function that compiles a graph for its example inputs."""
        if self.compiler != "inductor":
            chosen: Compiled = torch._dynamo.lookup_backend(self.compiler)
            return chosen
        from torch._inductor.compile_fx import compile_fx  # importing inductor takes seconds; eager users need not wait

        def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
            return compile_fx(gm, example_inputs, config_patches=dict(self.inductor))

        return compile_graph


def parse_options(options: Mapping[str, Any], mode: str | None) -> BackendOptions:
    """Options and mode as torch.compile hands them over.

    Raises:
        ValueError: an unknown option or mode, or a value that is not allowed.
    """
    own = BackendOptions(**{name: value for name, value in options.items() if name in _OWN})
    further = {name.replace("-", "_"): value for name, value in options.items() if name not in _OWN}
    if own.compiler != "inductor":
        if further:
            raise ValueError(_unknown(next(iter(further)), (), f"compiler {own.compiler!r} has none"))
        if mode is not None:
            raise ValueError(f"mode={mode!r} is inductor's; compiler {own.compiler!r} has none")
        return own
    if not further and mode is None:
        return own
    return BackendOptions(
        compiler=own.compiler, lower=own.lower, fallback=own.fallback, inductor={**_of_mode(mode), **_checked(further)}
    )


def _of_mode(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    known: dict[str, dict[str, Any]] = list_mode_options()
    if mode is None or mode == "default":
        return {}
    if mode not in known:
        raise ValueError(f"mode must be one of {', '.join(dict.fromkeys(('default', *known)))}; got {mode!r}")
    return known[mode]


def _checked(further: Mapping[str, Any]) -> Mapping[str, Any]:
    from torch._inductor import config

    known: dict[str, Any] = config.get_config_copy()
    for name in further:
        if name not in known:
            raise ValueError(_unknown(name, known, "inductor has none of that name either"))
    return further


def _unknown(name: str, inductor: Any, also: str) -> str:
    near = get_close_matches(name, [*_OWN, *inductor], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"backend 'lte' has no option {name!r}, and {also}; its own are {', '.join(_OWN)}{hint}"


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}{hint}")
