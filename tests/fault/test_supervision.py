"""A cluster of processes that are killed, told to change, and restarted, under load.

The engines have no model and stream slowly; all else is what `memserve up` runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from memserve.api.control import InstanceChange, WantedState
from memserve.api.serving import Shutdown
from memserve.api.status import InstanceState
from memserve.clock import MonotonicClock
from memserve.cluster.child import Child
from memserve.cluster.client import ClusterClient, GatewayUnreachable
from memserve.cluster.cluster import Cluster
from memserve.cluster.local import LocalBackend
from memserve.cluster.member import ClusterView, MemberView
from memserve.cluster.restarts import RestartLimits
from memserve.cluster.rolling import remove, restart
from memserve.cluster.supervised import Supervised as Process
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ClusterError
from memserve.types import Role
from tests.fakes import MODEL, save_tiny_tokenizer, until
from tests.insider import ask
from tests.steady_load import Load

T = TypeVar("T")
STEP_SECONDS = 0.02
TOKENS = 40
QUICK = RestartLimits(first_pause=0.01, longest_pause=0.05, max_crashes=3)


class Supervised:
    """A cluster of two instances on an event loop of its own."""

    def __init__(self, directory: Path) -> None:
        self.said: list[str] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        config = ClusterConfig(
            model=ModelConfig(path=str(directory), served_name=MODEL),
            gateway=GatewayConfig(port=0),
            instance=(InstanceConfig(role=Role.PREFILL), InstanceConfig(role=Role.DECODE)),
        )
        self.shutdown = Shutdown()
        backend = LocalBackend(
            config, self.said.append, limits=QUICK, module="tests.e2e.fake_memserve"
        )
        self.cluster = Cluster(config, backend, self.shutdown, self.said.append)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def begin(self, whole: bool = True) -> None:
        """`whole`: wait until all instances are ready."""
        self._thread.start()
        self.run(self.cluster.start() if whole else self.cluster.begin())
        self.cluster.show_output(self.said.append)
        self.ended = asyncio.run_coroutine_threadsafe(self.cluster.supervise(), self.loop)

    def end(self) -> None:
        self.ended.cancel()
        self.shutdown.forced.set()
        self.run(self.cluster.stop())
        self.run(asyncio.sleep(0))  # pipes are closed in the loop's next turn
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def ask(self, work: Callable[[ClusterClient], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            async with ClusterClient(self.cluster.url) as client:
                return await work(client)

        return self.run(run())

    def change(self, instance: str, wanted: InstanceChange) -> MemberView:
        return self.ask(lambda client: client.change(instance, wanted))

    def view(self) -> ClusterView:
        return self.ask(lambda client: client.view())

    def until(self, condition: Callable[[ClusterView], bool]) -> ClusterView:
        """Wait until the gateway, if there is one, shows this."""

        async def look(client: ClusterClient) -> ClusterView:
            while True:
                try:
                    if condition(view := await client.view()):
                        return view
                except GatewayUnreachable:
                    pass
                await asyncio.sleep(0.02)

        return self.ask(look)

    def until_ready(self) -> ClusterView:
        return self.until(lambda view: len(ready(view)) == 2)


def ready(view: ClusterView) -> dict[str, int | None]:
    return {m.id: m.pid for m in view.instances if m.state is InstanceState.READY}


@contextmanager
def supervised(directory: Path, whole: bool = True) -> Iterator[Supervised]:
    running = Supervised(directory)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MEMSERVE_FAKE_ENGINE", json.dumps({"step_seconds": STEP_SECONDS}))
        environment.setenv("MEMSERVE_FAKE_DEATHS", str(directory))
        environment.setenv("PYTHONPATH", os.pathsep.join([*_paths(), str(Path.cwd())]))
        try:
            running.begin(whole)
            yield running
        finally:
            running.end()


def _replaced(one: Process, child: Child) -> bool:
    return one.child is not child


def _paths() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH", "")] if path]


def _model_in(directory: Path) -> Path:
    save_tiny_tokenizer(directory)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Supervised]:
    with supervised(model) as cluster:
        yield cluster


def test_a_killed_instance_comes_back_in_a_new_life(running: Supervised) -> None:
    before = running.until_ready()
    victim = next(m for m in before.instances if m.id == "decode-1")
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    running.until(lambda view: "decode-1" not in ready(view))  # its death is visible
    after = running.until_ready()
    assert ready(after)["prefill-0"] == ready(before)["prefill-0"]
    assert ready(after)["decode-1"] != victim.pid
    assert [m.role for m in after.instances if m.id == "decode-1"] == [Role.DECODE]
    assert after.epoch > before.epoch
    assert len(after.instances) == 2
    assert any("decode-1 ended with signal SIGKILL; starting it again" in s for s in running.said)


def test_a_killed_gateway_comes_back_at_its_port_and_knows_its_members(
    running: Supervised,
) -> None:
    before = running.until_ready()
    (gateway,) = running.cluster._gateways
    assert isinstance(gateway, Process)
    killed = gateway.child
    killed.kill()
    running.run(asyncio.wait_for(asyncio.shield(killed.ended), 30))
    after = running.until_ready()
    assert ready(after) == ready(before)  # the instances were left alone
    assert {m.role for m in after.instances} == {Role.PREFILL, Role.DECODE}


def test_roles_change_and_instances_drain_under_load(running: Supervised) -> None:
    running.until_ready()
    with Load(running.cluster.url) as load:
        for role in (Role.COLOCATED, Role.PREFILL, Role.DECODE):
            assert running.change("decode-1", InstanceChange(role=role)).role is role
            load.more(4)
        drained = running.change("decode-1", InstanceChange(state=WantedState.DRAINING))
        assert drained.state is InstanceState.DRAINING
        load.more(8)  # the other one does it all
        back = running.change("decode-1", InstanceChange(state=WantedState.READY))
        assert back.state is InstanceState.READY
    assert load.failures == []
    assert len(ready(running.view())) == 2


def test_a_rolling_restart_loses_no_request(running: Supervised) -> None:
    before = ready(running.until_ready())
    lines: list[str] = []
    with Load(running.cluster.url) as load:
        running.ask(
            lambda client: restart(client, sorted(before), MonotonicClock(), lines.append, 60)
        )
        seen = load.whole
    assert load.failures == []
    assert seen > 0
    after = ready(running.view())
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in before)
    assert [line.split(" ")[0] for line in lines] == [
        "decode-1",
        "decode-1",
        "prefill-0",
        "prefill-0",
    ]


def test_what_cannot_be_done_is_said(running: Supervised) -> None:
    running.until_ready()

    def post(path: str, body: str) -> tuple[int, str | None]:
        answer = ask(running.cluster.url, path, body, "POST")
        return answer.status, answer.json["error"]["code"]

    instance = "/cluster/instances/decode-1"
    assert (post("/cluster/instances/x", '{"role": "decode"}')) == (
        404,
        "instance_not_found",
    )
    assert (post(instance, '{"role": "cook"}'))[0] == 400
    assert (post(instance, '{"state": "dead"}'))[0] == 400
    assert (post(instance, "{}"))[0] == 400
    with pytest.raises(ClusterError, match="there is no instance 'x'; there are: "):
        running.ask(lambda client: client.member("x"))


def test_an_instance_that_is_removed_does_not_come_back(model: Path) -> None:
    """And a cluster whose last instance crashes over and over ends with what that said."""
    with supervised(model) as running:
        running.until_ready()
        running.ask(lambda client: remove(client, "prefill-0", MonotonicClock(), print, 60))
        assert [m.id for m in running.view().instances] == ["decode-1"]
        (model / "broken").touch()
        try:
            pid = ready(running.view())["decode-1"]
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ClusterError) as given_up:
                running.ended.result(120)
        finally:
            (model / "broken").unlink()
        assert "decode-1 crashed too often and is given up" in str(given_up.value)
        assert "the weights are broken" in str(given_up.value)
        assert any("prefill-0 has ended, as it was asked to" in line for line in running.said)


def test_a_group_is_scaled_under_load_and_no_request_is_lost(model: Path) -> None:
    with supervised(model) as running:
        running.until_ready()
        cluster = running.cluster
        with Load(cluster.url) as load:
            running.run(cluster.scale("decode", 3))
            running.until(lambda view: len(ready(view)) == 4)
            grown = {group.name: group.members for group in running.run(cluster.groups())}
            assert grown == {
                "prefill": ("prefill-0",),
                "decode": ("decode-1", "decode-2", "decode-3"),
            }
            places = running.run(cluster.places())
            assert set(places) == {"gateway", "prefill-0", *grown["decode"]}
            load.more(4)
            # A new one is kept as the others are.
            os.kill(places["decode-3"].pid, signal.SIGKILL)
            running.until(
                lambda view: ready(view).get("decode-3") not in (None, places["decode-3"].pid)
            )
            running.run(cluster.scale("decode", 1))
            assert set(ready(running.view())) == {"prefill-0", "decode-1"}  # the newest have left
            assert [len(group.members) for group in running.run(cluster.groups())] == [1, 1]
            load.more(4)
        assert load.failures == []
        running.run(cluster.scale("prefill", 0))
        for group, count, said in (
            ("decode", 0, "needs an instance"),
            ("cook", 1, "prefill, decode"),
        ):
            with pytest.raises(ClusterError, match=said):
                running.run(cluster.scale(group, count))
        assert not running.ended.done()


def test_a_crash_while_others_start_ends_nothing_once_one_serves(model: Path) -> None:
    slow = model / "slow-decode-1"
    slow.touch()
    try:
        with supervised(model, whole=False) as running:
            settled = asyncio.run_coroutine_threadsafe(running.cluster.settled(), running.loop)
            with Load(running.cluster.url) as load:
                load.more(1)  # clients are served although not all of it is there
                pids = running.cluster.pids()
                assert not settled.done()
                os.kill(pids["decode-1"], signal.SIGKILL)
                until(lambda: running.cluster.pids()["decode-1"] != pids["decode-1"])
                load.more(4)
                assert settled.result(60) == ["decode-1"]
                slow.unlink()
                running.until_ready()
            assert load.failures == []
            assert not running.ended.done()
            assert running.cluster.pids()["prefill-0"] == pids["prefill-0"]
            assert any("decode-1 ended with signal SIGKILL" in line for line in running.said)
    finally:
        slow.unlink(missing_ok=True)


def test_a_gateway_that_crashes_often_is_not_given_up_while_instances_serve(
    running: Supervised,
) -> None:
    before = ready(running.until_ready())
    (gateway,) = running.cluster._gateways
    assert isinstance(gateway, Process)
    for _ in range(QUICK.max_crashes + 1):
        killed = gateway.child
        killed.kill()
        until(partial(_replaced, gateway, killed))
        assert not running.ended.done()
    assert ready(running.until_ready()) == before
    assert any("gateway has crashed" in line and "tried again" in line for line in running.said)


@pytest.mark.parametrize("name", ["poller", "expectations", "router"])
def test_a_gateway_without_one_of_its_tasks_ends_and_comes_back(
    running: Supervised, model: Path, name: str
) -> None:
    before = ready(running.until_ready())
    gateway = running.cluster.pids()["gateway"]
    (model / f"kill-{name}").touch()
    until(lambda: running.cluster.pids()["gateway"] != gateway)
    assert ready(running.until_ready()) == before
    # What it says comes through a pipe, and may come after the next life is ready.
    wanted = f"{name} ended: RuntimeError('killed by a test')"
    until(lambda: any(wanted in line for line in running.said))


@pytest.mark.parametrize("name", ["registration", "mortal"])
def test_an_instance_without_one_of_its_tasks_or_threads_ends_and_comes_back(
    tmp_path: Path, name: str
) -> None:
    # A cluster of its own: which of the two dies is chance, and one that dies thrice is given up.
    # A directory of its own: an instance of another cluster would take the file.
    with supervised(_model_in(tmp_path)) as running:
        before = ready(running.until_ready())
        (tmp_path / f"kill-{name}").touch()
        after = ready(running.until(lambda view: len(ready(view)) == 2 and ready(view) != before))
        (dead,) = [one for one in before if before[one] != after[one]]
        for begin, wanted in (
            (f"{dead}: ", f"{name} ended: "),
            ("", f"{dead} ended with exit code 1; starting it again"),
        ):
            until(partial(_said, running, begin, wanted))


def _said(running: Supervised, begin: str, wanted: str) -> bool:
    """Whether there was such a line; they come through a pipe, later than what they tell of."""
    return any(wanted in line for line in running.said if line.startswith(begin))
