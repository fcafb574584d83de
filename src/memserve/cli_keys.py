"""`memserve keys`: API keys for a gateway's clients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memserve.api.api_keys import append_entry, new_key

app = typer.Typer(
    no_args_is_help=True,
    help="API keys for a gateway's clients. A gateway reads the file of --api-keys-file when it "
    "starts, and again on SIGHUP.",
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def new(
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="of entries: append this one")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="whose it is, in logs")] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="shares turns and cached prompts with it")
    ] = None,
    priority: Annotated[
        bool, typer.Option("--priority", help="its `priority` counts among tenants")
    ] = False,
) -> None:
    """Make a random API key and print it, once. Also makes its entry for gateways, which has a hash
    in place of the key."""
    key, entry = new_key(name, tenant, priority)
    if file is None:
        print(f"entry for api_keys or a file of them: {entry}", file=sys.stderr)
    else:
        append_entry(file, entry)
        print(f"added to {file}; gateways read it again on SIGHUP", file=sys.stderr)
    print(key)
