"""deploy/helm: what the chart makes is what Kubernetes takes, and starts what memserve is."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import memserve
from memserve.api.api_keys import load_keys
from memserve.config import ClusterConfig, parse_bytes
from memserve.instance.run import OPEN_PATHS
from tests import chart_schema, metrics_document
from tests.chart_harness import (
    VALUES,
    Command,
    Release,
    arguments_of,
    check_object,
    command_of,
    container_of,
    environment_of,
    installed,
    read_values,
    release_of,
)
from tests.chart_schema import CHART, DEPLOY, GATEWAY_OWN, GROUP_OWN
from tests.helm import NAMESPACE, RELEASE, Helm, HelmError, helm_python
from tests.kube_api import KubeApi, Object
from tests.promql import selectors

NAME = f"{RELEASE}-memserve"
FIELDS = {"metadata.name": "POD-0", "status.podIP": "10.0.0.7"}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def helm() -> Iterator[Helm]:
    python = helm_python()
    if python is None:
        pytest.skip("no helm-sdkpy here: make helm")
    with Helm(python) as running:
        yield running


@pytest.fixture(scope="module")
def releases(helm: Helm) -> dict[str, Release]:
    """Every values file, installed. The API server has checked each object."""
    return {name: installed(helm, read_values(name)) for name in VALUES}


@pytest.fixture(params=sorted(VALUES))
def release(request: pytest.FixtureRequest, releases: dict[str, Release]) -> Release:
    return releases[request.param]


@pytest.fixture(params=sorted(VALUES))
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return merged_values(request.param)


def merged_values(name: str) -> dict[str, Any]:
    """Values as the chart sees them: over its defaults."""
    defaults, own = read_values("defaults"), read_values(name)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        defaults[key] = {**defaults[key], **value} if both else value
    return defaults


def changed(helm: Helm, change: Change, base: str = "defaults") -> Release:
    values = read_values(base)
    change(values)
    return installed(helm, values)


def group_of(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values["groups"][0]
    return found


# --- the schema and the page ----------------------------------------------------------------


def test_schema_and_page_are_made_from_the_configuration() -> None:
    """`make chart-docs` writes both."""
    assert chart_schema.SCHEMA.read_text("utf-8") == chart_schema.schema_text()
    page = chart_schema.PAGE.read_text("utf-8")
    assert page == chart_schema.page(page)


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["appVersion"] == memserve.__version__


def test_helm_has_nothing_against_the_chart(helm: Helm) -> None:
    with KubeApi(check_object) as api:
        said = helm.lint(api.kubeconfig, CHART)
    assert said["Errors"] is None
    assert {message["Severity"] for message in said["Messages"]} <= {1}  # information: no icon


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(gatway={}), "'gatway' not allowed"),
        (lambda v: v["gateway"].update(polcy="session"), "'polcy' not allowed"),
        (
            lambda v: v["gateway"].update(policy="fastest"),
            "must be one of 'least-load', 'prompt-tree'",
        ),
        (lambda v: v["gateway"].update(replicas=0), "minimum: got 0, want 1"),
        (lambda v: v["gateway"].update(port=80), "minimum: got 80, want 1,024"),
        (lambda v: v["gateway"].update(api_keys=["x"]), "'api_keys' not allowed"),
        (lambda v: v["gateway"].update(drain_seconds=0), "exclusiveMinimum: got 0, want 0"),
        (lambda v: v["model"].pop("path"), None),  # the default is there still
        (lambda v: v.update(groups=[]), "minItems: got 0, want 1"),
        (lambda v: group_of(v).update(host="0.0.0.0"), "'host' not allowed"),
        (lambda v: group_of(v).update(role="prefil"), "must be one of"),
        (lambda v: group_of(v).update(hbm_blocks="many"), "got string, want integer"),
        (lambda v: group_of(v).update(name="gateway"), "'not' failed"),
        (lambda v: group_of(v).update(name="A_b"), "does not match pattern"),
        (lambda v: group_of(v).pop("name"), "missing property 'name'"),
        (lambda v: group_of(v).update(rdma={"count": 1}), "missing property 'resource'"),
        (lambda v: group_of(v).update(autoscaling=SCALED), "missing property"),
        (lambda v: group_of(v).update(hbm="90%"), "how large /dev/shm must be follows from"),
        (lambda v: group_of(v).pop("dram"), "or say shm: 16Gi"),
        (lambda v: group_of(v).update(dram="7GiB"), "has to hold 8858370048 bytes of /dev/shm"),
        (lambda v: group_of(v).update(dram="lots"), "'lots' is no size such as 64GiB"),
        (lambda v: v["groups"].append(group_of(v)), "two groups are called 'prefill'"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(
    helm: Helm, change: Change, message: str | None
) -> None:
    if message is None:
        assert changed(helm, change).objects
        return
    with pytest.raises(HelmError, match=re.escape(message)):
        changed(helm, change)


SCALED = {"prometheus": "http://p", "min": 1, "max": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["gateway"].update(tolerations=[{"kee": "x"}]),
            r"Deployment .*tolerations.0: .*'kee' was unexpected",
        ),
        (
            lambda v: group_of(v).update(env=[{"name": "A", "value": 1}]),
            r"StatefulSet .*env.\d+.value: 1 is not of type",
        ),
        (
            lambda v: v.update(podMonitor={"enabled": True, "labels": {"a": True}}),
            "cannot unmarshal bool into .*ObjectMeta.metadata.labels of type string",
        ),
    ],
)
def test_objects_that_kubernetes_would_refuse_are_found(
    helm: Helm, change: Change, message: str
) -> None:
    """What values pass on as it is, the schemas of Kubernetes check, here as in a cluster."""
    with pytest.raises(HelmError, match=message):
        changed(helm, change)


@pytest.mark.parametrize("kind", ["PodMonitor", "ScaledObject", "PrometheusRule", "Service"])
def test_unknown_fields_of_every_kind_are_found(releases: dict[str, Release], kind: str) -> None:
    found = next(iter(releases["gpu-2p4d-rdma"].kinds(kind).values()))
    check_object(found)
    with pytest.raises(ValueError, match="'speck' was unexpected"):
        check_object({**found, "speck": {}})


# --- commands -------------------------------------------------------------------------------


def expected(values: dict[str, Any], group: dict[str, Any] | None) -> ClusterConfig:
    """The values as memserve's own file would have them."""

    def own(table: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
        return {k: v for k, v in table.items() if k not in others or k == "port"}

    data: dict[str, Any] = {key: values[key] for key in ("model", "log", "traces")}
    if group is None:
        data["gateway"] = own(values["gateway"], GATEWAY_OWN)
        if any(values["apiKeys"].get(key) for key in ("existingSecret", "entries")):
            data["gateway"]["api_keys_file"] = "/etc/memserve/api-keys/api-keys"
    else:
        data["cache"] = values["cache"]
        data["gateway"] = {"drain_seconds": values["gateway"]["drain_seconds"]}
        place = {"host": FIELDS["status.podIP"], "port": 8100}
        if values["tls"]["existingSecret"]:
            name = f"{NAME}-{group['name']}"
            place["advertise"] = f"https://POD-0.{name}.{NAMESPACE}.svc:8100"
        data["instance"] = [place | own(group, {*GROUP_OWN, "count"})]
    if values["tls"]["existingSecret"]:
        files = {"tls_cert": "tls.crt", "tls_key": "tls.key", "tls_ca": "ca.crt"}
        data["security"] = {key: f"/etc/memserve/tls/{name}" for key, name in files.items()}
    return msgspec.convert(data, ClusterConfig)


def run(pod: Object, monkeypatch: pytest.MonkeyPatch) -> Command:
    container = container_of(pod)
    environment = environment_of(container, FIELDS)
    return command_of(arguments_of(container, environment), monkeypatch)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_command_lines_come_to_what_the_values_say(
    name: str, releases: dict[str, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each container's arguments, through memserve's own parser."""
    values, pods = merged_values(name), releases[name].pods()
    assert run(pods.pop(f"{NAME}-gateway"), monkeypatch).config == expected(values, None)
    scheme = "https" if values["tls"]["existingSecret"] else "http"
    port = values["gateway"]["port"]
    for group in values["groups"]:
        workload = f"{NAME}-{group['name']}"
        command = run(pods.pop(workload), monkeypatch)
        if "autoscaling" not in group:
            members = releases[name].objects["StatefulSet", workload]["spec"]["replicas"]
            assert members == group.get("count", 1)
        assert command.config == expected(values, group)
        assert command.id == "POD-0"
        assert command.join == [f"{scheme}://{NAME}-gateways.{NAMESPACE}.svc:{port}"]
    assert not pods


def test_every_setting_reaches_the_command_line(
    helm: Helm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, lists, switches and words with quotes come through YAML, Helm and the parser."""
    values = read_values("defaults")
    values["gateway"] |= {
        "drain_seconds": 90.5,
        "cors_origins": ["https://a.example", "https://b.example"],
        "access_log": False,
        "metrics_secret": True,
        "max_body_bytes": 268435456,
        "response_store_bytes": 0,
    }
    values["cache"] = {"aggregated": False, "block_tokens": 32, "mode": "by-layer"}
    values["traces"] = {"endpoint": "http://otel:4318", "sample": 0.25}
    values["apiKeys"] = {"entries": ["sha256:" + "0" * 64]}
    words = ["--a=it's", '--b={"x": "y, z"}', "--c", "$(POD)", "two words", ""]
    vllm: dict[str, Any] = {
        "name": "v",
        "engine": "vllm",
        "dram": "1.5GiB",
        "vllm_args": words,
        "profile": "off",
    }
    many = {"name": "many", "hbm_blocks": 12345678, "dram_blocks": 0, "shm": "2Gi"}
    values["groups"] = [vllm, many]
    more = [{"name": "UCX_NET_DEVICES", "value": "mlx5_0:1"}]
    values["gateway"]["env"] = vllm["env"] = more
    release = installed(helm, values)
    defaults = merged_values("defaults") | values
    pods = release.pods()
    assert run(pods[f"{NAME}-gateway"], monkeypatch).config == expected(defaults, None)
    for name in (f"{NAME}-gateway", f"{NAME}-v"):
        assert more[0] in container_of(pods[name])["env"]
    for group in (vllm, many):
        config = run(pods[f"{NAME}-{group['name']}"], monkeypatch).config
        assert config == expected(defaults, group)
    secret = release.objects["Secret", f"{NAME}-api-keys"]
    assert base64.b64decode(secret["data"]["api-keys"]).decode() == "sha256:" + "0" * 64


def test_a_flag_that_memserve_does_not_know_would_be_found(
    releases: dict[str, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = releases["defaults"].pods()[f"{NAME}-decode"]
    container = container_of(pod)
    broken = {**pod, "spec": {"containers": [{**container, "args": [*container["args"], "--x=1"]}]}}
    with pytest.raises(AssertionError, match="No such option"):
        run(broken, monkeypatch)


def test_hooks_and_notes_are_real_commands(release: Release) -> None:
    """What a person is told to type, and what runs before a member's end."""
    import typer

    from memserve.cli import app

    lines = [line for line in release.notes.splitlines() if "-- memserve " in line]
    for pod in release.pods().values():
        command = container_of(pod)["lifecycle"]["preStop"]["exec"]["command"]
        lines += [part for part in command if "memserve" in part]
    assert len(lines) == 1 + len(release.kinds("StatefulSet"))
    for line in lines:
        words = line.replace('"$POD_NAME"', "POD-0").partition("memserve ")[2].split()
        root = typer.main.get_command(app)
        with root.make_context("memserve", words) as context:
            assert isinstance(root, typer.core.TyperGroup)
            _, cluster, rest = root.resolve_command(context, context._protected_args + context.args)
            assert isinstance(cluster, typer.core.TyperGroup)
            inner = cluster.make_context("cluster", rest, parent=context)
            _, last, rest = cluster.resolve_command(inner, inner._protected_args + inner.args)
            assert last is not None
            url = last.make_context("last", rest, parent=inner).params["url"]
        scheme, port = re.match(r"(https?)://[\w.-]+:(\d+)$", url).groups()  # type: ignore[union-attr]
        service = release.objects["Service", NAME]["spec"]["ports"][0]
        assert (url, int(port)) == (f"{scheme}://{NAME}.{NAMESPACE}.svc:{port}", service["port"])


# --- pods -----------------------------------------------------------------------------------


def test_pods_have_no_rights(release: Release) -> None:
    account = release.objects["ServiceAccount", NAME]
    assert account["automountServiceAccountToken"] is False
    assert not {kind for kind, _ in release.objects} & {"Role", "RoleBinding", "ClusterRole"}
    for name, pod in release.pods().items():
        spec, container = pod["spec"], container_of(pod)
        assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == (NAME, False)
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"]["drop"] == ["ALL"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        root = spec["securityContext"]["runAsUser"] == 0
        assert spec["securityContext"]["runAsNonRoot"] is not root
        # Root is only who locks memory for a network card, and has no other capability.
        assert own["capabilities"].get("add", []) == (["IPC_LOCK"] if root else [])
        if root:
            limits = container["resources"]["limits"]
            assert limits["rdma/hca"] == container["resources"]["requests"]["rdma/hca"] == "1", name


def test_only_one_values_file_needs_root(releases: dict[str, Release]) -> None:
    def roots(release: Release) -> set[str]:
        pods = release.pods().items()
        return {n for n, pod in pods if not pod["spec"]["securityContext"]["runAsUser"]}

    rooted = {name for name, release in releases.items() if roots(release)}
    assert rooted == {"gpu-2p4d-rdma"}
    assert f"{NAME}-gateway" not in roots(releases["gpu-2p4d-rdma"])


def test_all_that_is_written_has_a_volume(release: Release) -> None:
    """The root is read-only: caches, temporary files and shared memory are elsewhere."""
    for pod in release.pods().values():
        container = container_of(pod)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        written = {path for path, mount in mounts.items() if not mount.get("readOnly")}
        assert written == {"/tmp", "/cache", "/dev/shm"}
        environment = environment_of(container, FIELDS)
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "NUMBA_CACHE_DIR"):
            assert environment[name].startswith("/cache")


def test_secrets_are_in_files_that_memserve_takes(release: Release) -> None:
    """A mode that everybody may read is refused (`secrets.read_private`), and no argument and no
    variable has a secret."""
    for pod in release.pods().values():
        secret = [v["secret"] for v in pod["spec"]["volumes"] if "secret" in v]
        assert all(one["defaultMode"] == 0o440 for one in secret)
        assert pod["spec"]["securityContext"]["fsGroup"] == 10001
        container = container_of(pod)
        environment = environment_of(container, FIELDS)
        assert "MEMSERVE_SECRET" not in environment
        mounted = {m["mountPath"] for m in container["volumeMounts"] if m.get("readOnly")}
        files = [environment["MEMSERVE_SECRET_FILE"]]
        files += [
            argument.partition("=")[2]
            for argument in container["args"]
            if re.match("--(tls-|api-keys-file)", argument)
        ]
        assert all(str(Path(path).parent) in mounted for path in files)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_shared_memory_holds_the_members_blocks(name: str, releases: dict[str, Release]) -> None:
    for group in merged_values(name)["groups"]:
        workload = f"{NAME}-{group['name']}"
        pod = releases[name].pods()[workload]
        (shm,) = (v["emptyDir"] for v in pod["spec"]["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        gpu = "nvidia.com/gpu" in group["resources"]["limits"]
        sizes = [group["dram"]] if gpu else [group["dram"], group["hbm"]]
        needed = sum(map(parse_bytes, sizes))
        limit = parse_bytes(container_of(pod)["resources"]["limits"]["memory"] + "B")
        assert needed < int(shm["sizeLimit"]) < limit


def test_members_have_longer_than_their_drain(release: Release) -> None:
    for pod in release.pods().values():
        container = container_of(pod)
        (drain,) = (
            float(argument.partition("=")[2])
            for argument in container["args"]
            if argument.startswith("--drain-seconds=")
        )
        hook = container["lifecycle"]["preStop"]["exec"]["command"]
        (pause,) = (
            float(number) for number in re.findall(r"(?:sleep|timeout) (\d+)", " ".join(hook))
        )
        # After the drain, an instance gives what still runs 5 s, and a server 2 s.
        assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + pause + 15


def test_probes_ask_what_is_open_to_strangers(release: Release, values: dict[str, Any]) -> None:
    """tests/e2e/test_probes.py has what the paths mean."""
    for name, found in release.workloads().items():
        container = container_of(found["spec"]["template"])
        member = found["kind"] == "StatefulSet"
        probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
        # A member may load for hours before anybody asks whether it lives.
        assert paths == {
            "startup": "/ready" if member else "/live",
            "readiness": "/ready",
            "liveness": "/live",
        }, name
        assert set(paths.values()) <= set(OPEN_PATHS)
        start = probes["startup"]
        assert start["periodSeconds"] * start["failureThreshold"] == 7200
        assert {port["name"] for port in container["ports"]} == {"http"}
        assert all(probe["httpGet"]["port"] == "http" for probe in probes.values())


# --- services and policies ------------------------------------------------------------------


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def lets_in(
    release: Release, labels: Mapping[str, str], stranger: Mapping[str, str] | str, port: str
) -> bool:
    """Whether a pod with `labels` can be reached at a port from a pod with the labels `stranger`
    in this namespace, or from a namespace of that name."""
    policies = [
        policy["spec"]
        for policy in release.kinds("NetworkPolicy").values()
        if matches(policy["spec"]["podSelector"], labels)
    ]
    if not policies:
        return True

    def is_peer(peer: Mapping[str, Any]) -> bool:
        if "namespaceSelector" in peer:
            named = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            return bool(named == stranger)
        return not isinstance(stranger, str) and matches(peer["podSelector"], stranger)

    return any(
        ("from" not in rule or any(map(is_peer, rule["from"])))
        and ("ports" not in rule or port in {str(one["port"]) for one in rule["ports"]})
        for policy in policies
        for rule in policy["ingress"]
    )


def test_members_are_closed_to_all_but_their_cluster(release: Release) -> None:
    """On each port: pools, KV events and NIXL choose theirs."""
    pods = release.pods()
    other = {**pods[f"{NAME}-gateway"]["metadata"]["labels"], "app.kubernetes.io/instance": "other"}
    for name, pod in pods.items():
        labels = pod["metadata"]["labels"]
        siblings = [sibling["metadata"]["labels"] for sibling in pods.values()]
        if name == f"{NAME}-gateway":
            assert all(lets_in(release, labels, sibling, "http") for sibling in siblings)
            assert not any(lets_in(release, labels, sibling, "9999") for sibling in siblings)
            continue
        for port in ("http", "45678"):
            assert all(lets_in(release, labels, sibling, port) for sibling in siblings)
            for stranger in ({"app": "other"}, other, "apps", "monitoring"):
                assert not lets_in(release, labels, stranger, port)


def test_gateways_may_be_closed_to_all_but_clients(releases: dict[str, Release]) -> None:
    production = releases["gpu-2p4d-rdma"]
    labels = production.pods()[f"{NAME}-gateway"]["metadata"]["labels"]
    for peer, allowed in (("apps", True), ("monitoring", True), ("others", False)):
        assert lets_in(production, labels, peer, "http") is allowed
    assert lets_in(releases["defaults"], labels, "others", "http")


def test_scraping_members_opens_their_metrics_alone(helm: Helm) -> None:
    def scrape(values: dict[str, Any]) -> None:
        values["podMonitor"]["members"] = True

    release = changed(helm, scrape, "gpu-2p4d-rdma")
    labels = release.pods()[f"{NAME}-decode"]["metadata"]["labels"]
    assert lets_in(release, labels, "monitoring", "http")
    assert not lets_in(release, labels, "monitoring", "45678")
    assert not lets_in(release, labels, "apps", "http")


def test_services_lead_to_the_pods_that_listen(release: Release) -> None:
    pods = {name: pod["metadata"]["labels"] for name, pod in release.pods().items()}
    for name, service in release.kinds("Service").items():
        spec = service["spec"]
        led = {pod for pod, labels in pods.items() if spec["selector"].items() <= labels.items()}
        wanted = f"{NAME}-gateway" if name in (NAME, f"{NAME}-gateways") else name
        assert led == {wanted}
        ports = container_of(release.pods()[wanted])["ports"]
        assert [p["port"] for p in spec["ports"]] == [p["containerPort"] for p in ports]
        if name == NAME:
            continue
        # Names that are needed before a pod is ready.
        assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    for name, found in release.kinds("StatefulSet").items():
        assert found["spec"]["serviceName"] == name
        assert found["spec"]["podManagementPolicy"] == "Parallel"


def test_disruptions_take_one_pod_of_each_kind(release: Release) -> None:
    budgets = release.kinds("PodDisruptionBudget")
    assert budgets.keys() == release.pods().keys()
    for name, budget in budgets.items():
        labels = release.pods()[name]["metadata"]["labels"]
        others = [p["metadata"]["labels"] for n, p in release.pods().items() if n != name]
        selector = budget["spec"]["selector"]
        assert matches(selector, labels)
        assert not any(matches(selector, other) for other in others)
        assert budget["spec"]["maxUnavailable"] == 1


# --- monitoring -----------------------------------------------------------------------------


def test_scaling_asks_for_metrics_that_gateways_serve(helm: Helm) -> None:
    def scale(values: dict[str, Any]) -> None:
        values["groups"][0]["autoscaling"] = {
            **SCALED,
            "waitingSequences": 4,
            "hbmUse": 0.8,
            "busy": 0.9,
        }

    release = changed(helm, scale)
    (scaled,) = release.kinds("ScaledObject").values()
    assert scaled["spec"]["scaleTargetRef"]["name"] == f"{NAME}-prefill"
    # Two would scale it otherwise.
    assert "replicas" not in release.objects["StatefulSet", f"{NAME}-prefill"]["spec"]
    assert release.objects["StatefulSet", f"{NAME}-decode"]["spec"]["replicas"] == 1
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert len(queries) == 3
    for query in queries:
        for selector in (found := list(selectors(query))):
            labels = {
                label.name: label.values for label in metrics_document.ALL[selector.metric].labels
            }
            for matcher in selector.matchers:
                if matcher.label != "namespace":  # which the Prometheus operator adds
                    values = labels[matcher.label]  # none: any
                    assert not values or set(matcher.alternatives) <= set(values)
        assert found
        ids = re.findall('instance_id=~"([^"]*)"', query)
        assert ids
        for pattern in ids:
            assert re.fullmatch(pattern, f"{NAME}-prefill-12")
            assert not re.fullmatch(pattern, f"{NAME}-decode-0")


def test_prometheus_scrapes_what_the_alerts_ask_for(releases: dict[str, Release]) -> None:
    release = releases["gpu-2p4d-rdma"]
    (monitor,) = release.kinds("PodMonitor").values()
    labels = release.pods()[f"{NAME}-gateway"]["metadata"]["labels"]
    assert matches(monitor["spec"]["selector"], labels)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["scheme"]) == ("http", "/metrics", "https")
    job = endpoint["relabelings"][0]["replacement"]
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text("utf-8")
    assert f'up{{job="{job}"}}' in alerts
    (rule,) = release.kinds("PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load(alerts)


@pytest.mark.parametrize("own", ["", "shared"])
def test_scrapers_show_the_secret_where_metrics_ask_for_it(helm: Helm, own: str) -> None:
    """Gateways ask for it, and members do not: these must not be shown it."""

    def closed(values: dict[str, Any]) -> None:
        values["gateway"]["metrics_secret"] = True
        values["podMonitor"]["members"] = True
        values.setdefault("secret", {})["existingSecret"] = own

    release = changed(helm, closed, "gpu-2p4d-rdma")
    monitors = release.kinds("PodMonitor")
    (gateway,) = monitors[f"{NAME}-gateway"]["spec"]["podMetricsEndpoints"]
    (member,) = monitors[f"{NAME}-member"]["spec"]["podMetricsEndpoints"]
    name = own or f"{NAME}-cluster"
    assert gateway["authorization"] == {
        "type": "Bearer",
        "credentials": {"name": name, "key": "secret"},
    }
    assert own or "secret" in release.objects["Secret", name]["data"]
    assert "authorization" not in member


def test_a_secret_that_would_be_shown_without_tls_is_refused(helm: Helm) -> None:
    def closed(values: dict[str, Any]) -> None:
        values["gateway"]["metrics_secret"] = True
        values["podMonitor"]["enabled"] = scraped

    scraped = False
    assert changed(helm, closed).objects
    scraped = True
    with pytest.raises(HelmError, match=r"metrics_secret.*TLS alone; set tls\.existingSecret"):
        changed(helm, closed)


@pytest.mark.parametrize("members", [False, True])
def test_each_member_is_told_of_once(helm: Helm, members: bool) -> None:
    def scrape(values: dict[str, Any]) -> None:
        values["podMonitor"]["members"] = members

    monitors = changed(helm, scrape, "gpu-2p4d-rdma").kinds("PodMonitor")
    found = {
        name.removeprefix(f"{NAME}-"): endpoint.get("params")
        for name, monitor in monitors.items()
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    left_out = {"instances": ["false"]}
    assert found == ({"gateway": left_out, "member": None} if members else {"gateway": None})


def test_boards_are_those_of_deploy(releases: dict[str, Release]) -> None:
    boards = releases["gpu-2p4d-rdma"].objects["ConfigMap", f"{NAME}-dashboards"]
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {path.name: path.read_text("utf-8") for path in (DEPLOY / "grafana").glob("*.json")}
    assert boards["data"].keys() == files.keys()
    assert {n: json.loads(text) for n, text in boards["data"].items()} == {
        n: json.loads(text) for n, text in files.items()
    }


# --- upgrades -------------------------------------------------------------------------------


def test_an_upgrade_keeps_the_secret(helm: Helm) -> None:
    """Members that run have it, and would be strangers to those that start with another."""
    name = ("Secret", f"{NAME}-cluster")
    with KubeApi(check_object) as api:
        values = read_values("defaults")
        first = release_of(api, helm.install(api.kubeconfig, CHART, values))
        values["gateway"]["replicas"] = 5
        second = release_of(api, helm.install(api.kubeconfig, CHART, values))
    assert second.objects["Deployment", f"{NAME}-gateway"]["spec"]["replicas"] == 5
    assert second.objects[name]["data"] == first.objects[name]["data"]
    assert len(base64.b64decode(first.objects[name]["data"]["secret"])) == 64
    another = installed(helm, read_values("defaults"))
    assert another.objects[name]["data"] != first.objects[name]["data"]


def test_secrets_of_one_s_own_are_taken(releases: dict[str, Release]) -> None:
    release = releases["gpu-2p4d-rdma"]
    assert not release.kinds("Secret")
    for pod in release.pods().values():
        named = {
            v["name"]: v["secret"]["secretName"] for v in pod["spec"]["volumes"] if "secret" in v
        }
        assert named["cluster-secret"] == "memserve-cluster"
        assert named["tls"] == "memserve-tls"


def test_entries_of_keys_are_a_file_of_keys(helm: Helm, tmp_path: Path) -> None:
    entries = ["first-key-of-a-client name=a", "second-key-of-a-client tenant=b"]

    def keep(values: dict[str, Any]) -> None:
        values["apiKeys"]["entries"] = entries

    secret = changed(helm, keep).objects["Secret", f"{NAME}-api-keys"]
    file = tmp_path / "api-keys"
    file.write_bytes(base64.b64decode(secret["data"]["api-keys"]))
    file.chmod(0o440)
    keys = load_keys((), str(file))
    assert keys.find(b"first-key-of-a-client") is not None
    assert keys.find(b"third-key-of-a-client") is None
