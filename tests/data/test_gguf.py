"""What a GGUF file says of its special tokens is what its tokenizer has, whatever transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lte_compile.data.gguf_weights import set_special_tokens

WORDS = {"<unknown>": 0, "<begin>": 1, "<end>": 2, "word": 3}


def tokenizer_as_loaded(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(WORDS, "<unknown>")), **special)


def test_the_files_tokens_replace_others(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = tokenizer_as_loaded(eos_token="<begin>", unk_token="<unknown>")
    set_special_tokens(tokenizer, path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<unknown>"  # the file is silent
    assert len(tokenizer) == len(WORDS)
