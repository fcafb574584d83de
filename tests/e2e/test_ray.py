"""A cluster on Ray: a head and two workers on loopback addresses, which are lost with all on them.

Engines have no model, except where answers or memory are looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import openai
import psutil
import pytest

from memserve.api.status import InstanceState
from memserve.cluster.client import ClusterClient
from memserve.config import (
    BackendConfig,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
)
from memserve.errors import ClusterError
from memserve.secrets import Secret
from memserve.types import Role
from tests.fakes import MODEL, save_tiny_tokenizer, until
from tests.ray_harness import HEAD, RayNodes, end_with
from tests.steady_load import Load
from tests.tiny_models import Reference, save_tiny_model

# After the harness, whose environment Ray reads when it is imported.
pytest.importorskip("ray", reason="Ray is not installed: pip install 'memserve[ray]'")

from memserve.ray import service
from memserve.ray.planning import ServiceGroups

T = TypeVar("T")
SECRET = "a-secret-of-these-tests"
FAKE = "tests.e2e.fake_memserve"
WORKERS = ("127.0.0.3", "127.0.0.4")
PATIENCE = 120.0  # seconds; failures take this long
LOOK_SECONDS = 0.2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    engine = {"MEMSERVE_FAKE_ENGINE": json.dumps({"step_seconds": 0.02})}
    running = RayNodes(engine)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        patch.setenv("MEMSERVE_SECRET", SECRET)
        patch.setenv("MEMSERVE_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        Path(os.environ["MEMSERVE_RUNTIME_DIR"]).chmod(0o700)
        try:
            running.start(len(WORKERS))
            yield running
        finally:
            running.end()


def config_of(nodes: RayNodes, model: Path, **instance: Any) -> ClusterConfig:
    """An instance at the head, and one with GPUs on one of the workers."""
    small = InstanceConfig(hbm_blocks=64, dram_blocks=8, resources={"CPU": 0.5}, **instance)
    on_worker = InstanceConfig(
        role=Role.DECODE,
        hbm_blocks=64,
        dram_blocks=8,
        resources={"CPU": 0, "GPU": 2, "worker": 1},
    )
    return ClusterConfig(
        cluster=BackendConfig(backend="ray", ray_address=nodes.address),
        model=ModelConfig(path=str(model), served_name=MODEL, dtype="float32"),
        gateway=GatewayConfig(port=0),
        instance=(small, on_worker),
    )


class Deployed:
    """A cluster that `service.deploy` has started."""

    def __init__(self, nodes: RayNodes, config: ClusterConfig) -> None:
        self.nodes = nodes
        self.config = config
        self.said: list[str] = []
        self.url = asyncio.run(service.deploy(config, self.said.append, module=FAKE))

    def status(self) -> dict[str, service.Shown]:
        return {one.name: one for one in asyncio.run(service.status(self.config.cluster))}

    def ready(self) -> dict[str, tuple[str, int | None]]:
        """Address and process of each instance that the gateway finds ready."""

        async def look() -> dict[str, tuple[str, int | None]]:
            async with ClusterClient(self.url, Secret((SECRET,))) as client:
                members = (await client.view()).instances
            return {m.id: (m.address, m.pid) for m in members if m.state is InstanceState.READY}

        return asyncio.run(look())

    def until(self, condition: Callable[[dict[str, tuple[str, int | None]]], bool]) -> None:
        until(lambda: condition(self.ready()), LOOK_SECONDS)

    def actor_of(self, name: str) -> psutil.Process:
        """The process of Ray that has the member's as its child."""
        pid = self.ready()[name][1]
        assert pid is not None
        parent = psutil.Process(pid).parent()
        assert parent is not None
        return parent

    def scale(self, group: str, count: int) -> None:
        asyncio.run(service.scale(self.config.cluster, group, count, self.said.append))

    def upgrade(self, wanted: ClusterConfig | None = None) -> None:
        asyncio.run(service.upgrade(self.config.cluster, wanted, False, self.said.append))

    def delete(self) -> None:
        asyncio.run(service.delete(self.config.cluster, self.said.append))


@pytest.fixture(scope="module")
def deployed(nodes: RayNodes, model: Path) -> Iterator[Deployed]:
    running = Deployed(nodes, config_of(nodes, model))
    yield running
    with contextlib.suppress(ClusterError):  # the last test has deleted it
        running.delete()


def test_members_are_at_their_nodes_addresses_and_survive_the_command(deployed: Deployed) -> None:
    there = deployed.status()
    assert set(there) == {"gateway", "colocated-0", "decode-1"}
    assert there["decode-1"].node in WORKERS
    assert there["colocated-0"].node == there["gateway"].node == HEAD
    for one in there.values():
        assert one.url.startswith(f"http://{one.node}:")
    assert {there[name].state for name in ("colocated-0", "decode-1")} == {"ready"}
    # Both GPUs of one node, which the process may use; the other one's may not use any.
    assert there["decode-1"].pid is not None
    environment = psutil.Process(there["decode-1"].pid).environ()
    assert sorted(environment["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    with Load(deployed.url, clients=2) as load:
        load.more(2)
    assert load.failures == []


def test_the_secret_is_in_no_argument_and_in_no_log_of_ray(
    deployed: Deployed,
) -> None:
    family = [p for node in (HEAD, *WORKERS) for p in deployed.nodes.processes(node)]
    arguments = [" ".join(process.cmdline()) for process in family]
    assert sum("--join" in line for line in arguments) == 2  # members are among them
    assert not [line for line in arguments if SECRET in line]
    for process in family:  # Ray's own processes and the actors do not have it; members must
        if "memserve" not in " ".join(process.cmdline()):
            assert SECRET not in str(process.environ())
    assert "Member" in deployed.nodes.log()
    assert SECRET not in deployed.nodes.log()


def test_deploying_again_changes_nothing_and_other_settings_are_refused(
    deployed: Deployed, model: Path
) -> None:
    before = deployed.ready()
    again = asyncio.run(service.deploy(deployed.config, deployed.said.append, module=FAKE))
    assert again == deployed.url
    assert deployed.ready() == before
    other = config_of(deployed.nodes, model, max_running=3)
    with pytest.raises(ClusterError, match=r"other settings .*\[\[instance\]\].* ray upgrade"):
        asyncio.run(service.deploy(other, deployed.said.append, module=FAKE))
    assert deployed.ready() == before


def test_a_killed_member_and_a_killed_actor_come_back_without_a_lost_request(
    deployed: Deployed,
) -> None:
    with Load(deployed.url, clients=2) as load:
        before = deployed.ready()["decode-1"]
        assert before[1] is not None
        os.kill(before[1], signal.SIGKILL)
        deployed.until(lambda ready: ready.get("decode-1", before) != before)
        before = deployed.ready()["decode-1"]
        deployed.actor_of("decode-1").kill()
        deployed.until(lambda ready: ready.get("decode-1", before) != before)
        load.more(2)
    assert load.failures == []
    assert set(deployed.ready()) == {"colocated-0", "decode-1"}


def test_a_gateway_whose_actor_is_lost_is_known_to_members_again(deployed: Deployed) -> None:
    members = deployed.ready()
    pid = deployed.status()["gateway"].pid
    assert pid is not None
    parent = psutil.Process(pid).parent()
    assert parent is not None
    parent.kill()
    until(lambda: deployed.status()["gateway"].pid not in (None, pid), LOOK_SECONDS)
    until(lambda: deployed.status()["gateway"].url != "", LOOK_SECONDS)
    deployed.url = deployed.status()["gateway"].url  # port 0: any
    deployed.until(lambda ready: ready == members)


def test_a_lost_node_s_member_comes_up_on_another_node(deployed: Deployed) -> None:
    lost = deployed.status()["decode-1"].node
    (other,) = set(WORKERS) - {lost}
    with Load(deployed.url, clients=2) as load:
        deployed.nodes.lose(lost)
        deployed.until(lambda ready: other in ready.get("decode-1", ("", 0))[0])
        load.more(2)
    assert load.failures == []
    deployed.nodes.add(lost)  # and it can be used again
    deployed.scale("decode", 2)
    there = deployed.status()
    assert {there["decode-1"].node, there["decode-2"].node} <= set(WORKERS)
    deployed.scale("decode", 1)
    assert set(deployed.ready()) == {"colocated-0", "decode-1"}
    with pytest.raises(
        ClusterError, match="there is no group 'cook'; there are: colocated, decode"
    ):
        deployed.scale("cook", 1)


def test_a_planner_scales_the_service_as_it_is_now(deployed: Deployed) -> None:
    groups = ServiceGroups(deployed.config.cluster, deployed.said.append)

    def decode() -> tuple[str, ...]:
        return {one.name: one.members for one in asyncio.run(groups.groups())}["decode"]

    def pid() -> int | None:
        return deployed.ready().get("decode-2", ("", None))[1]

    assert decode() == ("decode-1",)
    asyncio.run(groups.scale("decode", 2))
    assert decode() == ("decode-1", "decode-2")
    until(lambda: pid() is not None, LOOK_SECONDS)
    before = pid()
    assert before is not None
    os.kill(before, signal.SIGTERM)  # it ends in order, and is not started again
    until(lambda: decode() == ("decode-1",), LOOK_SECONDS)
    asyncio.run(groups.scale("decode", 2))  # a new one, although the other's actor is still there
    until(lambda: pid() not in (None, before), LOOK_SECONDS)
    deployed.scale("decode", 1)
    assert decode() == ("decode-1",)


def test_the_planner_s_command_looks_at_the_service_until_it_is_asked_to_end(
    deployed: Deployed,
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "memserve", "ray", "planner"),
            *("--ray-address", deployed.nodes.address, "--planner-max-members", "4"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        # It knows the members, and that engines without a model cost nothing that is known.
        assert any("waits for a member's cost model" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert "SIGTERM" not in errors  # nor a stack of Ray's library
    finally:
        process.kill()
        process.communicate()


def test_an_upgrade_replaces_every_member_under_load_and_loses_no_request(
    deployed: Deployed, model: Path
) -> None:
    before = deployed.ready()
    actors = {name: deployed.actor_of(name).pid for name in before}
    wanted = config_of(deployed.nodes, model, max_running=7)
    with Load(deployed.url, clients=2) as load:
        deployed.upgrade(wanted)
        load.more(2)
    assert load.failures == []
    after = deployed.ready()
    assert set(after) == set(before)
    for name in after:
        assert after[name] != before[name]
        assert deployed.actor_of(name).pid != actors[name]
    assert deployed.status()["gateway"].crashes == 0
    process = psutil.Process(after["colocated-0"][1])
    assert "--max-running 7" in " ".join(process.cmdline())


def test_deleting_leaves_no_process(deployed: Deployed) -> None:
    ours = [
        process
        for node in (HEAD, *WORKERS)
        for process in deployed.nodes.processes(node)
        if re.search(r"memserve|ray::Member", " ".join(process.cmdline()))
    ]
    assert len(ours) >= 6  # three actors and their processes
    deployed.delete()
    _, alive = psutil.wait_procs(ours, timeout=PATIENCE)
    assert alive == []
    assert deployed.status() == {}
    with pytest.raises(ClusterError, match="no cluster runs in namespace 'memserve'"):
        deployed.delete()


def test_a_model_that_a_node_does_not_have_is_named_with_the_node(nodes: RayNodes) -> None:
    config = config_of(nodes, Path("/there/is/no/model"))
    place = BackendConfig(backend="ray", ray_address=nodes.address, ray_namespace="wrong")
    with pytest.raises(ClusterError, match=r"on node 127\.0\.0\.") as failed:
        asyncio.run(service.deploy(msgspec.structs.replace(config, cluster=place), print))
    assert "no model '/there/is/no/model'" in str(failed.value)
    assert asyncio.run(service.status(place)) == []


# --- memserve up ----------------------------------------------------------------------------


@contextmanager
def up(nodes: RayNodes, model: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `memserve up` on Ray with real engines; and its URL."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "memserve", "up", "--backend", "ray"),
            *("--ray-address", nodes.address, "--ray-namespace", "up", "--model", str(model)),
            *("--served-name", MODEL, "--port", "0", "--dtype", "float32"),
            *("--hbm-blocks", "64", "--dram-blocks", "8", *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " on http://" in line), None)
        assert line is not None, process.communicate()
        yield process, line.partition(" on ")[2].partition(";")[0]
    finally:
        process.kill()
        process.communicate()


def members(nodes: RayNodes) -> list[psutil.Process]:
    """Instances with real engines: not those of `deployed`."""
    return [
        process
        for node in (HEAD, *WORKERS)
        for process in nodes.processes(node)
        if {"memserve", "instance"} <= set(process.cmdline())
    ]


def segments(processes: list[psutil.Process]) -> list[str]:
    pids = {str(process.pid) for process in processes}
    return [p.name for p in Path("/dev/shm").glob("memserve-*") if pids & set(p.name.split("-"))]


def test_up_answers_as_the_model_does_and_ctrl_c_leaves_nothing(
    nodes: RayNodes, model: Path
) -> None:
    prompt = list(range(3, 60))
    with up(nodes, model) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=8,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
        given: Any = answer.choices[0]
        assert given.token_ids == Reference(model).generate(prompt, 8)
        ours = members(nodes)
        assert len(ours) == 2
        assert segments(ours)
        assert end_with(process, signal.SIGINT) == 0
    assert psutil.wait_procs(ours, timeout=PATIENCE)[1] == []
    assert segments(ours) == []


def test_killing_up_ends_its_members_and_detach_leaves_them(nodes: RayNodes, model: Path) -> None:
    with up(nodes, model, "--role", "colocated") as (process, _):
        killed = members(nodes)
        process.kill()
    assert psutil.wait_procs(killed, timeout=PATIENCE)[1] == []
    with up(nodes, model, "--role", "colocated", "--detach") as (process, url):
        assert end_with(process, signal.SIGINT) == 0
    ours = members(nodes)
    assert len(ours) == 1
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt=[3, 4], max_tokens=1).choices
    place = BackendConfig(backend="ray", ray_address=nodes.address, ray_namespace="up")
    asyncio.run(service.delete(place, print))
    assert psutil.wait_procs(ours, timeout=PATIENCE)[1] == []
    # Ray kills what belongs to a lost driver; the next end in order removes its memory, too.
    assert segments([*killed, *ours]) == []
