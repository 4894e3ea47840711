"""Running exported files with numpy and ONNX Runtime alone: this module imports neither torch nor lte_compile.

Shape suffixes: B batch, T tokens, H key/value heads, P past tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]

_DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def open_session(
    path: str | PathLike[str], *, custom_ops: str | PathLike[str] | None = None, threads: int | None = None
) -> ort.InferenceSession:
    """A CPU session. `custom_ops` is a library of `SparseFFN` kernels; without one the file's own function runs."""
    options = ort.SessionOptions()
    if custom_ops is not None:
        options.register_custom_ops_library(fspath(custom_ops))
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(fspath(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs by name. `session` is an InferenceSession or a path; inputs are cast to the types the model declares.

    Raises:
        ValueError: an input is missing or unknown.
    """
    session = session if isinstance(session, ort.InferenceSession) else open_session(session)
    declared = {value.name: value for value in session.get_inputs()}
    if set(inputs) != set(declared):
        raise ValueError(f"the model takes {sorted(declared)}; got {sorted(inputs)}")
    feed = {name: np.asarray(value, _numpy_dtype(declared[name].type)) for name, value in inputs.items()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


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
        batch = ids_BT.shape[0]
        past = self.empty_cache(batch)
        is_done_B = np.zeros(batch, bool)
        for _ in range(max_new_tokens):
            logits_BTV, past = self.step(ids_BT, mask_BT, past)
            next_B = np.where(is_done_B, pad_token_id, logits_BTV[:, -1].argmax(-1)).astype(np.int64)
            yield next_B
            if eos_token_id is not None:
                is_done_B |= next_B == eos_token_id
                if is_done_B.all():
                    return
            ids_BT = next_B[:, None]
            mask_BT = np.concatenate([mask_BT, np.ones((batch, 1), np.int64)], axis=1)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Array:
        """Prompt and continuation, int64 [B, T + new]. Options as for `stream`."""
        ids_BT, _ = _prompt(input_ids, attention_mask)
        tokens = list(self.stream(input_ids, attention_mask, **options))
        return np.concatenate([ids_BT, *(token_B[:, None] for token_B in tokens)], axis=1)

    def empty_cache(self, batch: int) -> dict[str, Array]:
        """What `step` takes for a first call: no past for any layer."""
        return {cache.name: cache.empty(batch) for cache in self.caches}

    def step(self, ids_BT: Array, mask_BT: Array, past: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """One call of the model: logits [B, T, V] of the new tokens `ids_BT`, and the grown cache.

        `mask_BT` covers past and new tokens, [B, P + T].
        """
        positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)[:, -ids_BT.shape[1] :]
        feed = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
        feed = {name: value for name, value in feed.items() if name in self.input_names} | dict(past)
        wanted = ["logits", *(cache.present for cache in self.caches)]
        logits_BTV, *present = self.session.run(wanted, feed)
        return logits_BTV, {cache.name: value for cache, value in zip(self.caches, present, strict=True)}


def greedy_generate(
    session: Any, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 16, **options: Any
) -> Array:
    """`OrtGenerator(session).generate(...)` in one call: int64 [B, T + new]."""
    return OrtGenerator(session).generate(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)


def _cache_input(value: Any) -> _CacheInput:
    _, heads, _, width = value.shape
    present = value.name.replace("past_key_values.", "present.", 1)
    return _CacheInput(value.name, present, heads, width, _numpy_dtype(value.type))


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
