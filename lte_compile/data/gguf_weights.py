"""A quantised GGUF file becomes an ordinary transformers directory, once."""

from __future__ import annotations

from pathlib import Path

import torch


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write config, float32 safetensors, tokenizer and generation config of a LLaMA-family GGUF file.

    transformers dequantises, but marks what it loaded as quantised and refuses to save it; so the weights move into a
    plain `LlamaForCausalLM`, which trains, exports and saves like any other.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{gguf.name} holds a {type(loaded).__name__}; only LlamaForCausalLM files are converted")
    record = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        record.pop(key, None)
    plain = LlamaForCausalLM(LlamaConfig(**record))
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
