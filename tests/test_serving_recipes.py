"""The recipes of docs/serving.md, block by block: commands by the command line's own code, Python as it stands there.

The one thing that is not here is a Triton server. A stand-in answers in its place: it holds requests to config.pbtxt
and runs the file that the server would.
"""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lte_compile.checkpoints.persistence import save_pretrained
from lte_compile.cli.app import app
from lte_compile.exporters.runtime import run
from tests.exporters.hard import shallow
from tests.exporters.model_config import parse_model_config
from tests.zoo import VOCAB

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
PROMPT = "once upon a time"
MODELS = {"my-decoder": "llama", "my-encoder": "bert", "my-translator": "t5"}


class Block(NamedTuple):
    """A fenced block, and the heading it stands under."""

    section: str
    language: str
    code: str


def blocks() -> list[Block]:
    found, section = [], ""
    for heading, language, code in re.findall(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        section = heading or section
        if code and section.startswith(("Recipe", "Encoder-decoders")):
            found.append(Block(section, language, code))
    return found


def python_block(word: str) -> Block:
    (found,) = [block for block in blocks() if block.language == "python" and word in block.code]
    return found


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges: the kind of tokenizer that every runtime reads."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(set("Ġabcdefghijklmnopqrstuvwxyz0123456789.,!?"))
    merges = [("o", "n"), ("Ġ", "t"), ("Ġ", "u"), ("m", "e")]
    words = [*specials, *letters, *("".join(pair) for pair in merges)]
    words += [f"<{number}>" for number in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the page is read in: its models, and what its commands make of them."""
    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("desk")
        patch.chdir(here)
        for directory, family in MODELS.items():
            save_pretrained(shallow(family)[0], here / directory, byte_level_tokenizer())
        run_commands("Recipe")
        yield here


def run_commands(section: str) -> None:
    """What the page's `sh` blocks under such headings say."""
    codes = [block.code for block in blocks() if block.language == "sh" and block.section.startswith(section)]
    for line in "".join(codes).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "lte-compile", line
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}: {result.stderr}"


def run_python(block: Block, **replaced: str) -> None:
    code = block.code
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, f"{PAGE.name}: {block.section}", "exec"), {"__name__": "__main__"})


def generated(arguments: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, ["generate", "my-decoder", PROMPT, "--json", *arguments])
    assert result.exit_code == 0, result.stderr
    return str(json.loads(result.stdout)["text"])


def test_every_block_is_run() -> None:
    sections = {block.section.split(":")[0] for block in blocks()}
    assert sections == {"Recipe 1", "Recipe 2", "Recipe 3", "Encoder-decoders"}
    assert {block.language for block in blocks()} == {"sh", "python"}
    assert len([block for block in blocks() if block.language == "python"]) == 5


def test_python_streams_what_torch_generates(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(python_block("OrtGenerator"))
    assert capsys.readouterr().out == generated(("--max-new-tokens", "32"))


def test_python_runs_an_encoder(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(python_block("served/encoder"))
    assert capsys.readouterr().out == "{'logits': (2, 3)}\n"


def test_genai_streams_what_torch_generates(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    run_python(python_block("onnxruntime_genai"))
    prompt = len(byte_level_tokenizer()(PROMPT)["input_ids"])
    assert capsys.readouterr().out == generated(("--max-new-tokens", str(64 - prompt)))


@pytest.mark.slow
def test_encoder_decoders_stream_tokens(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_commands("Encoder-decoders")
    run_python(python_block("OrtSeq2SeqGenerator"))
    assert len(json.loads(capsys.readouterr().out)) == 8


def test_a_triton_client_is_answered(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_server = _StandIn(desk / "repository")
    try:
        run_python(python_block("urlopen"), **{"http://localhost:8000": with_server.address})
    finally:
        with_server.close()
    assert capsys.readouterr().out == "logits [1, 3]\n"


class _StandIn:
    """Answers KServe's inference protocol, version 2 in JSON, for the models of a Triton repository."""

    def __init__(self, repository: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                name = re.fullmatch(r"/v2/models/([\w-]+)/infer", self.path)
                assert name is not None
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(_answer(repository / name[1], request)).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass  # nothing on stderr

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _answer(model: Path, request: dict[str, Any]) -> dict[str, Any]:
    config = parse_model_config((model / "config.pbtxt").read_text(encoding="utf-8"))
    kinds = {"INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}
    given = {tensor["name"]: tensor for tensor in request["inputs"]}
    assert set(given) == {tensor.name for tensor in config.input}
    for tensor in config.input:
        number = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
        assert tensor.data_type == number[kinds[given[tensor.name]["datatype"]]].number
        shape = given[tensor.name]["shape"]
        assert all(dim in (-1, size) for dim, size in zip(tensor.dims, shape, strict=True))
    feed = {name: np.reshape(tensor["data"], tensor["shape"]) for name, tensor in given.items()}
    outputs = run(model / "1" / "model.onnx", feed)
    assert set(outputs) == {tensor.name for tensor in config.output}
    return {"outputs": [{"name": name, "shape": value.shape} for name, value in outputs.items()]}
