"""A quantised GGUF file becomes an ordinary transformers directory, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write config, float32 safetensors, tokenizer and generation config of a LLaMA-family GGUF file.

    transformers dequantises, but marks what it loaded as quantised and refuses to save it; so the weights move into a
    plain `LlamaForCausalLM`, which trains, exports and saves like any other.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    set_special_tokens(tokenizer, gguf)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{gguf.name} holds a {type(loaded).__name__}; only LlamaForCausalLM files are converted")
    record = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        record.pop(key, None)
    plain = LlamaForCausalLM(LlamaConfig(**record))
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    plain.config.update(ids)
    plain.generation_config = GenerationConfig(**ids)
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def set_special_tokens(tokenizer: Any, gguf: Path) -> None:
    """As the file says: transformers 5.17 takes another token for the end of a text, and none for padding."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for attribute, kind in kinds.items():
        field = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if field is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))
