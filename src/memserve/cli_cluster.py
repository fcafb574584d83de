"""`memserve cluster`: look at a running cluster and change it, through its gateway."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from memserve.api.control import InstanceChange, WantedState
from memserve.api.status import InstanceState, MediumTotals
from memserve.api.tls import command_tls
from memserve.clock import MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import ClusterView
from memserve.cluster.rolling import RESTART_SECONDS, remove, restart
from memserve.cluster.running import DEFAULT_URL, find_gateway
from memserve.errors import ConfigError
from memserve.planner.contract import Decision
from memserve.scheduler.contract import Terms
from memserve.scheduler.decision_view import DecisionView
from memserve.scheduler.prefix_view import PrefixReport
from memserve.terminal import progress_lines
from memserve.types import Role

app = typer.Typer(
    no_args_is_help=True,
    help="Look at a running cluster and change it. Signs with MEMSERVE_SECRET, or with the secret "
    "of the cluster that this user runs here; MEMSERVE_TLS_CA names the authorities of an https:// "
    "gateway. To add an instance, on any machine: memserve instance --join URL.",
)


_Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help=f"a gateway's; default: that of this user's cluster here, or {DEFAULT_URL}",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="print the cluster's view as JSON")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="an instance's, as `list` shows it")]
_Seconds = Annotated[float, typer.Option(metavar="SECONDS", help="for each instance")]
T = TypeVar("T")


@app.command("list")
def list_(url: _Url = None, json: _Json = False) -> None:
    """Show the instances: role, state, memory in use."""

    async def look(client: ClusterClient) -> None:
        pass

    _run(url, json, look)


@app.command()
def role(
    id_: _Id,
    role: Annotated[Role, typer.Argument(help="what it is to do from now on")],
    url: _Url = None,
    json: _Json = False,
) -> None:
    """Change an instance's role while it runs; its requests go on."""
    _run(url, json, lambda client: client.change(id_, InstanceChange(role=role)))


@app.command()
def drain(id_: _Id, url: _Url = None, json: _Json = False) -> None:
    """Send no new requests to an instance; those that run go on."""
    wanted = InstanceChange(state=WantedState.DRAINING)
    _run(url, json, lambda client: client.change(id_, wanted))


@app.command()
def resume(id_: _Id, url: _Url = None, json: _Json = False) -> None:
    """Send requests to a drained instance again."""
    wanted = InstanceChange(state=WantedState.READY)
    _run(url, json, lambda client: client.change(id_, wanted))


@app.command("restart")
def restart_(
    id_: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every instance, one by one")] = False,
    seconds: _Seconds = RESTART_SECONDS,
    url: _Url = None,
    json: _Json = False,
) -> None:
    """Restart instances that something supervises, as `memserve up` does: each finishes what it
    runs, and is ready again before the next one ends."""
    if (id_ is None) is not all_:
        raise ConfigError("give the ID of an instance, or --all")

    async def run(client: ClusterClient) -> None:
        members = (await client.view()).instances
        alive = sorted(m.id for m in members if m.state is not InstanceState.DEAD)
        names = alive if id_ is None else [id_]
        await restart(client, names, MonotonicClock(), progress_lines(), seconds)

    _run(url, json, run)


@app.command()
def add(
    address: Annotated[str, typer.Argument(metavar="URL", help="an instance's")],
    url: _Url = None,
    json: _Json = False,
) -> None:
    """Make an instance that runs already a member (`memserve instance --join` does it itself)."""
    _run(url, json, lambda client: client.add(address))


@app.command("remove")
def remove_(
    id_: _Id,
    seconds: _Seconds = RESTART_SECONDS,
    url: _Url = None,
    json: _Json = False,
) -> None:
    """End an instance for good, once it has finished what it runs; a dead one is forgotten."""
    _run(
        url,
        json,
        lambda client: remove(client, id_, MonotonicClock(), progress_lines(), seconds),
    )


@app.command()
def decisions(
    n: Annotated[int, typer.Option("-n", metavar="N", help="how many of the last", min=1)] = 1,
    url: _Url = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show why the last requests went where they went: each candidate with its predicted seconds,
    best first. The chosen one is marked with *."""

    def show(found: list[DecisionView], shown_on: Console) -> None:
        for decision in found:
            shown_on.print(decision_table(decision))
        if not found:
            shown_on.print("no request has been scheduled yet")

    _show(url, json, lambda client: client.decisions(n), show)


@app.command()
def prefixes(
    n: Annotated[int, typer.Option("-n", metavar="N", help="how many", min=1, max=100)] = 20,
    text: Annotated[bool, typer.Option("--text", help="with what they say, shortened")] = False,
    url: _Url = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the cached prefixes that saved the most tokens, and who holds them in which memory.
    With --text the gateway logs that somebody asked."""

    def show(found: PrefixReport, shown_on: Console) -> None:
        shown_on.print(prefix_table(found))
        for each in found.prefixes:
            if each.text is not None:
                shown_on.print(f"{each.id}: {each.text!r}", markup=False)

    _show(url, json, lambda client: client.prefixes(n, text=text), show)


@app.command("planner")
def planner_(
    n: Annotated[int, typer.Option("-n", metavar="N", help="how many of the last", min=1)] = 1,
    url: _Url = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what the planner decided last, and why: each split of the members that it considered,
    best first. The present one is marked with *."""

    def show(found: list[Decision], shown_on: Console) -> None:
        for decision in found:
            shown_on.print(planner_table(decision))
            for line in planner_lines(decision):
                shown_on.print(line, markup=False)
        if not found:
            said = "no planner has decided anything here: is one running? (memserve planner)"
            shown_on.print(said)

    _show(url, json, lambda client: client.plans(n), show)


def _run(url: str | None, json: bool, work: Callable[[ClusterClient], Awaitable[object]]) -> None:
    """Run `work` with a client of the gateway, then print the cluster's view."""

    async def run(client: ClusterClient) -> ClusterView:
        await work(client)
        return await client.view()

    def show(view: ClusterView, shown_on: Console) -> None:
        shown_on.print(cluster_table(view))
        for pair in view.degraded or ():
            detail = f" ({pair.detail})" if pair.detail else ""
            shown_on.print(
                f"degraded: {pair.prefill} and {pair.decode}: {pair.why}{detail}", markup=False
            )

    _show(url, json, run, show)


def _show(
    url: str | None,
    json: bool,
    ask: Callable[[ClusterClient], Awaitable[T]],
    show: Callable[[T, Console], None],
) -> None:
    """Ask the gateway, and print the answer: as JSON, or as `show` does."""
    found = asyncio.run(_with_client(url, ask))
    if json:
        print(msgspec.json.encode(found).decode())
    else:
        show(found, console())


async def _with_client(url: str | None, work: Callable[[ClusterClient], Awaitable[T]]) -> T:
    tls = command_tls()
    address, secret = find_gateway(url)
    async with ClusterClient(address, secret, tls) as client:
        return await work(client)


def console() -> Console:
    """Return where tables are shown."""
    # Without a terminal, do not cut tables to a terminal's width.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def cluster_table(view: ClusterView) -> Table:
    """Return a table with a row for each instance. Memory: blocks not free, of all blocks."""
    table = Table(title=f"epoch {view.epoch}", title_justify="left")
    for name in ("id", "kind", "pool", "role", "state", "address", "pid", "HBM", "DRAM"):
        table.add_column(name, justify="right" if name in ("pid", "HBM", "DRAM") else "left")
    for member in sorted(view.instances, key=lambda member: member.id):
        table.add_row(
            member.id,
            member.kind,
            "yes" if member.pool else "no",
            member.role,
            member.state,
            member.address,
            "" if member.pid is None else str(member.pid),
            _used(member.hbm),
            _used(member.dram),
        )
    return table


def decision_table(decision: DecisionView) -> Table:
    """Return a table with a row for each of a decision's best candidates. Seconds, as predicted."""
    title = (
        f"{decision.request}: {decision.chosen.prompt_tokens} prompt tokens, {decision.policy}, "
        f"best of {decision.considered} candidates"
    )
    table = Table(title=title, title_justify="left")
    terms = Terms.__struct_fields__
    table.add_column("gives ⇢ computes → answers")
    for name in ("cached", "fetched", *terms, "score"):
        table.add_column(name, justify="right")
    for one in decision.candidates:
        table.add_row(
            f"{'*' if one == decision.chosen else ' '} {one.path}",
            str(one.cached_tokens),
            "" if one.fetch is None else f"{one.fetched_tokens} from {one.fetch}",
            *(f"{getattr(one.terms, name):.3f}" for name in terms),
            f"{one.score:.3f}",
        )
    return table


def prefix_table(report: PrefixReport) -> Table:
    """Return a table with a row for each prefix. Holders: their blocks by medium."""
    table = Table()
    for name in ("prefix", "tenant", "tokens", "own", "hits", "age", "holders"):
        table.add_column(
            name, justify="left" if name in ("prefix", "tenant", "holders") else "right"
        )
    for each in report.prefixes:
        held = "; ".join(
            f"{one.instance} {', '.join(f'{n} {m}' for m, n in one.blocks.items()) or 'expected'}"
            for one in each.holders
        )
        numbers = (each.tokens, each.own_tokens, each.hits)
        table.add_row(each.id, each.tenant, *map(str, numbers), f"{each.age:.0f} s", held)
    return table


def planner_table(decision: Decision) -> Table:
    """Return a table with a row for the present split, and one for each that was considered."""
    table = Table()
    table.add_column("split")
    for name in ("headroom", "served", "TTFT", "TPOT", "gain", "cost"):
        table.add_column(name, justify="right")
    present = decision.present
    for one in (present, *(one for one in decision.considered if one.split != present.split)):
        table.add_row(
            f"{'*' if one is present else ' '} {one.split}",
            f"{one.headroom:.2f}",
            f"{one.served:.1%}",
            "-" if one.ttft is None else f"{one.ttft:.3f} s",
            "-" if one.tpot is None else f"{one.tpot * 1e3:.1f} ms",
            "" if one is present else f"{one.gain:+.0f}",
            "" if one is present else f"{one.cost:.0f}",
        )
    return table


def planner_lines(decision: Decision) -> list[str]:
    """Return what arrives, what was decided, and what came of it."""
    demand = decision.demand
    lines = [
        f"{demand.requests_per_second:.2f} requests/s of {demand.prompt_tokens:.0f} tokens, "
        f"{demand.uncached_tokens:.0f} of them to compute, and {demand.output_tokens:.0f} to answer"
    ]
    lines += [f"{decision.action}{' (dry run)' if decision.dry_run else ''}: {decision.reason}"]
    lines += [f"  {one.member}: {one.before} -> {one.after}" for one in decision.changes]
    if decision.role is not None:
        lines.append(f"  {decision.count} {decision.role} by the backend")
    if decision.failed:
        lines.append(f"  failed: {decision.failed}")
    return lines


def _used(medium: MediumTotals) -> str:
    return f"{medium.total - medium.free}/{medium.total}" if medium.total else ""
