"""The `memserve` command."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from memserve import __version__
from memserve.api.serving import hold_reloads
from memserve.api.status import check_id
from memserve.bench.cli import app as bench_app
from memserve.bench.profile_cli import profile
from memserve.cli_cluster import app as cluster_app
from memserve.cli_doctor import doctor
from memserve.cli_flags import ExitWithParent, takes_flags
from memserve.cli_keys import app as keys_app
from memserve.cli_planner import planner
from memserve.cli_ray import app as ray_app
from memserve.cli_ray import require_ray
from memserve.cli_sim import sim
from memserve.cli_watch import dashboard, top
from memserve.cluster.backend import Backend
from memserve.cluster.cluster import Cluster
from memserve.cluster.line_printer import STDERR, STDOUT, LinePrinter
from memserve.cluster.local import LocalBackend
from memserve.cluster.preflight import check_machine, with_room
from memserve.cluster.run import run_cluster
from memserve.cluster.watchdog import exit_with_parent
from memserve.config import (
    BackendConfig,
    CacheConfig,
    ClusterConfig,
    DashboardConfig,
    GatewayConfig,
    InstanceConfig,
    LogConfig,
    ModelConfig,
    PlannerConfig,
    SecurityConfig,
    TracesConfig,
    check_config,
    load_config,
)
from memserve.dashboard.child import DashboardChild, is_installed
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, to_flags, with_flags
from memserve.logs import json_child_line, json_line, log_to_stderr
from memserve.models.demo import DEMO_MODEL
from memserve.models.resolve import Progress, pinned, resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.terminal import progress_lines, rendered, run_app
from memserve.types import Role

# `up` chooses the instances' addresses; `instance` runs one.
_CLUSTER_LEAVES_OUT = ("host", "port", "advertise")
_INSTANCE_LEAVES_OUT = ("count",)
_DRAIN_ONLY = [name for name in GatewayConfig.__struct_fields__ if name != "drain_seconds"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models from instances whose KV caches are one elastic memory.",
)
app.add_typer(bench_app, name="bench")
app.command()(profile)
app.command()(sim)
app.command()(doctor)
app.command()(planner)
app.command()(top)
app.command()(dashboard)
app.add_typer(cluster_app, name="cluster")
app.add_typer(keys_app, name="keys")
app.add_typer(ray_app, name="ray")


def main() -> None:
    """Run the command."""
    run_app(app)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"memserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    pass


@app.command()
@takes_flags(
    flags_of(BackendConfig),
    flags_of(ModelConfig),
    flags_of(GatewayConfig),
    flags_of(SecurityConfig),
    flags_of(CacheConfig),
    flags_of(LogConfig),
    flags_of(InstanceConfig, _CLUSTER_LEAVES_OUT),
    flags_of(TracesConfig),
    flags_of(DashboardConfig),
    flags_of(PlannerConfig),
)
def up(
    config: Annotated[Path | None, typer.Argument(help="TOML; flags go before it")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="with Ray: Ctrl-C leaves the cluster running")
    ] = False,
    *,
    given: Given,
) -> None:
    """Run a whole cluster: a gateway and its instances, on this machine or on a Ray cluster.

    Without a file: one prefill and one decode instance; with --role or --count: these.
    """
    _outlive_reloads()
    file = _without_file(given) if config is None else load_config(config)
    wanted = ClusterConfig(
        cluster=with_flags(file.cluster, given),
        model=with_flags(file.model, given),
        gateway=with_flags(file.gateway, given),
        security=with_flags(file.security, given),
        cache=with_flags(file.cache, given),
        log=with_flags(file.log, given),
        traces=with_flags(file.traces, given),
        dashboard=with_flags(file.dashboard, given),
        planner=with_flags(file.planner, given),
        instance=tuple(with_flags(i, given, _CLUSTER_LEAVES_OUT) for i in file.instance),
    )
    check_config(wanted)
    # A slow reader of the output must not block the supervisor.
    with LinePrinter(STDOUT) as out, LinePrinter(STDERR) as errors:
        progress, show = _shown_as(wanted.log, errors.show)
        backend: Backend
        if wanted.cluster.backend == "ray":
            require_ray()
            from memserve.ray.backend import RayBackend
            from memserve.ray.service import check_detached

            if detach:
                check_detached()
            backend = RayBackend(wanted, progress, detached=detach)
        elif detach:
            raise ConfigError("--detach: a cluster on this machine ends with `up`; see backend ray")
        else:
            wanted = _on_this_machine(wanted, progress)
            backend = LocalBackend(wanted, progress)

        def ready(running: Cluster) -> None:
            name = wanted.model.served_name or wanted.model.path
            running.show_output(show)
            if wanted.log.format == "json":
                progress(f"memserve serves {name} on {running.url}")
            else:
                out.show(_first_steps(running.url, name, wanted.model.path == DEMO_MODEL))

        async def watched(running: Cluster) -> None:
            link = progress if wanted.log.format == "json" else out.show
            await DashboardChild(wanted, progress, show).run(running.url, running.secret, link)

        # A dashboard ends with `up`: a cluster that is left running has none.
        dashboard = wanted.dashboard.enabled and is_installed() and not detach
        beside = watched if dashboard else None
        asyncio.run(run_cluster(wanted, backend, progress, ready, beside, detached=detach))


@app.command()
@takes_flags(
    flags_of(ModelConfig),
    flags_of(GatewayConfig),
    flags_of(SecurityConfig),
    flags_of(LogConfig),
    flags_of(TracesConfig),
)
def gateway(
    instances: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="an instance's; may be repeated")
    ] = None,
    exit_with_parent_: ExitWithParent = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    *,
    given: Given,
) -> None:
    """Run a gateway alone, in front of instances that run already or will join it."""
    hold_reloads()
    from memserve.gateway.run import run_gateway
    from memserve.gateway.workers import WorkerPlace, run_workers

    config = ClusterConfig(
        model=with_flags(ModelConfig(), given),
        gateway=with_flags(GatewayConfig(), given),
        security=with_flags(SecurityConfig(), given),
        log=with_flags(LogConfig(), given),
        traces=with_flags(TracesConfig(), given),
    )
    _begin_process(config.log, exit_with_parent_)
    model = resolve_model(config.model, logging.info, weights=False)
    members = instances or []
    if worker is None and config.gateway.workers > 1:
        command = ["gateway", *to_flags(pinned(config.model, model)), *to_flags(config.gateway)]
        command += [*to_flags(config.security), *to_flags(config.log)]
        command += to_flags(config.traces)
        command += [part for url in members for part in ("--instances", url)]
        raise typer.Exit(run_workers(config.gateway, command, reserved=exit_with_parent_))
    tokenizer = Tokenizer.load(model.path, config.gateway.chat_template)
    place = None if worker is None else WorkerPlace.parse(worker)
    code = run_gateway(config, members, tokenizer, worker=place, reserved=exit_with_parent_)
    raise typer.Exit(code)


@app.command()
@takes_flags(
    flags_of(ModelConfig),
    flags_of(InstanceConfig, _INSTANCE_LEAVES_OUT),
    flags_of(CacheConfig),
    flags_of(SecurityConfig),
    flags_of(LogConfig),
    flags_of(GatewayConfig, _DRAIN_ONLY),
    flags_of(TracesConfig),
)
def instance(
    id_: Annotated[str | None, typer.Option("--id", help="unique; default: host and pid")] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="a gateway's, or several gateways' common name; may be repeated"
        ),
    ] = None,
    exit_with_parent_: ExitWithParent = False,
    *,
    given: Given,
) -> None:
    """Run one instance: an engine, or a vLLM server, and its part of the pool."""
    _outlive_reloads()
    from memserve.instance.run import run_instance

    log_config = with_flags(LogConfig(), given)
    _begin_process(log_config, exit_with_parent_)
    settings = with_flags(InstanceConfig(), given, _INSTANCE_LEAVES_OUT)
    config = ClusterConfig(
        model=with_flags(ModelConfig(), given),
        cache=with_flags(CacheConfig(), given),
        gateway=with_flags(GatewayConfig(), given, _DRAIN_ONLY),
        security=with_flags(SecurityConfig(), given),
        log=log_config,
        traces=with_flags(TracesConfig(), given),
        instance=(settings,),
    )
    check_config(config)
    name = check_id(id_ or f"{os.uname().nodename}-{os.getpid()}")
    raise typer.Exit(run_instance(config, settings, name, join=join or ()))


@app.command()
@takes_flags(flags_of(ModelConfig))
def prepare(*, given: Given) -> None:
    """Download or convert a model, so that serving it starts at once. Prints its directory."""
    print(resolve_model(with_flags(ModelConfig(), given), progress_lines()).path)


def _without_file(given: Given) -> ClusterConfig:
    """Return one prefill and one decode instance, or with --role, --count or --engine vllm one
    default instance, which flags then change."""
    if given["role"] is not None or given["count"] is not None or given["engine"] == "vllm":
        return ClusterConfig()
    return ClusterConfig(
        instance=(InstanceConfig(role=Role.PREFILL), InstanceConfig(role=Role.DECODE))
    )


def _on_this_machine(config: ClusterConfig, progress: Progress) -> ClusterConfig:
    """Check the configuration against this machine and fetch the model; return it with what
    depends on both filled in."""
    check_machine(config)
    model = resolve_model(config.model, progress)
    config = with_room(config, model.path, progress)
    return msgspec.structs.replace(config, model=pinned(config.model, model))


def _begin_process(log: LogConfig, ends_with_parent: bool) -> None:
    """Set up a serving process: logs to standard error; with `ends_with_parent`, the watchdog."""
    log_to_stderr(log.level, log.format)
    if ends_with_parent:
        exit_with_parent()


def _shown_as(log: LogConfig, show: Callable[[str], None]) -> tuple[Progress, Progress]:
    """Return functions that show lines in the log's format: of progress, and of children."""
    if log.format == "text":
        return progress_lines(show), show
    log_to_stderr(log.level, log.format)
    return (
        lambda line: show(json_line("memserve.up", line)),
        lambda line: show(json_child_line(line)),
    )


def _outlive_reloads() -> None:
    """Block SIGHUP until `on_reload`, unless standard input is a terminal, whose SIGHUP at its end
    must end the process."""
    if not os.isatty(0):
        hold_reloads()


def _first_steps(url: str, model: str, demo: bool) -> str:
    body = f'{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 16}}'

    def show(console: Console) -> None:
        console.print(f"\nmemserve serves {model} on [bold]{url}[/bold]; Ctrl-C stops it. Try:\n")
        console.print(
            f"  curl {url}/v1/completions -H 'Content-Type: application/json' \\\n"
            f"    -d '{body}'\n\nor open {url}/ in a browser.\n",
            markup=False,
        )
        if demo:
            console.print(
                "The demo model (Gemma 3 270M, pretrained) is a base model: it goes on with a text "
                "and was not\ntaught to answer. A model that was: "
                "memserve up --model Qwen/Qwen2.5-0.5B-Instruct\n",
                markup=False,
            )

    return rendered(sys.stdout, show)
