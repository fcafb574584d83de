"""A cluster as the Helm chart describes it: the arguments and the environment of each container,
run in a place like its pod (an address, names, shared memory and a read-only root of its own, no
capabilities), with its probes and hooks."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

import memserve
from tests.chart_harness import (
    Release,
    arguments_of,
    container_of,
    environment_of,
    installed,
    read_values,
)
from tests.fakes import save_tiny_tokenizer, until
from tests.helm import NAMESPACE, RELEASE, Helm, helm_python
from tests.hosts_harness import Host, HostProcess, Hosts, started_hosts
from tests.tiny_models import Reference, save_tiny_model

NAME = f"{RELEASE}-memserve"
PROMPT = list(range(5, 105))
# What of a container's security context the kernel is told by `setpriv`.
CONFINED = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")


class Pod:
    """A pod of the release, on a host of its own."""

    def __init__(
        self, release: Release, workload: str, name: str, host: Host, models: Path
    ) -> None:
        """`models`: what the claim of the volume with models leads to."""
        self.release = release
        self.name = name
        self.host = host
        self.process: HostProcess | None = None
        self._template = release.pods()[workload]
        self.container = container_of(self._template)
        (port,) = self.container["ports"]
        self.port = int(port["containerPort"])
        self._volumes = self._mount(models)
        fields = {"metadata.name": name, "status.podIP": host.address}
        mine = environment_of(self.container, fields)
        self.environment = {name: self._inside(value) for name, value in mine.items()}
        # Compiled code is this checkout's own, not made anew for each pod: that takes 10 s.
        del self.environment["NUMBA_CACHE_DIR"]
        arguments = arguments_of(self.container, self.environment)
        self.arguments = [self._inside(argument) for argument in arguments]
        self._close_root()

    def _mount(self, models: Path) -> dict[str, Path]:
        """Fill the pod's volumes; return where they are here, by where the container has them."""
        volumes = {volume["name"]: volume for volume in self._template["spec"]["volumes"]}
        found = {}
        for mount in self.container["volumeMounts"]:
            if mount["mountPath"] == "/dev/shm":  # the host's own
                continue
            if "persistentVolumeClaim" in volumes[mount["name"]]:
                found[mount["mountPath"]] = models
                continue
            found[mount["mountPath"]] = folder = self.host.directory / mount["name"]
            folder.mkdir()
            if (secret := volumes[mount["name"]].get("secret")) is not None:
                data = self.release.objects["Secret", secret["secretName"]]["data"]
                for key, value in data.items():
                    (folder / key).write_bytes(base64.b64decode(value))
                    (folder / key).chmod(secret["defaultMode"])
        return found

    def _inside(self, text: str) -> str:
        """A text with the paths of volumes as they are here."""
        for there, here in self._volumes.items():
            at, _, path = text.rpartition("=")
            if path == there or path.startswith(f"{there}/"):
                return f"{at}{'=' if at else ''}{here}{path.removeprefix(there)}"
        return text

    def _close_root(self) -> None:
        """The root is read-only; volumes are not."""
        home = str(self.host.directory)
        for folder in (home, str(Path(memserve.__file__).parent)):
            self.host.run("mount", "--bind", folder, folder)
        self.host.run("mount", "-o", "remount,bind,ro", "/")
        self.host.run("sh", "-c", f"! touch /usr/x 2>/dev/null; touch {home}/x")

    def start(self) -> None:
        """The container's command, as the image's entry point has it."""
        command = (*CONFINED, sys.executable, "-m", "memserve", *self.arguments)
        self.process = self.host.start(
            *command, environment=self.environment, log=f"{self.name}.log"
        )

    def pre_stop(self) -> str:
        """Run the hook before the pod's end, with the image's `memserve`."""
        programs = self.host.directory / "tmp/bin"
        programs.mkdir(exist_ok=True)
        (programs / "memserve").write_text(f'#!/bin/sh\nexec {sys.executable} -m memserve "$@"\n')
        (programs / "memserve").chmod(0o755)
        path = f"{programs}:/usr/bin:/bin"
        hook = self.container["lifecycle"]["preStop"]["exec"]["command"]
        return self.host.run(*hook, environment={**self.environment, "PATH": path})

    def probe(self, kind: str) -> bool:
        """Whether a probe succeeds, asked at the pod's address as a kubelet does, which looks at no
        certificate."""
        asked = self.container[f"{kind}Probe"]["httpGet"]
        with suppress(OSError), self._connection(10) as connection:
            connection.request("GET", asked["path"])
            return connection.getresponse().status == 200
        return False

    def members(self) -> int:
        """Members that this gateway finds ready."""
        with self._connection(10) as connection:
            connection.request("GET", "/health")
            return int(json.loads(connection.getresponse().read())["ready"])

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        with self._connection(120) as connection:
            connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse()
            said = json.loads(answer.read())
        assert answer.status == 200, said
        return said

    @contextmanager
    def _connection(self, seconds: float) -> Iterator[http.client.HTTPConnection]:
        scheme = self.container["readinessProbe"]["httpGet"]["scheme"]
        at = self.host.address, self.port
        with self.host.entered():
            if scheme == "HTTPS":
                unchecked = ssl._create_unverified_context()
                made: http.client.HTTPConnection = http.client.HTTPSConnection(
                    *at, timeout=seconds, context=unchecked
                )
            else:
                made = http.client.HTTPConnection(*at, timeout=seconds)
            with closing(made):
                yield made

    def listens_at(self) -> set[int]:
        """Ports at which others reach it."""
        assert self.process is not None
        found = set()
        for line in Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()[1:]:
            address, state = (line.split()[column] for column in (1, 3))
            host, port = address.split(":")
            if state == "0A" and not host.endswith("7F"):  # listening, beyond loopback
                found.add(int(port, 16))
        return found

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.signal(number)
        return self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with started_hosts("GHPD", tmp_path / "hosts") as hosts:
        yield hosts


def example(model: Path, **more: Any) -> Release:
    """The chart's own example, but for the model and its sizes, and `more` values."""
    python = helm_python()
    if python is None:
        pytest.skip("no helm-sdkpy here: make helm")
    values = read_values("cpu-1p1d")
    values["model"] = {"path": f"/models/{model.name}", "served_name": "tiny", "dtype": "float32"}
    values["modelVolume"] = {"claimName": "models"}
    values["gateway"] = {"replicas": 2, "policy": "round-robin"}  # every request is handed over
    for group in values["groups"]:
        group |= {"hbm": "16MiB", "dram": "4MiB", "threads": 1, "profile": "off"}
    with Helm(python) as helm:
        return installed(helm, values | more)


def tell_names(hosts: Hosts, gateways: list[Pod], members: Sequence[Pod] = ()) -> None:
    """What the cluster's name server knows of the release's Services."""
    table = "127.0.0.1 localhost\n"
    for gateway in gateways:
        table += f"{gateway.host.address} {NAME}-gateways.{NAMESPACE}.svc\n"
    table += f"{gateways[-1].host.address} {NAME}.{NAMESPACE}.svc\n"
    for member in members:
        service = member.name.rpartition("-")[0]
        table += f"{member.host.address} {member.name}.{service}.{NAMESPACE}.svc\n"
    for host in hosts:
        (host.directory / "hosts").write_text(table)


def report(pods: Sequence[Pod]) -> str:
    logs = [(pod.name, pod.process.text()[-3000:]) for pod in pods if pod.process is not None]
    return "\n".join(f"--- {name}\n{text}" for name, text in logs)


def wait(pods: Sequence[Pod], condition: Callable[[], bool]) -> None:
    """Until a condition holds. Fails if a pod's process ends meanwhile."""

    def over() -> bool:
        for pod in pods:
            if pod.process is not None and not pod.process.running():
                pytest.fail(report(pods))
        return condition()

    until(over, pause=0.1)


def completed(gateway: Pod, model: Path) -> Any:
    """What a request took that a gateway answers with the right tokens."""
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    said = gateway.ask("/v1/completions", {**asked, "return_token_ids": True, "ignore_eos": True})
    assert said["choices"][0]["token_ids"] == Reference(model).generate(PROMPT, 8)
    return said["usage"]["memserve"]


def test_a_release_serves_and_its_probes_mean_what_they_say(hosts: Hosts, model: Path) -> None:
    release = example(model)
    pods = [
        Pod(release, f"{NAME}-{workload}", f"{NAME}-{workload}-{suffix}", hosts[host], model.parent)
        for workload, suffix, host in (
            ("gateway", "a", "G"),
            ("gateway", "b", "H"),
            ("prefill", "0", "P"),
            ("decode", "0", "D"),
        )
    ]
    first, second, prefill, decode = pods
    tell_names(hosts, [first])
    for pod in (first, prefill, decode):
        pod.start()

    def soon(condition: Callable[[], bool]) -> None:
        wait(pods, condition)

    def state(*kinds: str) -> list[bool]:
        return [pod.probe(kind) for pod in pods for kind in kinds]

    soon(lambda: prefill.probe("liveness"))  # its port is open while it loads
    soon(lambda: all(pod.probe("startup") for pod in (prefill, decode)))

    def answers(gateway: Pod) -> Any:
        soon(lambda: gateway.probe("readiness"))
        return completed(gateway, model)

    soon(lambda: first.probe("readiness") and first.members() == 2)
    assert answers(first)["bytes_received"] > 0  # KV moved between the pods

    # A second gateway: members find it by the name that has the addresses of both.
    second.start()
    tell_names(hosts, [first, second])
    answers(second)
    assert first.listens_at() == second.listens_at() == {first.port}
    assert decode.listens_at() > {decode.port}  # which the policy closes, whatever they are
    assert state("readiness", "liveness") == [True] * 8

    # A node's drain: the hook first, so that nothing new comes, then SIGTERM.
    decode.pre_stop()
    soon(lambda: not decode.probe("readiness"))
    assert decode.probe("liveness")
    assert all(p.probe(kind) for p in pods[:3] for kind in ("readiness", "liveness"))
    assert decode.end(signal.SIGTERM) == 0

    decode.start()
    soon(lambda: decode.probe("startup"))

    # Who is left lives and is ready, whoever was lost: a restart would help nobody.
    prefill.end(signal.SIGKILL)
    prefill.process = None
    for pod in (first, second, decode):
        assert [pod.probe("readiness"), pod.probe("liveness")] == [True, True]
    for gateway in (first, second):
        answers(gateway)

    # The hook of a gateway is a pause, in which it still serves.
    first.pre_stop()
    assert first.probe("readiness")
    assert first.end(signal.SIGTERM) == 0
    first.process = None
    tell_names(hosts, [second])
    answers(second)


def test_with_tls_pods_know_each_other_by_name(hosts: Hosts, model: Path) -> None:
    """One certificate, for the names that deploy/README.md lists, serves all pods."""
    release = example(model, tls={"existingSecret": "tls"}, gateway={"policy": "round-robin"})
    authority = trustme.CA()
    names = [f"{NAME}.{NAMESPACE}.svc", f"{NAME}-gateways.{NAMESPACE}.svc"]
    names += [f"*.{NAME}-{group}.{NAMESPACE}.svc" for group in ("prefill", "decode")]
    issued = authority.issue_cert(*names)
    files = {
        "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "tls.key": issued.private_key_pem.bytes(),
        "ca.crt": authority.cert_pem.bytes(),
    }
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    release.objects["Secret", "tls"] = {"data": data}
    gateway, prefill, decode = pods = [
        Pod(release, f"{NAME}-{workload}", f"{NAME}-{workload}-0", hosts[host], model.parent)
        for workload, host in (("gateway", "G"), ("prefill", "P"), ("decode", "D"))
    ]
    tell_names(hosts, [gateway], [prefill, decode])
    for pod in pods:
        pod.start()
    wait(pods, lambda: all(pod.probe("startup") for pod in pods))
    wait(pods, lambda: gateway.probe("readiness") and gateway.members() == 2)
    assert completed(gateway, model)["bytes_received"] > 0
    decode.pre_stop()  # by the gateway's name, with the authority of the environment
    wait(pods, lambda: not decode.probe("readiness"))
