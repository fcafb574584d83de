"""Terminal output of commands: errors, exit codes and progress lines."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

import typer
from rich.console import Console

from memserve.errors import ConfigError, MemserveError, ModelError
from memserve.logs import json_line, logs_json
from memserve.models.resolve import Progress

FAILED = 1
WRONG_USE = 2  # errors of configuration or model, which the user can fix


def run_app(app: typer.Typer) -> None:
    """Run a command. A MemserveError is printed as one line without a traceback, and ends the
    process with FAILED or WRONG_USE."""
    try:
        app()
    except MemserveError as error:
        line = json_line("memserve", str(error), "ERROR") if logs_json() else f"memserve: {error}"
        print(line, file=sys.stderr)
        sys.exit(WRONG_USE if isinstance(error, ConfigError | ModelError) else FAILED)


def progress_lines(write: Callable[[str], None] | None = None) -> Progress:
    """Return a function that prints a line to standard error with the seconds since this call.
    With `write`, the function passes the formatted line to it instead."""
    started = time.monotonic()

    def show(console: Console, line: str) -> None:
        console.print(f"{time.monotonic() - started:7.1f} s  ", style="dim", end="")
        console.print(line, markup=False)

    if write is None:
        return partial(show, Console(stderr=True, highlight=False, soft_wrap=True))
    return lambda line: write(rendered(sys.stderr, partial(show, line=line)))


def rendered(file: TextIO, show: Callable[[Console], None]) -> str:
    """Return the text that `show` prints to a console, formatted for `file`, without the last line
    end. Writes nothing to `file`."""
    text = io.StringIO()
    show(Console(file=text, force_terminal=file.isatty(), highlight=False, soft_wrap=True))
    return text.getvalue().removesuffix("\n")
