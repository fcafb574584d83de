"""`memserve doctor`: checks of a running cluster, with advice."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer

from memserve.api.tls import command_tls
from memserve.cluster.running import DEFAULT_URL, find_gateway


def doctor(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"a gateway's; default: that of this user's cluster here, or {DEFAULT_URL}",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Check a running cluster, through its gateway: a line for each finding, and exit code 1 if
    anything fails. Changes nothing. Signs as `memserve cluster` does."""
    from memserve.cluster.doctor import diagnose, exit_code
    from memserve.cluster.examination import examine

    address, secret = find_gateway(url)
    authorities = command_tls()
    findings = diagnose(asyncio.run(examine(address, authorities, secret)))
    if json:
        print(msgspec.json.encode(findings).decode())
    else:
        for finding in findings:
            print(finding)
    raise typer.Exit(exit_code(findings))
