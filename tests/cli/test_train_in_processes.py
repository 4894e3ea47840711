"""The commands of docs/training.md that train in several processes, run with gloo on CPUs."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.cli.conftest import LLAMA_RUN

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^ {4}(.* -m lte_compile\.cli train .*)$", (ROOT / "docs" / "training.md").read_text(), re.M)
PORT_OPTIONS = {"torchrun": "--master-port", "accelerate": "--main_process_port"}
PLACEHOLDERS = {"MODEL", "OUT", "TASK"}

pytestmark = pytest.mark.slow


def launch(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run a launcher from this Python's folder, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher, *rest = map(str, command)
    where = rest.index("-m" if "-m" in rest else "--")
    arguments = [*rest[:where], PORT_OPTIONS[launcher], port, *rest[where:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(Path(sys.executable).parent / launcher), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_page_has_a_command_for_every_launcher() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["torchrun", "accelerate", "accelerate"]
    assert all(set(command.split()) > PLACEHOLDERS for command in COMMANDS)


@pytest.fixture(scope="module")
def alone(llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The directory and the result of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    arguments = ["train", llama, out, "--task", prose, *LLAMA_RUN, "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "lte_compile.cli", *map(str, arguments)], cwd=ROOT, capture_output=True, check=True
    )
    return out, json.loads(run.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_result_is_that_of_one_process(
    command: str, llama: Path, prose: Path, alone: tuple[Path, Any], tmp_path: Path
) -> None:
    places = {"MODEL": llama, "OUT": tmp_path / "out", "TASK": prose}
    words = [str(places.get(word, word)) for word in shlex.split(command)]
    run = launch([*words, *LLAMA_RUN, "--device", "cpu", "--json"])
    assert run.returncode == 0, run.stderr
    expected_out, expected = alone
    result = json.loads(run.stdout)  # of one process only
    assert result["sparse"]["density"] == pytest.approx(expected["sparse"]["density"], abs=2e-3)
    assert result["sparse"]["loss"] == pytest.approx(expected["sparse"]["loss"], rel=1e-3)
    weights, wanted = (load_file(where / "model.safetensors") for where in (tmp_path / "out", expected_out))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():  # 8 steps of 1e-4 in float32, some of them the sign of rounding
        assert_close(weights[name], weight, rtol=0, atol=2e-4)
    assert run.stderr.count("stage 1 1/6") == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="every process takes a GPU of its own")
@pytest.mark.parametrize("command", COMMANDS)
def test_on_gpus_the_densities_are_those_of_one_process(
    command: str, llama: Path, prose: Path, alone: tuple[Path, Any], tmp_path: Path
) -> None:
    places = {"MODEL": llama, "OUT": tmp_path / "out", "TASK": prose}
    run = launch([*(places.get(word, word) for word in shlex.split(command)), *LLAMA_RUN, "--json"])
    assert run.returncode == 0, run.stderr
    sparse, expected = json.loads(run.stdout)["sparse"], alone[1]["sparse"]
    assert sparse["density"] == pytest.approx(expected["density"], abs=0.02)  # scores near tau, summed in other orders
    assert sparse["loss"] == pytest.approx(expected["loss"], rel=0.01)


FAILING = """
import os
from lte_compile.cli import training
from lte_compile.cli.app import main

def fail(*arguments: object, **more: object) -> None:
    raise RuntimeError("this process is out of luck")

if os.environ["RANK"] == "1":
    training.transform = fail
main()
"""


def test_a_failure_of_one_process_ends_all_with_one_message(llama: Path, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    train = ["train", llama, tmp_path / "out", "--task", prose, *LLAMA_RUN]
    run = launch(["torchrun", "--nproc-per-node", "2", "--", tmp_path / "failing.py", *train])
    assert run.returncode != 0
    assert re.findall("^error: .*", run.stderr, re.M) == ["error: this process is out of luck"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_bad_input_is_reported_once(llama: Path, prose: Path, tmp_path: Path) -> None:
    train = ["train", llama, tmp_path / "out", "--task", prose, "--batch-size", "1"]
    run = launch(["torchrun", "--nproc-per-node", "2", "-m", "lte_compile.cli", *train])
    assert run.returncode != 0
    (message,) = re.findall("^error: .*", run.stderr, re.M)
    assert "batches of 1 cannot be shared by 2 processes" in message
    assert not (tmp_path / "out").exists()
