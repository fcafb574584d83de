"""`memserve top` and `memserve dashboard`. What they need beyond serving is imported by them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated

import typer

from memserve.api.tls import TLS_CA_VARIABLE, client_tls
from memserve.config import GatewayConfig
from memserve.errors import ConfigError

_DEFAULT_URL = f"http://{GatewayConfig().host}:{GatewayConfig().port}"
_Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        metavar="URL",
        help=f"a gateway's; repeat it for several gateways of one cluster (default {_DEFAULT_URL})",
    ),
]


def top(url: _Urls = None) -> None:
    """Show a running cluster in the terminal: members, memory, decisions, throughput.

    Signs as `memserve cluster` does. Keys: ? in it.
    """
    _require("textual", "Textual", "memserve top")
    from memserve.top.app import TopApp

    TopApp(url or [_DEFAULT_URL], client_tls(os.environ.get(TLS_CA_VARIABLE))).run()


def _require(module: str, name: str, command: str) -> None:
    """Raise ConfigError if a module of the extra `ui` is not installed."""
    if find_spec(module) is None:
        raise ConfigError(f"{command} needs {name}: pip install 'memserve[ui]'")
