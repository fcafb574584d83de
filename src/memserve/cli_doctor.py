"""`memserve doctor`: checks of a running cluster, with advice."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import msgspec
import typer

from memserve.api.tls import TLS_CA_VARIABLE, client_tls
from memserve.config import GatewayConfig

_DEFAULT_URL = f"http://{GatewayConfig().host}:{GatewayConfig().port}"


def doctor(
    url: Annotated[str, typer.Option(metavar="URL", help="a gateway's")] = _DEFAULT_URL,
    json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Check a running cluster, through its gateway: a line for each finding, and exit code 1 if
    anything fails. Changes nothing. Signs as `memserve cluster` does."""
    from memserve.cluster.doctor import diagnose, exit_code
    from memserve.cluster.examination import examine

    findings = diagnose(asyncio.run(examine(url, client_tls(os.environ.get(TLS_CA_VARIABLE)))))
    if json:
        print(msgspec.json.encode(findings).decode())
    else:
        for finding in findings:
            print(finding)
    raise typer.Exit(exit_code(findings))
