"""`memserve top` and `memserve dashboard`. What they need beyond serving is imported by them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from memserve.api.tls import command_tls
from memserve.cli_flags import ExitWithParent, takes_flags
from memserve.cluster.watchdog import exit_with_parent
from memserve.config import GatewayConfig, LogConfig
from memserve.dashboard.child import is_installed
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.logs import log_to_stderr

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
    if find_spec("textual") is None:
        raise ConfigError("memserve top needs Textual: pip install 'memserve[ui]'")
    from memserve.top.app import TopApp

    TopApp(url or [_DEFAULT_URL], command_tls()).run()


@takes_flags(flags_of(LogConfig))
def dashboard(
    url: _Urls = None,
    host: Annotated[str, typer.Option(help="to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8090,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="has the token that opens it (or MEMSERVE_DASHBOARD_TOKEN); default on loopback: "
            "a random one, in the link that is printed",
        ),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="serve https")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="without actions")] = False,
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="viewers may see what cached prefixes say")
    ] = False,
    ttft: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="objective to draw in")
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="objective to draw in")
    ] = None,
    exit_with_parent_: ExitWithParent = False,
    *,
    given: Given,
) -> None:
    """Show a running cluster on web pages, and act on it: members, requests, cache, latency.

    Signs as `memserve cluster` does. Beyond loopback it needs a token, and should have TLS.
    """
    if not is_installed():
        raise ConfigError("memserve dashboard needs NiceGUI: pip install 'memserve[ui]'")
    from memserve.dashboard.charts import Objectives
    from memserve.dashboard.run import Settings, run_dashboard

    log = with_flags(LogConfig(), given)
    log_to_stderr(log.level, log.format)
    if exit_with_parent_:
        exit_with_parent()
    authorities = command_tls()
    urls = url or [_DEFAULT_URL]
    settings = Settings(
        *(urls, host, port, token_file, tls_cert, tls_key, read_only),
        tls=authorities,
        supervised=exit_with_parent_,
        texts=show_texts,
        objectives=Objectives(ttft, tpot),
    )
    run_dashboard(settings, lambda link: print(f"the dashboard is at {link}", flush=True))
