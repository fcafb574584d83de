"""Typer options for commands, generated from configuration tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Annotated, Any

import typer

from memserve.flags import Flag

ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
]


def takes_flags(*flags: Iterable[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator, to use below `app.command()`: it adds an option for each flag, and passes
    the values (a `Given`) as the parameter `given`.
    """
    options = [_option(flag) for flag in chain.from_iterable(flags)]
    names = [option.name for option in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "given"]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, given=given)

        # Typer reads the options from the signature.
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return run

    return decorate


def _option(flag: Flag) -> inspect.Parameter:
    panel = flag.section.__name__.removesuffix("Config")
    default = "" if flag.default is None else f" \\[{_shown(flag.default)}]"
    if flag.is_switch:
        names = f"{flag.name}/--no-{flag.name[2:]}"
        option = typer.Option(names, help=flag.help + default, rich_help_panel=panel)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(
            *flag.names, help=flag.help + default, rich_help_panel=panel, metavar=flag.values
        )
        annotation = Annotated[str | None, option]
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)
