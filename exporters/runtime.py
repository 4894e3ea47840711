"""Running exported files with numpy and ONNX Runtime alone: this module imports neither torch nor lte_compile.

Shape suffixes: B batch, T tokens, H key/value heads, P past tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from os.path import isfile
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    RuntimeException,
)
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByOrt

Array = NDArray[Any]
Cache = Mapping[str, ort.OrtValue]

_DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_PROVIDERS: Final[Mapping[str, str]] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What onnxruntime raises where it cannot load a model, a library or a provider; they share no base but Exception.
_REFUSALS: Final = (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplementedByOrt,
    RuntimeError,
    RuntimeException,
)


def open_session(
    path: str | PathLike[str],
    *,
    custom_ops: str | PathLike[str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> ort.InferenceSession:
    """A session on `device`, "cpu" or "cuda".

    `custom_ops` is a library of `SparseFFN` kernels; without one the file's own function runs.

    Raises:
        ValueError: another device, one this onnxruntime was not built for, or one that it cannot use here; no such
            library; a file or library that onnxruntime refuses, such as bfloat16 on a CPU.
    """
    providers, options = _providers(device), ort.SessionOptions()
    if custom_ops is not None:
        register_library(options, custom_ops)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # Without ONNX Runtime's fallback, which prints the error and goes on with the CPU.
        session = ort.InferenceSession(fspath(path), options, providers=providers, enable_fallback=0)
    except _REFUSALS as error:
        said = f"onnxruntime {ort.__version__} cannot run {fspath(path)} on {device}: {_advice(error, device)}{error}"
        raise ValueError(said) from error
    if _PROVIDERS[device] not in session.get_providers():  # it only warns where CUDA's libraries are missing
        raise ValueError(
            f"onnxruntime {ort.__version__} could not start {_PROVIDERS[device]}, and its warning says why; check the "
            'GPU, its driver and CUDA\'s libraries (pip install "onnxruntime-gpu[cuda,cudnn]"), or use cpu'
        )
    return session


def _advice(error: BaseException, device: str) -> str:
    """What to do, where ONNX Runtime's own words do not say it."""
    if "is under development" in str(error):  # of an opset that is newer than the release
        return "export it with a lower opset for this release; "
    if isinstance(error, NotImplementedByOrt) and device == "cpu":  # of a type, most often bfloat16
        return "export it in float32 or float16 for a CPU; "
    return ""


def register_library(options: ort.SessionOptions, library: str | PathLike[str]) -> None:
    """Sessions with these options will use the library's kernels.

    Raises:
        ValueError: no such file, or none that onnxruntime can load.
    """
    path = fspath(library)
    if not isfile(path):
        raise ValueError(f"{path}: no such library of custom operators; leave it out to run the file's own function")
    try:
        options.register_custom_ops_library(path)
    except _REFUSALS as error:
        raise ValueError(f"onnxruntime {ort.__version__} cannot load {path}: {error}") from error


def _providers(device: str) -> list[str]:
    if device not in _PROVIDERS:
        raise ValueError(f"device must be one of {', '.join(_PROVIDERS)}; got {device!r}")
    wanted = _PROVIDERS[device]
    if wanted not in ort.get_available_providers():
        raise ValueError(f"this onnxruntime has no {wanted}; install onnxruntime-gpu for cuda, or use cpu")
    return list(dict.fromkeys([wanted, _PROVIDERS["cpu"]]))


def run(session: Any, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs by name. `session` is an InferenceSession or a path; inputs are cast to the types the model declares.

    Raises:
        ValueError: an input is missing or unknown.
    """
    session = session if isinstance(session, ort.InferenceSession) else open_session(session)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, _feed(session, inputs)), strict=True))


def _feed(session: ort.InferenceSession, inputs: Mapping[str, Any]) -> dict[str, Array]:
    declared = {value.name: value for value in session.get_inputs()}
    if set(inputs) != set(declared):
        raise ValueError(f"the model takes {sorted(declared)}; got {sorted(inputs)}")
    return {name: np.asarray(value, _numpy_dtype(declared[name].type)) for name, value in inputs.items()}


def max_abs_difference(left: Any, right: Any) -> float:
    """Largest absolute difference of two arrays of one shape, in float64; 0.0 for empty arrays."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape:
        raise ValueError(f"arrays of different shapes: {left.shape} and {right.shape}")
    return float(np.abs(left - right).max(initial=0.0))


def _numpy_dtype(kind: str) -> type[np.generic]:
    if kind not in _DTYPES:
        raise ValueError(f"numpy has no type for {kind}; export the model in float32 or float16")
    return _DTYPES[kind]


@dataclass(frozen=True)
class _CacheInput:
    """One `past_key_values.N.key` or `.value` input, and the output that continues it."""

    name: str
    present: str
    heads: int
    width: int
    dtype: type[np.generic]

    def empty(self, batch: int) -> Array:
        """No past at all, as `run` takes it."""
        return np.zeros((batch, self.heads, 0, self.width), self.dtype)


class OrtGenerator:
    """Greedy decoding with a decoder exported by `export_onnx(..., kv_cache=True)`.

    Args:
        session: an InferenceSession or the file's path.

    Raises:
        ValueError: the model has no key/value cache inputs.
    """

    def __init__(self, session: Any) -> None:
        self.session = session if isinstance(session, ort.InferenceSession) else open_session(session)
        inputs = self.session.get_inputs()
        self.input_names = frozenset(value.name for value in inputs)
        self.caches = tuple(_cache_input(value) for value in inputs if value.name.startswith("past_key_values."))
        if not self.caches or "input_ids" not in self.input_names:
            raise ValueError(
                f"the model takes {sorted(self.input_names)}, not input_ids and past_key_values.N.key/value; "
                "export it with export_onnx(..., kv_cache=True)"
            )

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
    ) -> Iterator[Array]:
        """Yield the next token of every sequence, int64 [B], up to `max_new_tokens` times.

        Args:
            input_ids: int64 [B, T], or [T] for one sequence; shorter sequences are padded on the left.
            attention_mask: [B, T], 0 where padded; all ones by default.
            eos_token_id: a sequence that produced it yields `pad_token_id` from then on; ends when all have.
        """
        ids_BT, mask_BT = _prompt(input_ids, attention_mask)
        state = (mask_BT, self.empty_cache(len(ids_BT)))
        yield from _greedy(self._advance, ids_BT, state, max_new_tokens, eos_token_id, pad_token_id)

    def _advance(self, ids_BT: Array, state: tuple[Array, Cache]) -> tuple[Array, tuple[Array, Cache]]:
        mask_BT, past = state
        logits_BTV, past = self.step(ids_BT, mask_BT, past)
        return logits_BTV, (np.pad(mask_BT, ((0, 0), (0, 1)), constant_values=1), past)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Array:
        """Prompt and continuation, int64 [B, T + new]. Options as for `stream`."""
        ids_BT, _ = _prompt(input_ids, attention_mask)
        tokens = list(self.stream(input_ids, attention_mask, **options))
        return np.concatenate([ids_BT, *(token_B[:, None] for token_B in tokens)], axis=1)

    def empty_cache(self, batch: int) -> Cache:
        """What `step` takes for a first call: no past for any layer."""
        return _empty(self.caches, batch)

    def step(self, ids_BT: Array, mask_BT: Array, past: Cache) -> tuple[Array, Cache]:
        """One call of the model: logits [B, T, V] of the new tokens `ids_BT`, and the grown cache.

        `mask_BT` covers past and new tokens, [B, P + T]. The cache stays on the session's device: what one call puts
        out is bound as the input of the next, and Python never sees its values.
        """
        positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)[:, -ids_BT.shape[1] :]
        feed = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
        logits, *present = _run_bound(self.session, feed, past, ["logits", *(cache.present for cache in self.caches)])
        return logits.numpy(), {cache.name: value for cache, value in zip(self.caches, present, strict=True)}


def greedy_generate(
    session: Any, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 16, **options: Any
) -> Array:
    """`OrtGenerator(session).generate(...)` in one call: int64 [B, T + new]."""
    return OrtGenerator(session).generate(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)


class OrtSeq2SeqGenerator:
    """Greedy decoding with the two files that `export_folder(..., kv_cache=True)` writes of an encoder-decoder.

    Args:
        encoder: an InferenceSession or the path of encoder_model.onnx; `decoder` likewise of decoder_model.onnx.
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        self.encoder = encoder if isinstance(encoder, ort.InferenceSession) else open_session(encoder)
        self.decoder = decoder if isinstance(decoder, ort.InferenceSession) else open_session(decoder)
        inputs = self.decoder.get_inputs()
        self.caches = tuple(_cache_input(value) for value in inputs if ".decoder." in value.name)
        self.read_names = tuple(value.name for value in inputs if ".encoder." in value.name)

    def stream(
        self,
        source: Mapping[str, Any],
        *,
        start_token_id: int,
        max_new_tokens: int,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
    ) -> Iterator[Array]:
        """Yield the next token of every sequence, int64 [B], up to `max_new_tokens` times.

        Args:
            source: inputs of the encoder by name, such as input_ids and attention_mask.
            start_token_id: the token that every target begins with, decoder_start_token_id in transformers.
            eos_token_id, pad_token_id: as for `OrtGenerator.stream`.
        """
        feed = _feed(self.encoder, source)
        batch = len(next(iter(feed.values())))
        read = self.read(feed)

        def advance(ids_BT: Array, past: Cache) -> tuple[Array, Cache]:
            return self.step(ids_BT, feed.get("attention_mask"), read, past)

        first_BT = np.full((batch, 1), start_token_id, np.int64)
        past = self.empty_cache(batch)
        yield from _greedy(advance, first_BT, past, max_new_tokens, eos_token_id, pad_token_id)

    def empty_cache(self, batch: int) -> Cache:
        """What `step` takes for a first call: no past for any layer."""
        return _empty(self.caches, batch)

    def read(self, source: Mapping[str, Array]) -> Cache:
        """What cross attention needs of the source, computed once and kept on the session's device."""
        names = [_present(name) for name in self.read_names]
        return dict(zip(self.read_names, _run_bound(self.encoder, source, {}, names), strict=True))

    def step(self, ids_BT: Array, mask_BS: Array | None, read: Cache, past: Cache) -> tuple[Array, Cache]:
        """One call of the decoder: logits [B, T, V] of the new tokens `ids_BT`, and the grown cache."""
        feed = {"input_ids": ids_BT} | ({} if mask_BS is None else {"encoder_attention_mask": mask_BS})
        wanted = ["logits", *(cache.present for cache in self.caches)]
        logits, *present = _run_bound(self.decoder, feed, {**read, **past}, wanted)
        return logits.numpy(), {cache.name: value for cache, value in zip(self.caches, present, strict=True)}


def _greedy(
    advance: Callable[[Array, Any], tuple[Array, Any]],
    ids_BT: Array,
    state: Any,
    max_new_tokens: int,
    eos_token_id: int | None,
    pad_token_id: int,
) -> Iterator[Array]:
    """Next tokens [B], each fed back to `advance`, which maps new tokens and a state to logits and the next state."""
    is_done_B = np.zeros(len(ids_BT), bool)
    for _ in range(max_new_tokens):
        logits_BTV, state = advance(ids_BT, state)
        next_B = np.where(is_done_B, pad_token_id, logits_BTV[:, -1].argmax(-1)).astype(np.int64)
        yield next_B
        if eos_token_id is not None:
            is_done_B |= next_B == eos_token_id
            if is_done_B.all():
                return
        ids_BT = next_B[:, None]


def _run_bound(
    session: ort.InferenceSession, feed: Mapping[str, Array], held: Cache, wanted: Sequence[str]
) -> list[ort.OrtValue]:
    """Outputs that stay where the session computes them, from arrays and from such outputs of an earlier run.

    Only logits come to the CPU. Outputs are bound anew for each run, as their sizes change and ONNX Runtime would
    otherwise write into the last run's.
    """
    device = "cuda" if _PROVIDERS["cuda"] in session.get_providers() else "cpu"
    taken = {value.name for value in session.get_inputs()}
    binding = session.io_binding()
    for name in taken & feed.keys():
        binding.bind_cpu_input(name, np.ascontiguousarray(feed[name]))
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in wanted:
        binding.bind_output(name, "cpu" if name == "logits" else device)
    session.run_with_iobinding(binding)
    outputs: list[ort.OrtValue] = binding.get_outputs()
    return outputs


def _empty(caches: Sequence[_CacheInput], batch: int) -> Cache:
    return {cache.name: ort.OrtValue.ortvalue_from_numpy(cache.empty(batch)) for cache in caches}


def _cache_input(value: Any) -> _CacheInput:
    _, heads, _, width = value.shape
    return _CacheInput(value.name, _present(value.name), heads, width, _numpy_dtype(value.type))


def _present(name: str) -> str:
    """The output that continues the cache input `name`."""
    return name.replace("past_key_values.", "present.", 1)


def _prompt(input_ids: Any, attention_mask: Any) -> tuple[Array, Array]:
    ids_BT = np.atleast_2d(np.asarray(input_ids, np.int64))
    mask_BT = np.ones_like(ids_BT) if attention_mask is None else np.atleast_2d(np.asarray(attention_mask, np.int64))
    if ids_BT.ndim != 2 or ids_BT.size == 0 or mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"input_ids must be [batch, tokens] with a mask of the same shape; got {ids_BT.shape}, {mask_BT.shape}"
        )
    if not mask_BT[:, -1].all():
        raise ValueError("attention_mask ends in 0: pad prompts on the left, so that every one ends at the last column")
    return ids_BT, mask_BT
