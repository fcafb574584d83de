"""What a person at a terminal sees while a command works."""

from __future__ import annotations

import time

from rich.console import Console

from memserve.models.resolve import Progress


def progress_lines() -> Progress:
    """Prints lines to standard error, each with the seconds since now."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    started = time.monotonic()

    def show(line: str) -> None:
        console.print(f"{time.monotonic() - started:7.1f} s  ", style="dim", end="")
        console.print(line, markup=False)

    return show
