"""The schema of the Helm chart's values: memserve's own settings from `config.py`, and Kubernetes'.

python -m tests.chart_schema    # writes values.schema.json and deploy/README.md's table anew:
                                # `make chart-docs`
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from memserve.config import (
    CacheConfig,
    GatewayConfig,
    InstanceConfig,
    LogConfig,
    ModelConfig,
    TracesConfig,
)
from memserve.flags import flags_of

DEPLOY = Path(__file__).parents[1] / "deploy"
CHART = DEPLOY / "helm/memserve"
SCHEMA = CHART / "values.schema.json"
PAGE = DEPLOY / "README.md"
BEGIN, END = "<!-- begin: make chart-docs -->\n", "<!-- end -->\n"

Schema = dict[str, Any]

# Settings that the chart chooses, or that make no sense in a pod.
GATEWAY_LEAVES_OUT = ("advertise", "api_keys", "api_keys_file")
INSTANCE_LEAVES_OUT = ("host", "advertise", "cpus", "vllm_url", "vllm_events", "vllm_pool")


def text(description: str, **more: Any) -> Schema:
    return {"description": description, "type": "string", **more}


def number(description: str, least: int = 0, **more: Any) -> Schema:
    return {"description": description, "type": "integer", "minimum": least, **more}


def switch(description: str) -> Schema:
    return {"description": description, "type": "boolean"}


def kubernetes(description: str, kind: str = "object") -> Schema:
    """Something of Kubernetes' own, which the API server checks."""
    return {"description": description, "type": kind}


def table(description: str, required: Collection[str] = (), **properties: Schema) -> Schema:
    """An object that has no other keys than these."""
    made: Schema = {"description": description, "type": "object", "properties": properties}
    if required:
        made["required"] = list(required)
    return {**made, "additionalProperties": False}


SIZE = r"^[0-9]+(\.[0-9]+)?([KMGT]i?B?|k)?$"
NAME = r"^[a-z]([-a-z0-9]{0,14}[a-z0-9])?$"

_LABELS = "labels of the object"
_IMAGE = {
    "repository": text("where the image is"),
    "tag": {"description": "default: the chart's appVersion", "type": ["string", "number"]},
    "digest": text("of the image, instead of a tag", pattern="^sha256:[0-9a-f]{64}$"),
    "pullPolicy": {"description": "Kubernetes'", "enum": ["Always", "IfNotPresent", "Never"]},
}
_POD: dict[str, Schema] = {
    "resources": kubernetes("requests and limits of the container"),
    "nodeSelector": kubernetes("labels of nodes for the pods"),
    "tolerations": kubernetes("taints of nodes that the pods bear", "array"),
    "affinity": kubernetes("where pods are to be, beside others"),
    "priorityClassName": text("of the pods"),
    "runtimeClassName": text("of the pods, as nvidia"),
    "podAnnotations": kubernetes("annotations of the pods"),
    "env": kubernetes("more environment variables of the container, as UCX_TLS", "array"),
}
_GROUP_NAME = text("of the group; its pods are RELEASE-memserve-NAME-0 and so on", pattern=NAME) | {
    "not": {"enum": ["gateway", "gateways", "cluster", "members", "api-keys", "dashboards"]}
}
GROUP_OWN: dict[str, Schema] = {
    "name": _GROUP_NAME,
    "image": table("another image than the others', as one with vLLM", **_IMAGE),
    "shm": text(
        "size of /dev/shm; default: by hbm and dram, if they are sizes and no shares", pattern=SIZE
    ),
    "rdma": table(
        "network cards for NIXL",
        ["resource"],
        resource=text("of the device plugin, as rdma/hca"),
        count=number("how many of it", 1),
        lockMemory=switch("run as root with IPC_LOCK alone, where nodes limit locked memory"),
    ),
    "autoscaling": table(
        "KEDA chooses the number of pods, not count",
        ["prometheus", "min", "max"],
        prometheus=text("URL of the Prometheus that scrapes the gateways", pattern="^https?://"),
        min=number("least pods", 1),
        max=number("most pods", 1),
        waitingSequences=number("one more pod above so many queued sequences for each pod", 1),
        hbmUse={
            "description": "one more pod where running sequences hold more of HBM than this share",
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
        },
        busy={
            "description": "one more pod where engines compute more of the time than this share",
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
        },
    )
    | {"anyOf": [{"required": [key]} for key in ("waitingSequences", "hbmUse", "busy")]},
    **_POD,
}
GATEWAY_OWN: dict[str, Schema] = {
    "replicas": number("gateways", 1),
    "service": table(
        "the clients' Service",
        type={"description": "Kubernetes'", "enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        annotations=kubernetes("of the Service"),
    ),
    **_POD,
}


def settings(config: type[msgspec.Struct], leave_out: Collection[str] = ()) -> dict[str, Schema]:
    """Return the schemas of a configuration table's fields that have a flag."""
    _, components = msgspec.json.schema_components([config])
    fields = components[config.__name__]["properties"]
    return {
        flag.field: _setting(fields[flag.field], components) for flag in flags_of(config, leave_out)
    }


def _setting(field: Schema, components: dict[str, Schema]) -> Schema:
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    made = {k: v for k, v in field.items() if k not in ("anyOf", "default", "$ref")}
    for kind in kinds:
        made |= kind
    if "$ref" in field:
        made["enum"] = components[field["$ref"].rpartition("/")[2]]["enum"]
    return made


def schema() -> Schema:
    """Return what values.schema.json is to hold."""
    # What Kubernetes and the file have the same name for (resources) is Kubernetes' here.
    gateway = settings(GatewayConfig, GATEWAY_LEAVES_OUT) | GATEWAY_OWN
    group = settings(InstanceConfig, INSTANCE_LEAVES_OUT) | GROUP_OWN
    for ports in (gateway, group):
        ports["port"] = number("where it listens", 1024, maximum=65535)
    made = table(
        "",
        ["model", "groups"],
        nameOverride=text("in place of the chart's name"),
        fullnameOverride=text("in place of RELEASE-memserve, in front of all names"),
        image=table(
            "of all containers",
            **_IMAGE,
            pullSecrets=kubernetes("as [{name: registry}]", "array"),
        ),
        model=table("[model]", ["path"], **settings(ModelConfig)),
        cache=table("[cache]", **settings(CacheConfig)),
        log=table("[log]", **settings(LogConfig)),
        traces=table("[traces]", **settings(TracesConfig)),
        gateway=table("[gateway], and its pods", **gateway),
        groups={
            "description": "members: [[instance]], and its pods; a StatefulSet each",
            "type": "array",
            "minItems": 1,
            "items": table("", ["name"], **group),
        },
        secret=table(
            "the cluster's secret",
            existingSecret=text("its Secret; default: one is made, and kept by upgrades"),
            key=text("in the Secret"),
        ),
        apiKeys=table(
            "keys of clients; none: no key is asked for",
            existingSecret=text("a Secret with a file of entries"),
            key=text("in the Secret"),
            entries={
                "description": "or the entries, best as sha256:HASH (memserve keys new)",
                "type": "array",
                "items": {"type": "string"},
            },
        ),
        tls=table(
            "https between all pods and for clients",
            existingSecret=text("with tls.crt and tls.key, as cert-manager makes it"),
            authority=switch("it has a ca.crt, too, which signed it"),
        ),
        modelVolume=table(
            "a volume with models, for model.path",
            claimName=text("a PersistentVolumeClaim; many pods read it"),
            mountPath=text("where it is mounted", pattern="^/"),
        ),
        cacheVolume=table(
            "an emptyDir at /cache, for downloaded models and compiled code",
            sizeLimit={"description": "default: none", "type": "string"},
        ),
        huggingFace=table(
            "the hub's token",
            existingSecret=text("a Secret with it"),
            key=text("in the Secret"),
        ),
        startupSeconds=number("a pod that is not ready after this is started again", 60),
        serviceAccount=table("has no rights", annotations=kubernetes("of it")),
        networkPolicy=table(
            "who reaches the pods",
            enabled=switch("members hear only this release's pods"),
            clientsFrom=kubernetes(
                "NetworkPolicyPeers that may reach gateways; none: all", "array"
            ),
            metricsFrom=kubernetes("NetworkPolicyPeers that may read metrics, too", "array"),
        ),
        podDisruptionBudget=table("drains of nodes take one pod", enabled=switch("of each kind")),
        podMonitor=table(
            "for the Prometheus operator",
            enabled=switch("scrape gateways, which tell of all members"),
            interval=text("between scrapes", pattern="^[0-9]+(ms|s|m)$"),
            labels=kubernetes(_LABELS),
            members=switch("scrape members as well"),
        ),
        prometheusRule=table(
            "for the Prometheus operator",
            enabled=switch("the alerts of deploy/prometheus"),
            labels=kubernetes(_LABELS),
        ),
        dashboards=table(
            "for Grafana's sidecar",
            enabled=switch("a ConfigMap with the boards of deploy/grafana"),
            labels=kubernetes(_LABELS + ", by which the sidecar finds it"),
        ),
    )
    made["properties"]["global"] = {"description": "of a chart that has this one in it"}
    del made["description"]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "memserve", **made}


def schema_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def rows(node: Schema, default: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield name, default and meaning of each value. Settings of the configuration file that have
    no default of their own here keep memserve's, which the file's documentation has."""
    for name, child in sorted(node["properties"].items()):
        at, given = f"{prefix}{name}", default.get(name) if isinstance(default, dict) else None
        if name == "global":
            continue
        yield f"`{at}`", "" if given in (None, "", {}, []) else _shown(given), child["description"]
        if child.get("properties") and not (child["description"].startswith("[") and not given):
            yield from rows(child, given, f"{at}.")
        elif name == "groups":
            yield from rows(child["items"], {}, f"{at}[].")


def _shown(value: Any) -> str:
    return "" if isinstance(value, dict | list) else f"`{json.dumps(value)}`"


def table_text() -> str:
    """Return the table of values of deploy/README.md."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    lines = ["", "| value | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |".replace("  ", " ") for row in rows(schema(), defaults)]
    return "\n".join([*lines, "", ""])


def page(old: str) -> str:
    """Return the page with the table made anew."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table_text()}{END}{after}"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8")), encoding="utf-8")
