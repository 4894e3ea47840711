"""The command line, `lte-compile`. Modules named after a command's work import torch; these few do not."""

from lte_compile.cli.app import main

__all__ = ["main"]
