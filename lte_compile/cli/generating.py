"""lte-compile generate: greedy text, by torch or by ONNX Runtime, shown as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.checkpoints.loading import load_causal_lm, load_tokenizer
from lte_compile.cli.output import Outcome, messages
from lte_compile.cli.preparing import find_model, pick_device
from lte_compile.routing.router import routers
from lte_compile.running.tracing import trace_routers
from lte_compile.training.progress import TrainingProgress

RUNTIMES = ("torch", "ort")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """As the command's options; `stream` shows text on stdout while it is generated."""

    model: str
    prompt: str
    max_new_tokens: int
    runtime: str
    onnx: Path | None
    custom_ops: Path | None
    device: str
    stream: bool


@dataclass
class _Text:
    """Tokens so far as text; what `show` gets adds up to it."""

    tokenizer: Any
    show: Callable[[str], None]
    tokens: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        text = self.text
        if not text.endswith("\ufffd"):  # the first bytes of a character whose rest is still to come
            self.show(text[len(self.shown) :])
            self.shown = text

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))


def generate_text(settings: GenerateSettings) -> Outcome:
    """Generate until the model's end token or `max_new_tokens`.

    Raises:
        ValueError: bad input; no ONNX file for runtime "ort".
    """
    _check(settings)
    with _opened(settings) as (path, generate):
        tokenizer = load_tokenizer(path)
        ids = tokenizer(settings.prompt)["input_ids"]
        if not ids:
            raise ValueError("the prompt holds no token; give a longer one")
        text = _Text(tokenizer, _write if settings.stream else lambda piece: None)
        start = perf_counter()
        density = generate(ids, text.add)
        seconds = perf_counter() - start
    if settings.stream:
        _write(text.text[len(text.shown) :] + "\n")
    return _outcome(settings, text, density, seconds)


# Hands every token to its second argument as it comes; returns the density where it is known.
Generate = Callable[[list[int], Callable[[int], None]], float | None]


def _check(settings: GenerateSettings) -> None:
    if settings.runtime not in RUNTIMES:
        raise ValueError(f"--runtime must be one of {', '.join(RUNTIMES)}; got {settings.runtime!r}")
    if settings.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {settings.max_new_tokens}")
    if settings.onnx is not None and not settings.onnx.is_file():
        raise ValueError(f"{settings.onnx}: no such file")
    _check_model(Path(settings.model).expanduser(), settings.runtime)
    if settings.runtime == "torch" and (settings.onnx is not None or settings.custom_ops is not None):
        raise ValueError("--onnx and --custom-ops are for --runtime ort; add it, or leave them out")


def _check_model(path: Path, runtime: str) -> None:
    """Of what export wrote, the folder is what --runtime ort takes for a model."""
    if path.is_file() and path.suffix == ".onnx":
        raise ValueError(f"{path} is a file; name the folder it was exported to, or the model and --onnx {path}")
    is_export = any(path.glob("*.onnx")) and not (path / "config.json").is_file()
    if runtime == "torch" and is_export:
        raise ValueError(f"{path} is an export, which torch does not run; add --runtime ort")


@contextmanager
def _opened(settings: GenerateSettings) -> Iterator[tuple[Path, Generate]]:
    """The directory of the tokenizer, and what generates."""
    if settings.runtime == "ort":
        from lte_compile.cli.generating_ort import opened  # the extra [onnx], which torch needs not

        with opened(settings.model, settings.onnx, settings.custom_ops, settings.device) as (path, decode):
            yield path, partial(decode, settings.max_new_tokens)
        return
    with TrainingProgress() as progress:
        path = find_model(settings.model, progress)
        generate = _torch_generator(path, settings)
    yield path, generate


def _torch_generator(path: Path, settings: GenerateSettings) -> Generate:
    model, _ = load_causal_lm(path)
    model.eval().to(pick_device(settings.device))

    def generate(ids: list[int], on_token: Callable[[int], None]) -> float | None:
        if not any(routers(model)):
            _generate(model, ids, settings.max_new_tokens, on_token)
            return None
        with trace_routers(model) as trace:
            _generate(model, ids, settings.max_new_tokens, on_token)
        return trace.density()

    return generate


class _Streamer:
    """What transformers' generate() hands tokens to; the prompt comes first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_is_due = True

    def put(self, value: Tensor) -> None:
        if self._prompt_is_due:
            self._prompt_is_due = False
            return
        for token in value.flatten().tolist():
            self._on_token(token)

    def end(self) -> None:
        pass  # there is nothing left to flush


@torch.no_grad()
def _generate(model: nn.Module, ids: list[int], max_new_tokens: int, on_token: Callable[[int], None]) -> None:
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    decoder: Any = model
    decoder.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        streamer=_Streamer(on_token),
    )


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _outcome(settings: GenerateSettings, text: _Text, density: float | None, seconds: float) -> Outcome:
    count = len(text.tokens)
    document = {
        "model": settings.model,
        "runtime": settings.runtime,
        "prompt": settings.prompt,
        "text": text.text,
        "tokens": text.tokens,
        "density": density,
        "seconds": round(seconds, 3),
    }
    share = "" if density is None else f", density {density:.3f}"
    messages().print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second{share}", highlight=False)
    return Outcome(document)
