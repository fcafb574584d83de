"""The Helm chart's objects, as an API server gets them, and the settings that a container's command
line comes to, as `memserve` itself reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import jsonschema
import kubernetes_validate
import msgspec
import pytest
import yaml
from typer.testing import CliRunner

import memserve.cli
from memserve.config import ClusterConfig, InstanceConfig
from memserve.instance import run as instance_run
from memserve.models.resolve import ModelDirectory
from memserve.models.tokenizer import Tokenizer
from tests.chart_schema import CHART, DEPLOY
from tests.helm import Helm
from tests.kube_api import KubeApi, Object

VALUES = {
    "defaults": CHART / "values.yaml",
    **{path.stem: path for path in sorted((DEPLOY / "helm/values").glob("*.yaml"))},
}
# The oldest release that Chart.yaml takes, and the newest whose schemas there are.
VERSIONS = ("1.28", kubernetes_validate.latest_version())
CUSTOM: dict[str, Any] = yaml.safe_load(
    (DEPLOY.parent / "tests/data/custom-resources.yaml").read_text("utf-8")
)


def read_values(name: str) -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load(VALUES[name].read_text("utf-8")))


def check_object(given: Object) -> None:
    """Raise ValueError with what a Kubernetes API server would not take of an object."""
    kind = str(given.get("kind"))
    try:
        if kind in CUSTOM:
            jsonschema.validate(given, CUSTOM[kind])
            return
        for version in VERSIONS:
            kubernetes_validate.validate(given, version, strict=True)
    except jsonschema.ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path)
        raise ValueError(f"{kind} {given['metadata']['name']}: {path}: {error.message}") from error


@dataclass
class Release:
    """What a chart with some values has made: objects by kind and name."""

    objects: dict[tuple[str, str], Object]
    notes: str

    def kinds(self, kind: str) -> dict[str, Object]:
        return {name: found for (of, name), found in self.objects.items() if of == kind}

    def workloads(self) -> dict[str, Object]:
        return self.kinds("Deployment") | self.kinds("StatefulSet")

    def pods(self) -> dict[str, Object]:
        """Pod templates, by workload."""
        return {name: found["spec"]["template"] for name, found in self.workloads().items()}


def installed(helm: Helm, values: Mapping[str, Any]) -> Release:
    """Install the chart into an API server of its own, which checks each object."""
    with KubeApi(check_object) as api:
        return release_of(api, helm.install(api.kubeconfig, CHART, dict(values)))


def release_of(api: KubeApi, told: Any) -> Release:
    objects = {(o["kind"], o["metadata"]["name"]): o for o in api.objects.values()}
    return Release(objects, told["info"]["notes"])


def container_of(pod: Object) -> Object:
    (container,) = pod["spec"]["containers"]
    return cast(Object, container)


def environment_of(container: Object, fields: Mapping[str, str]) -> dict[str, str]:
    """Variables of a container; `fields`: values of the pod's fields, as `status.podIP`. Those
    from Secrets are left out."""
    found = {}
    for variable in container["env"]:
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        elif "fieldRef" in variable["valueFrom"]:
            found[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    return found


def arguments_of(container: Object, environment: Mapping[str, str]) -> list[str]:
    """Arguments, with `$(NAME)` replaced as the kubelet does: only where there is such a
    variable."""

    def expanded(argument: str) -> str:
        return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda m: environment.get(m[1], m[0]), argument)

    return [expanded(argument) for argument in container["args"]]


@dataclass
class Command:
    """What a command line of `memserve gateway` or `memserve instance` would run."""

    config: ClusterConfig
    settings: InstanceConfig | None = None
    id: str | None = None
    join: Sequence[str] = ()


@contextmanager
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Command]]:
    ran: list[Command] = []

    def run_instance(
        config: ClusterConfig, settings: InstanceConfig, id_: str, *, join: Any
    ) -> int:
        ran.append(Command(config, settings, id_, join))
        return 0

    def run_gateway(config: ClusterConfig, *rest: Any, **more: Any) -> int:
        ran.append(Command(config))
        return 0

    from memserve.gateway import run as gateway_run
    from memserve.gateway import workers

    def run_workers(config: Any, command: Sequence[str], **more: Any) -> int:
        invoke([*command, "--workers=1"])  # as each worker is started
        (one,) = ran
        one.config = msgspec.structs.replace(one.config, gateway=config)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(instance_run, "run_instance", run_instance)
        patch.setattr(gateway_run, "run_gateway", run_gateway)
        patch.setattr(workers, "run_workers", run_workers)
        for name in ("hold_reloads", "_outlive_reloads"):
            patch.setattr(memserve.cli, name, lambda: None)
        patch.setattr(memserve.cli, "_begin_process", lambda *_: None)
        patch.setattr(
            memserve.cli,
            "resolve_model",
            lambda config, *_, **__: ModelDirectory(CHART, config.served_name or config.path),
        )
        patch.setattr(Tokenizer, "load", lambda *_: None)
        yield ran


def invoke(arguments: Sequence[str]) -> None:
    done = CliRunner().invoke(memserve.cli.app, list(arguments))
    assert done.exit_code == 0, f"{arguments}: {done.output} {done.exception!r}"


def command_of(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return what the `memserve` command with these arguments would run."""
    with _nothing_runs(monkeypatch) as ran:
        invoke(arguments)
    (command,) = ran
    return command
