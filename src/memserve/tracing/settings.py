"""Traces of a process, from its configuration and OpenTelemetry's standard variables."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.parse import urlsplit

from memserve.clock import MonotonicClock
from memserve.config import TracesConfig
from memserve.errors import ConfigError
from memserve.tracing.span import Sampler, Tracer

log = logging.getLogger(__name__)

_PATH = "/v1/traces"  # of OTLP over HTTP, behind a base URL
_RATIOS = {"always_on": 1.0, "always_off": 0.0}  # by OTEL_TRACES_SAMPLER
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


@contextmanager
def open_tracer(
    config: TracesConfig,
    service: str,
    instance: str,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Tracer | None]:
    """Context with the process's tracer; None where traces are off, and then nothing is imported.
    The last spans are exported at its end.

    `service`: its name unless OTEL_SERVICE_NAME has one. `instance`: what tells it from other
    processes of the service. Raises ConfigError if the configuration wants traces and they cannot
    be; where only the environment wants them, that is logged.
    """
    try:
        endpoint = traces_endpoint(config, environment)
        ratio = sample_ratio(config, environment)
        if endpoint is not None:
            _require_packages()
    except ConfigError as error:
        if config.endpoint is not None:
            raise
        log.warning("no traces: %s", error)
        endpoint = None
    if endpoint is None:
        yield None
        return
    from memserve.tracing.otlp import SpanQueue, otlp_exporter

    clock = MonotonicClock()
    resource = {
        "service.name": environment.get("OTEL_SERVICE_NAME") or service,
        "service.namespace": "memserve",
        "service.instance.id": instance,
    }
    queue = SpanQueue(otlp_exporter(endpoint), resource, clock)
    queue.start()
    log.info("traces of %g of the requests go to %s", ratio, _without_credentials(endpoint))
    try:
        yield Tracer(clock, Sampler(ratio, config.client_rate, clock), queue.put, queue.counts)
    finally:
        queue.close()


def traces_endpoint(config: TracesConfig, environment: Mapping[str, str]) -> str | None:
    """Return the URL that takes OTLP traces; None: traces are off. Raises ConfigError."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if config.endpoint is not None:
        url = _checked(config.endpoint, "traces.endpoint", _PATH)
        # Processes of `memserve up` are told it in their command lines, which all may read.
        if urlsplit(url).username is not None or urlsplit(url).query:
            raise ConfigError(
                "traces.endpoint has credentials or a query in it: set OTEL_EXPORTER_OTLP_HEADERS, "
                "or the whole URL as OTEL_EXPORTER_OTLP_ENDPOINT"
            )
        return url
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() not in ("", "otlp"):
        return None
    for variable, path in (
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ""),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", _PATH),
    ):
        if value := environment.get(variable, "").strip():
            _check_protocol(environment)
            return _checked(value, variable, path)
    return None


def sample_ratio(config: TracesConfig, environment: Mapping[str, str]) -> float:
    """Return the share of requests that are traced. Raises ConfigError."""
    if config.sample is not None:
        return config.sample
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().removeprefix("parentbased_")
    if sampler in _RATIOS:
        return _RATIOS[sampler]
    text = environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1"
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG = '{text}': a number from 0 to 1")
    return ratio


def _check_protocol(environment: Mapping[str, str]) -> None:
    variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    if variable not in environment:
        variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    if (protocol := environment.get(variable, "")) not in ("", "http/protobuf"):
        raise ConfigError(f"{variable} = '{protocol}': memserve speaks http/protobuf only")


def _checked(url: str, name: str, path: str) -> str:
    """Return a URL, with `path` behind it unless it has that already. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{name} = '{url}': the URL of an OTLP receiver, as http://host:4318")
    return url if url.endswith(_PATH) else url.rstrip("/") + path if path else url


def _require_packages() -> None:
    for name in _NEEDED:
        try:
            found = find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError("traces need more packages: pip install 'memserve[traces]'")


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
