"""What holds for every command: exit codes, one line of error, nothing but the result on stdout, a quick start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lte_compile.cli import commands
from lte_compile.cli.app import app
from lte_compile.cli.output import finite
from tests.cli.conftest import Run

COMMANDS = ("inspect", "convert", "train", "evaluate", "export", "generate", "bench", "demo")


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(run: Run, command: str) -> None:
    assert "--json" in run(command, "--help").stdout


def test_help_does_not_import_transformers() -> None:
    """It takes seconds. (torch comes with the package: importing it registers the ops.)"""
    code = "import sys, lte_compile.cli; print({'transformers', 'onnx', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def _arguments(command: str, model: object, out: object, task: object) -> tuple[object, ...]:
    return {
        "inspect": ("inspect", model),
        "convert": ("convert", model, out),
        "train": ("train", model, out, "--task", task),
        "evaluate": ("evaluate", model, "--task", task),
        "export": ("export", model, out),
        "generate": ("generate", model, "a prompt"),
        "bench": ("bench", model),
    }[command]


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_a_model_that_is_not_there(run: Run, tmp_path: Path, labelled: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    directory = run(*_arguments(command, tmp_path / "empty", tmp_path / "out", labelled))
    assert directory.exit_code == 2
    assert "no config.json" in directory.stderr
    assert directory.stdout == ""
    unknown = run(*_arguments(command, "nobody/no-such-model", tmp_path / "out", labelled))
    assert unknown.exit_code == 1  # offline: not the user's mistake for certain
    assert "nobody/no-such-model" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "train", "export"])
def test_an_unwritable_out_is_found_before_the_work(
    run: Run, trained_bert: Path, labelled: Path, unwritable: Path, command: str
) -> None:
    result = run(*_arguments(command, trained_bert, unwritable, labelled))
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert "transforming" not in result.stderr
    assert "exporting" not in result.stderr


def test_results_are_not_written_over_models(run: Run, bert: Path, llama: Path, tmp_path: Path) -> None:
    onto_itself = run("convert", bert, bert, "--overwrite")
    assert onto_itself.exit_code == 2
    assert "the model to read" in onto_itself.stderr
    onto_another = run("convert", bert, llama)
    assert onto_another.exit_code == 2
    assert "--overwrite" in onto_another.stderr
    assert run("convert", bert, tmp_path / "out").exit_code == 0
    assert run("convert", bert, tmp_path / "out", "--overwrite").exit_code == 0


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    "task, says",
    [("trek", "did you mean 'trec'"), ("sotuu", "did you mean 'sotu'"), ("nothing.csv", "nothing.csv: no such file")],
)
def test_an_unknown_task_is_answered_with_the_known_ones(
    run: Run, bert: Path, tmp_path: Path, command: str, task: str, says: str
) -> None:
    result = run(*_arguments(command, bert, tmp_path / "out", task))
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_damaged_weights(run: Run, bert: Path, converted: Path, tmp_path: Path) -> None:
    for source in (bert, converted):
        copy = tmp_path / source.name
        copy.mkdir()
        for file in source.iterdir():
            content = file.read_bytes()
            (copy / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
        result = run("inspect", copy)
        assert result.exit_code == 2
        assert "cut short or corrupt" in result.stderr


def test_a_model_without_a_tokenizer(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    result = run("train", tmp_path, tmp_path / "out", "--task", labelled)
    assert result.exit_code == 2
    assert "no tokenizer" in result.stderr


def test_debug_lets_the_exception_through(bert: Path) -> None:
    result = CliRunner().invoke(app, ["--debug", "evaluate", str(bert), "--task", "trek"])
    assert isinstance(result.exception, ValueError)


def test_defects_end_in_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """Through the entry point, whose excepthook speaks for exceptions that no command foresees."""
    code = (
        "import sys\nfrom lte_compile.cli import app, main\n"
        "def fail(*_): raise KeyError('unforeseen')\n"
        "import lte_compile.cli.commands as commands\ncommands._show = fail\n"
        "sys.argv = ['lte-compile', 'inspect', 'x']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: KeyError: 'unforeseen'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_gpu_is_named_with_what_helps(bert: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 24.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 29.38 "
            "MiB is free. Process 679 has 66.00 MiB memory in use. See documentation for Memory Management"
        )

    monkeypatch.setattr(commands, "_show", full)
    result = run("inspect", bert)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the GPU has no memory left. A smaller --batch-size")
    assert "which 29.38 MiB is free.)" in result.stderr
    assert "Process 679" not in result.stderr


def test_numbers_that_json_has_not_become_null() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}
