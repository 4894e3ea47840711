"""Model directories, dense or transformed, as models with the head and the tokenizer that a task needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from lte_compile.checkpoints.persistence import load_pretrained
from lte_compile.huggingface.registration import register_with_transformers

# Any one of these makes a directory's tokenizer; without one, transformers may build an empty tokenizer in silence.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tekken.json")


def load_model(path: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a directory, in the class its config names, in eval mode; transformed ones with their routers.

    Args:
        dtype: of the parameters; by default as saved.

    Raises:
        ValueError: the directory is damaged, or names a class that transformers does not have.
    """
    if is_transformed(path):
        return load_pretrained(path, dtype=dtype)
    return _from_pretrained(_model_class(path), path, dtype=dtype or "auto").eval()


def load_on_meta(path: Path, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """`load_model` of a dense directory without reading its weights: they have shapes and dtypes, and no data.

    Also returns what transformers says about the checkpoint: its missing and unexpected keys.
    """
    options = {"device_map": "meta", "dtype": dtype or "auto", "output_loading_info": True}
    loaded: Any = _from_pretrained(_model_class(path), path, **options)
    model, info = loaded
    return model.eval(), info


def _model_class(path: Path) -> Any:
    name = _architecture(path)
    if not hasattr(transformers, name):
        raise ValueError(f"transformers {transformers.__version__} has no class {name!r}, which {path} was saved from")
    return getattr(transformers, name)


def load_classifier(path: Path, labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """A sequence classifier over `labels` in float32, and its tokenizer.

    A directory that holds no classifier over these labels (`has_classifier`) gets a new head, drawn from torch's
    generator.

    Raises:
        ValueError: the directory is damaged, has no tokenizer, or its architecture has no classifier.
    """
    tokenizer = load_tokenizer(path)
    naming = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = _from_pretrained(
        transformers.AutoModelForSequenceClassification,
        path,
        dtype=torch.float32,
        ignore_mismatched_sizes=not has_classifier(path, labels),
        **naming,
    )
    config: Any = model.config
    if config.pad_token_id is None:  # decoders find each text's last token by it
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model, tokenizer


def load_causal_lm(path: Path) -> tuple[nn.Module, Any]:
    """A language model in float32, and its tokenizer.

    Raises:
        ValueError: the directory is damaged, has no tokenizer, or holds no causal language model.
    """
    check_causal_lm(path)
    model = _from_pretrained(transformers.AutoModelForCausalLM, path, dtype=torch.float32)
    return model, load_tokenizer(path)


def check_causal_lm(path: Path) -> None:
    """A ValueError where `load_causal_lm` would have to make up a head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = _architecture(path)
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"{path} holds a {name}, which is no causal language model")


def check_generates(path: Path) -> None:
    """A ValueError where the model has no head to generate text with, be it a decoder or an encoder-decoder."""
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    name = _architecture(path)
    if not any(name in kind.values() for kind in kinds):
        raise ValueError(f"{path} holds a {name}, which is no causal language model and no encoder-decoder with a head")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory; a ValueError if it has none."""
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{path} has no tokenizer; save one beside the model (tokenizer.save_pretrained)")
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def is_transformed(path: Path) -> bool:
    """Whether a directory's model was saved with routers."""
    record = _config(path).get("quantization_config") or {}
    return bool(record.get("quant_method") == "lte")


def has_classifier(path: Path, labels: Sequence[str]) -> bool:
    """Whether a directory holds a classifier trained for these labels. Unnamed ones count by their number."""
    if not _architecture(path).endswith("ForSequenceClassification"):
        return False
    return _labels_of(path) in (tuple(labels), _unnamed(len(labels)))


def labels_in_order(path: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """The labels as the directory's classifier numbers them: by its names for them, in whatever order, or, where it has
    none, by the numbers that the labels are. As they are where neither says anything."""
    if not _architecture(path).endswith("ForSequenceClassification"):
        return tuple(labels)
    own, numbers = _labels_of(path), tuple(map(str, range(len(labels))))
    if set(own) == set(labels):
        return own
    return numbers if own == _unnamed(len(labels)) and set(numbers) == set(labels) else tuple(labels)


def _labels_of(path: Path) -> tuple[str, ...]:
    names = {int(index): str(name) for index, name in (_config(path).get("id2label") or {}).items()}
    return tuple(names[index] for index in sorted(names)) or _unnamed(2)  # transformers' default


def _unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls labels that were given no names."""
    return tuple(f"LABEL_{index}" for index in range(count))


def _architecture(path: Path) -> str:
    names = _config(path).get("architectures")
    if not names:
        raise ValueError(f'{path / "config.json"} does not name the model class; add "architectures": ["..."]')
    return str(names[0])


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a model directory: it holds no config.json")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return record


def _from_pretrained(model_class: Any, path: Path, **options: Any) -> nn.Module:
    register_with_transformers()
    try:
        model: nn.Module = model_class.from_pretrained(path, use_safetensors=True, local_files_only=True, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are cut short or corrupt ({error}); copy or save them again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model
