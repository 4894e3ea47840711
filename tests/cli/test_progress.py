"""lte_compile.training.progress, on a terminal and off it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lte_compile.training.loop import StepEvent
from lte_compile.training.progress import TrainingProgress


def _event(step: int, steps: int = 100, phase: str = "stage 1", density: float | None = None) -> StepEvent:
    return StepEvent(phase=phase, step=step, steps=steps, loss=1.5, density=density, eta=0.0)


def _console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=120), text


def test_a_log_gets_about_ten_lines_a_phase() -> None:
    console, text = _console(terminal=False)
    with TrainingProgress(console) as progress:
        for phase in ("stage 1", "stage 2"):
            for step in range(1, 101):
                progress(_event(step, phase=phase, density=0.25))
    lines = text.getvalue().splitlines()
    assert len(lines) == 2 * 11
    assert lines[0] == "stage 1 1/100, loss 1.500, density 0.250"
    assert lines[-1] == "stage 2 100/100, loss 1.500, density 0.250"


def test_a_terminal_shows_stage_loss_density_and_time_left() -> None:
    console, text = _console(terminal=True)
    with TrainingProgress(console) as progress:
        progress(_event(40))
        progress(_event(41, density=0.125))
        progress(_event(1, phase="stage 2"))
    shown = text.getvalue()
    for part in ("stage 1", "41/100", "loss 1.500, density 0.125", "left", "stage 2", "1/100"):
        assert part in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_work_without_steps_is_announced(terminal: bool) -> None:
    console, text = _console(terminal=terminal)
    with TrainingProgress(console) as progress, progress.working("exporting [x]"):
        pass
    assert "exporting [x]" in text.getvalue()


def test_an_error_inside_stops_the_bars() -> None:
    console, _ = _console(terminal=True)
    with pytest.raises(RuntimeError, match="boom"), TrainingProgress(console) as progress, progress.working("working"):
        raise RuntimeError("boom")
    with TrainingProgress(console) as again:  # rich refuses a second live display on a console that still has one
        again.say("fine")
