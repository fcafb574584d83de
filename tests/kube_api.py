"""A Kubernetes API server in memory, for what installs charts: discovery, and objects that are
created, read, listed, changed and deleted. Like a server with `fieldValidation=Strict` it refuses
objects that its schemas do not allow; it runs nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]


class Kind(NamedTuple):
    version: str  # "v1", or group/version
    plural: str
    kind: str


KINDS = [
    Kind("v1", "services", "Service"),
    Kind("v1", "secrets", "Secret"),
    Kind("v1", "configmaps", "ConfigMap"),
    Kind("v1", "serviceaccounts", "ServiceAccount"),
    Kind("apps/v1", "deployments", "Deployment"),
    Kind("apps/v1", "statefulsets", "StatefulSet"),
    Kind("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Kind("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy"),
    Kind("monitoring.coreos.com/v1", "podmonitors", "PodMonitor"),
    Kind("monitoring.coreos.com/v1", "prometheusrules", "PrometheusRule"),
    Kind("keda.sh/v1alpha1", "scaledobjects", "ScaledObject"),
]


class KubeApi:
    """The server, on a port of 127.0.0.1. A context manager."""

    def __init__(self, check: Callable[[Object], None]) -> None:
        """`check` raises ValueError for an object that is to be refused."""
        self.objects: dict[str, Object] = {}  # by path
        self.check = check
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                asked = urlsplit(self.path)
                query, content = parse_qs(asked.query), json.loads(body) if body else None
                status, said = api._answer(self.command, asked.path, query, content)
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def kubeconfig(self) -> str:
        return f"""apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{self._port}"}}}}]
users: [{{name: u, user: {{token: none}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""

    @property
    def _port(self) -> int:
        return int(self._server.server_address[1])

    def _answer(
        self, method: str, path: str, query: Mapping[str, list[str]], body: Any
    ) -> tuple[int, Object]:
        found = _discovered(path)
        if found is not None:
            return 200, found
        if method == "POST":
            return self._create(f"{path}/{body['metadata']['name']}", body)
        if path.rpartition("/")[2] in {kind.plural for kind in KINDS}:
            return 200, self._list(path, query.get("labelSelector", [""])[0])
        if path not in self.objects:
            return 404, _status(404, "NotFound", f"{path} not found")
        if method == "DELETE":
            return 200, self.objects.pop(path)
        if method == "PATCH":
            return self._store(path, _merged(self.objects[path], body), 200)
        if method == "PUT":
            return self._store(path, body, 200)
        return 200, self.objects[path]

    def _create(self, path: str, given: Object) -> tuple[int, Object]:
        if path in self.objects:
            return 409, _status(409, "AlreadyExists", f"{path} already exists")
        return self._store(path, given, 201)

    def _store(self, path: str, given: Object, status: int) -> tuple[int, Object]:
        try:
            self.check(given)
        except ValueError as error:
            return 400, _status(400, "BadRequest", str(error))
        self.objects[path] = given
        return status, given

    def _list(self, path: str, selector: str) -> Object:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        items = [
            item
            for at, item in self.objects.items()
            if at.startswith(f"{path}/")
            and wanted.items() <= item["metadata"].get("labels", {}).items()
        ]
        return {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}


def _discovered(path: str) -> Object | None:
    groups = sorted({kind.version for kind in KINDS if "/" in kind.version})
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [{"groupVersion": g, "version": g.split("/")[1]} for g in groups]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [
                {"name": one["groupVersion"].split("/")[0], "versions": [one]} for one in listed
            ],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version != "v1" and version not in groups:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": [
            {"name": k.plural, "singularName": "", "namespaced": True, "kind": k.kind}
            | {"verbs": verbs}
            for k in KINDS
            if k.version == version
        ],
    }


def _status(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": code,
    }


def _merged(old: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386). Lists are replaced as a whole."""
    if not isinstance(old, dict) or not isinstance(patch, dict):
        return patch
    merged = {k: v for k, v in old.items() if k not in patch}
    for key, value in patch.items():
        if value is not None:
            merged[key] = _merged(old.get(key), value)
    return merged
