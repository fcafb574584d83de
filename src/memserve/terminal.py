"""What a person at a terminal sees while a command works."""

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
from memserve.models.resolve import Progress

FAILED = 1
WRONG_USE = 2  # what the person at the keyboard can mend


def run_app(app: typer.Typer) -> None:
    """Run a command; an error that is raised on purpose is one line, without a traceback."""
    try:
        app()
    except MemserveError as error:
        print(f"memserve: {error}", file=sys.stderr)
        sys.exit(WRONG_USE if isinstance(error, ConfigError | ModelError) else FAILED)


def progress_lines(write: Callable[[str], None] | None = None) -> Progress:
    """Prints lines to standard error, each with the seconds since now. `write` is called with
    each line instead, as it looks there."""
    started = time.monotonic()

    def show(console: Console, line: str) -> None:
        console.print(f"{time.monotonic() - started:7.1f} s  ", style="dim", end="")
        console.print(line, markup=False)

    if write is None:
        return partial(show, Console(stderr=True, highlight=False, soft_wrap=True))
    return lambda line: write(rendered(sys.stderr, partial(show, line=line)))


def rendered(file: TextIO, show: Callable[[Console], None]) -> str:
    """What `show` prints, as it would look on `file`, without the last end of a line. Nothing
    is written there."""
    text = io.StringIO()
    show(Console(file=text, force_terminal=file.isatty(), highlight=False, soft_wrap=True))
    return text.getvalue().removesuffix("\n")
