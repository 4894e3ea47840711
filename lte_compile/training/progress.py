"""What a long run is doing: bars on a terminal (stage, loss, density, time left), now and then a line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

if TYPE_CHECKING:  # importing it would import torch, which a command line's --help has no use for
    from lte_compile.training.loop import StepEvent

# Lines per phase where there is no terminal: enough to see a log move, few enough to read.
LINES_PER_PHASE = 10


class TrainingProgress:
    """An `on_step` callback of `lte_compile.train` that shows every phase's progress.

        with TrainingProgress() as progress:
            with progress.working("loading"):
                ...
            train(model, batches, config, on_step=progress)

    Writes to stderr unless given a console. Where that is no terminal, each phase gives about ten lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._latest: StepEvent | None = None

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self._bars = _bars(self.console)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, event: StepEvent) -> None:
        """Show one finished step."""
        is_new = self._latest is None or self._latest.phase != event.phase or self._latest.step >= event.step
        self._latest = event
        if self._bars is None:
            if is_new or event.step == event.steps or event.step % max(event.steps // LINES_PER_PHASE, 1) == 0:
                self.say(f"{event.phase} {event.step}/{event.steps}, {_measures(event)}")
            return
        if is_new or self._task is None:  # a resumed phase starts in the middle: its past says nothing about its speed
            self._task = self._bars.add_task(event.phase, total=event.steps, completed=event.step, measures="")
        self._bars.update(self._task, completed=event.step, measures=_measures(event))

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Show that something without steps is going on, and at its end how long it took."""
        start = perf_counter()
        if self._bars is None:
            self.say(title)
            yield
            return
        task = self._bars.add_task(title, total=None, measures="")
        try:
            yield
        finally:
            self._bars.remove_task(task)
        self.say(f"{title}: {perf_counter() - start:.1f} s")

    @contextmanager
    def counting(self, title: str, *, total: int) -> Iterator[Callable[[str], None]]:
        """Show how many of `total` pieces are done. The block calls what it is given after each, with its name."""
        task = None if self._bars is None else self._bars.add_task(title, total=total, measures="")
        done = 0

        def advance(name: str) -> None:
            nonlocal done
            done += 1
            if self._bars is not None and task is not None:
                self._bars.update(task, completed=done, measures=name)
            elif done == total or done % max(total // LINES_PER_PHASE, 1) == 0:
                self.say(f"{title} {done}/{total}, {name}")

        try:
            yield advance
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)

    def say(self, text: str) -> None:
        """One line, above the bars where there are any."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
    )
    return Progress(*columns, console=console)


def _measures(event: StepEvent) -> str:
    density = "" if event.density is None else f", density {event.density:.3f}"
    return f"loss {event.loss:.3f}{density}"
