"""The program: its commands, and how it fails. One line on stderr; exit code 2 for bad input, 1 for the rest."""

from __future__ import annotations

import sys
from functools import partial
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lte_compile.cli import commands
from lte_compile.cli.output import messages

BAD_INPUT, FAILED = 2, 1
OUT_OF_MEMORY = (
    "the GPU has no memory left. A smaller --batch-size or --window needs less, in training also --accumulation and "
    "--gradient-checkpointing; other processes on this GPU take memory too. Finished points and checkpoints are kept: "
    "the same command goes on from them"
)


class _OneLineErrors(TyperGroup):
    """Reports what a command raises instead of letting it through as a traceback, unless --debug is given."""

    def invoke(self, ctx: Any) -> Any:  # ctx: typer.Context, whose base class moved between typer releases
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # these are RuntimeErrors too, but only say how to end
            raise
        except (ValueError, RuntimeError, OSError, ArithmeticError, ImportError) as error:
            if ctx.params["debug"]:
                raise
            _report(error)
            raise typer.Exit(BAD_INPUT if isinstance(error, ValueError) else FAILED) from None


def _report(error: BaseException) -> None:
    text = str(error).strip() or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":  # torch's, whose import would make every command start slowly
        text = f"{OUT_OF_MEMORY} ({' '.join(text.split()).split(' Process ')[0]})"
    messages().print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


app = typer.Typer(
    name="lte-compile",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Learned FFN sparsity: find a model's FFNs, make them sparse, train, measure and export them.

    MODEL is a directory (config.json and safetensors) or an id on the model hub. Every command takes --json.
    """


for command in (
    commands.inspect,
    commands.convert,
    commands.train,
    commands.evaluate,
    commands.compare,
    commands.export,
    commands.generate,
    commands.bench,
    commands.build_ort,
    commands.demo,
):
    app.command()(command)


def main() -> None:
    """The entry point `lte-compile`."""
    if "--debug" not in sys.argv[1:]:
        sys.excepthook = partial(_report_unforeseen, sys.excepthook)
    typer.main.get_command(app)()


def _report_unforeseen(hook: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python ends with exit code 1 after its excepthook has run."""
    if not issubclass(kind, Exception):
        hook(kind, error, trace)
        return
    messages().print(f"error: {kind.__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    messages().print("This is a defect; lte-compile --debug COMMAND shows where.", markup=False, highlight=False)
