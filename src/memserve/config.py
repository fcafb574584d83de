"""Configuration: frozen, typed structs, read from TOML with the same names as the flags.

Errors name an unknown key with the nearest known one, and a wrong type or value with its path.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from memserve.errors import ConfigError
from memserve.logs import LogFormat, LogLevel
from memserve.types import Role

Caching = Literal["off", "p", "pd", "full"]
TransferMode = Literal["by-layer", "by-request", "by-request-agg"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Eviction = Literal["lru", "cost"]
Profiling = Literal["auto", "off"]
Policy = Literal["prompt-tree", "session", "least-load", "round-robin"]
Engine = Literal["builtin", "vllm"]
BackendName = Literal["local", "ray"]
ToolCallParser = Literal[
    "auto",
    "none",
    "hermes",
    "llama3_json",
    "mistral",
    "qwen3_coder",
    "pythonic",
    "deepseek_v3",
    "deepseek_v31",
    "glm45",
    "granite",
    "kimi_k2",
    "openai",
]
ReasoningParser = Literal["auto", "none", "deepseek_r1", "qwen3", "mistral", "openai_gptoss"]

# For each caching setting, the roles in which an instance keeps its sequences' KV for later ones.
KEEPING_ROLES: dict[Caching, frozenset[Role]] = {
    "off": frozenset(),
    "p": frozenset({Role.PREFILL, Role.COLOCATED}),
    "pd": frozenset(Role),
    "full": frozenset(Role),
}

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveSeconds = Annotated[float, Meta(gt=0)]
MAX_BLOCK_TOKENS = 4096  # larger blocks are shared by no two prompts
_UNITS = {"": 1, **{f"{k}iB": 1 << (10 * n) for n, k in enumerate("KMGT", 1)}}
_UNITS |= {f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)}


def doc(text: str) -> Meta:
    """Return a field's description, which is the help text of its flag."""
    return Meta(description=text)


def no_flag(text: str) -> Meta:
    """Return the description of a field without a flag: for secrets, since all users of a machine
    can read the arguments of its processes, and for tables."""
    return Meta(description=text, extra={"flag": False})


def command_line(text: str) -> Meta:
    """Return the description of a list of arguments, whose flag takes one text with shell
    quoting."""
    return Meta(description=text, extra={"flag": "shell"})


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the TOML file."""


class ModelConfig(_Section, frozen=True):
    """The model, and dtype and device of its weights."""

    path: Annotated[str, doc("'demo', a local directory, or a hub id")] = "demo"
    dtype: Annotated[Dtype, doc("weights and KV; auto: bfloat16, if the device has it")] = "auto"
    revision: Annotated[str | None, doc("of a hub id")] = None
    served_name: Annotated[str | None, doc("in the API; default: the path")] = None
    max_model_len: Annotated[Positive | None, doc("default: the model's own limit")] = None
    device: Annotated[str, doc("'cpu', 'cuda', 'cuda:1'; auto: cuda if there is one")] = "auto"
    tool_call_parser: Annotated[
        ToolCallParser, doc("how it writes tool calls; auto: by its own templates, or type")
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParser, doc("how it marks its reasoning; auto: by its own templates")
    ] = "auto"


class CacheConfig(_Section, frozen=True):
    """Caching of KV, blocks, and transfers."""

    caching: Annotated[Caching, doc("who keeps KV for later requests")] = "full"
    mode: Annotated[TransferMode, doc("how a transfer is cut into writes")] = "by-request-agg"
    block_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_BLOCK_TOKENS)], doc("tokens whose KV one block holds")
    ] = 16
    eviction: Annotated[Eviction, doc("what goes first when memory is short")] = "lru"
    aggregated: Annotated[bool, doc("a block's layers and K and V in one run of bytes")] = True


class InstanceConfig(_Section, frozen=True):
    """`count` instances with equal settings."""

    engine: Annotated[Engine, doc("what computes: our own, or a vLLM server")] = "builtin"
    role: Annotated[Role, doc("what it does for a request")] = Role.COLOCATED
    count: Annotated[Positive, doc("instances like this")] = 1
    hbm_blocks: Annotated[
        Positive | None,
        doc("blocks of device memory; default: 2048 on a CPU, on a GPU 90% of what is free"),
    ] = None
    dram_blocks: Annotated[NonNegative, doc("blocks of host memory behind it")] = 4096
    hbm: Annotated[
        str | None, doc("device memory for KV instead of hbm_blocks: 8GiB, or 90% of what is free")
    ] = None
    dram: Annotated[
        str | None, doc("host memory for KV instead of dram_blocks: 64GiB, or 40% of what is free")
    ] = None
    threads: Annotated[Positive | None, doc("default: one for each core")] = None
    cpus: Annotated[tuple[NonNegative, ...] | None, doc("cores to pin to, as 0,1")] = None
    max_batch_tokens: Annotated[Positive, doc("per step, when none decodes")] = 2048
    mixed_batch_tokens: Annotated[Positive, doc("per step, while others decode")] = 256
    max_running: Annotated[Positive, doc("sequences per step")] = 64
    cuda_graphs: Annotated[bool, doc("on a GPU: replay small decode steps as CUDA graphs")] = True
    max_waiting: Annotated[Positive, doc("sequences queued; more are answered 429")] = 256
    host: Annotated[str, doc("address to listen on")] = "127.0.0.1"
    port: Annotated[Port, doc("port to listen on; 0: any")] = 0
    advertise: Annotated[
        str | None, doc("URL at which others reach it, if it is not where it listens")
    ] = None
    profile: Annotated[Profiling, doc("auto: measure the cost model at the first start")] = "auto"
    vllm_command: Annotated[tuple[str, ...], command_line("what starts a vLLM server")] = (
        "vllm",
        "serve",
    )
    vllm_args: Annotated[
        tuple[str, ...], command_line('more arguments of it, as "--enforce-eager"')
    ] = ()
    vllm_url: Annotated[
        str | None, doc("a vLLM server that runs already, for one that is started")
    ] = None
    vllm_events: Annotated[
        str | None, doc("of that server: where it publishes KV events, as tcp://127.0.0.1:5557")
    ] = None
    vllm_pool: Annotated[
        str | None, doc("of that server: the Unix socket of the pool in it, if it has one")
    ] = None
    resources: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]], no_flag("what Ray reserves for it: GPU, CPU, ...")
    ] = {}


class GatewayConfig(_Section, frozen=True):
    """The gateway, which clients talk to."""

    host: Annotated[str, doc("address to listen on")] = "127.0.0.1"
    port: Annotated[Port, doc("port to listen on; 0: any")] = 8000
    workers: Annotated[Positive, doc("processes that share the port, for as many cores")] = 1
    policy: Annotated[Policy, doc("how an instance is chosen")] = "prompt-tree"
    max_body_bytes: Annotated[Positive, doc("more is answered 413")] = 16 * 1024 * 1024
    response_store_bytes: Annotated[
        NonNegative, doc("memory of a worker for /v1/responses to go on from; 0: none is kept")
    ] = 64 * 1024 * 1024
    drain_seconds: Annotated[PositiveSeconds, doc("how long SIGTERM waits for requests")] = 30.0
    # Longer than most restarts, much less than clients' own timeouts.
    instance_wait_seconds: Annotated[
        float,
        Meta(ge=0),
        doc("how long requests wait where no instance is ready but one should be"),
    ] = 30.0
    chat_template: Annotated[str | None, doc("a Jinja file, for the model's own")] = None
    access_log: Annotated[bool, doc("a line for every request that explains its routing")] = True
    api_keys: Annotated[tuple[str, ...], no_flag("clients' keys; none: no key is asked for")] = ()
    api_keys_file: Annotated[
        str | None, doc("more keys, an entry a line; read again on SIGHUP")
    ] = None
    cors_origins: Annotated[
        tuple[str, ...], doc("sites whose pages may ask, as https://chat.example; *: any")
    ] = ()
    advertise: Annotated[
        str | None, doc("URL at which others reach it, if it is not where it listens")
    ] = None
    metrics_secret: Annotated[bool, doc("/metrics needs the cluster's secret, as /cluster")] = False
    prove_handover: Annotated[
        bool, doc("have each prefill and decode instance hand a small prompt over, once")
    ] = True


class SecurityConfig(_Section, frozen=True):
    """TLS certificates of gateways and instances."""

    tls_cert: Annotated[str | None, doc("a PEM file: serve https with this chain")] = None
    tls_key: Annotated[str | None, doc("its private key, PEM")] = None
    tls_ca: Annotated[
        str | None, doc("a PEM file: authorities of the other processes' certificates")
    ] = None


class LogConfig(_Section, frozen=True):
    """The logs of all processes, on standard error."""

    level: Annotated[LogLevel, doc("lines from this level on")] = "info"
    format: Annotated[LogFormat, doc("json: each line an object, with a request's figures")] = (
        "text"
    )


class TracesConfig(_Section, frozen=True):
    """OpenTelemetry traces of requests. The flags of these fields begin with `--traces-`."""

    endpoint: Annotated[
        str | None, doc("where they are sent by OTLP over HTTP, as http://host:4318; none: off")
    ] = None
    sample: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        doc("share of requests that are traced; default: OTEL_TRACES_SAMPLER_ARG, or 1"),
    ] = None
    client_rate: Annotated[
        float,
        Meta(ge=0),
        doc("requests a second that are traced because their 'traceparent' asks for it"),
    ] = 10.0


class DashboardConfig(_Section, frozen=True):
    """The dashboard that `memserve up` starts, where the extra `ui` is installed. Its flags begin
    with `--dashboard`."""

    enabled: Annotated[bool, doc("start it; memserve dashboard does so by hand")] = True
    port: Annotated[Port, doc("on 127.0.0.1; if it is taken, and for 0, any free one")] = 8090


class PlannerConfig(_Section, frozen=True):
    """The planner, which changes members' roles and number. The flags of these fields begin with
    `--planner-`."""

    enabled: Annotated[bool, doc("change roles, and with max_members members, by itself")] = False
    ttft: Annotated[PositiveSeconds, doc("objective: seconds to a first token")] = 2.0
    tpot: Annotated[PositiveSeconds, doc("objective: seconds for each later token")] = 0.1
    percentile: Annotated[
        Annotated[float, Meta(ge=1, le=99.9)] | None,
        doc("of both that has to meet its objective, as 90; default: the mean"),
    ] = None
    interval: Annotated[
        Annotated[float, Meta(ge=0.5, le=600)], doc("seconds between looks at the cluster")
    ] = 5.0
    dry_run: Annotated[bool, doc("decide and explain, and change nothing")] = False
    min_prefill: Annotated[NonNegative, doc("prefill members, while there are decode members")] = 1
    max_prefill: Annotated[Positive | None, doc("default: no limit")] = None
    min_decode: Annotated[NonNegative, doc("decode members, while there are prefill members")] = 1
    max_decode: Annotated[Positive | None, doc("default: no limit")] = None
    colocated: Annotated[bool, doc("may make all members colocated, and split them again")] = True
    min_members: Annotated[Positive, doc("below which no member is ended")] = 1
    max_members: Annotated[
        Positive | None, doc("up to which members are started; default: none is started or ended")
    ] = None


class BackendConfig(_Section, frozen=True):
    """Where a cluster's processes run."""

    backend: Annotated[BackendName, doc("on this machine, or on a Ray cluster")] = "local"
    ray_address: Annotated[str, doc("of the Ray cluster, as host:6379; auto: this node's")] = "auto"
    ray_namespace: Annotated[str, doc("names this cluster's actors among others'")] = "memserve"
    gateways: Annotated[NonNegative, doc("gateways; with Ray any number, 0 with `join`")] = 1
    join: Annotated[
        tuple[str, ...], doc("URLs of gateways that run elsewhere, which instances join, too")
    ] = ()


class ClusterConfig(_Section, frozen=True):
    """A whole cluster."""

    cluster: BackendConfig = BackendConfig()
    model: ModelConfig = ModelConfig()
    gateway: GatewayConfig = GatewayConfig()
    security: SecurityConfig = SecurityConfig()
    cache: CacheConfig = CacheConfig()
    log: LogConfig = LogConfig()
    traces: TracesConfig = TracesConfig()
    dashboard: DashboardConfig = DashboardConfig()
    planner: PlannerConfig = PlannerConfig()
    instance: tuple[InstanceConfig, ...] = (InstanceConfig(),)


def tables() -> dict[str, type[msgspec.Struct]]:
    """Return the tables of the file by name."""
    fields = ((each.name, each.type) for each in msgspec.structs.fields(ClusterConfig))
    return {name: next(iter(get_args(kind)), kind) for name, kind in fields}


def load_config(path: Path) -> ClusterConfig:
    """Read a TOML file. Raises ConfigError with the file, the key and the expected value."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(text: str) -> ClusterConfig:
    """Parse TOML text. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ConfigError(str(error)) from error
    _rename_model(data)
    _refuse_unknown_keys(data)
    try:
        return msgspec.convert(data, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error


def _rename_model(data: dict[str, object]) -> None:
    """Rename `model.model`, as the flag is called, to `model.path`. Raises ConfigError for both."""
    table = data.get("model")
    if isinstance(table, dict) and "model" in table:
        if "path" in table:
            raise ConfigError("model.model and model.path are the same setting; give one of them")
        table["path"] = table.pop("model")


def check_config(config: ClusterConfig) -> None:
    """Raise ConfigError for values that contradict each other."""
    check_planner(config.planner)
    for instance in config.instance:
        if instance.port and instance.count > 1:
            raise ConfigError(
                f"{instance.count} instances cannot share port {instance.port}; "
                "give each its own table, or port 0 for any"
            )
        if instance.dram is not None:
            check_memory(instance.dram, "instance.dram")
        if instance.hbm is not None:
            check_memory(instance.hbm, "instance.hbm")
        if instance.engine == "vllm":
            _check_vllm(instance)
        elif instance.vllm_url is not None:
            raise ConfigError("instance.vllm_url needs engine = 'vllm'")
        if instance.vllm_pool is not None and instance.vllm_url is None:
            raise ConfigError("instance.vllm_pool is of a server that runs already: vllm_url")
    _check_scalable(config)


def _check_scalable(config: ClusterConfig) -> None:
    """Raise ConfigError for what only one instance can have, in a cluster whose planner starts
    more."""
    if (most := config.planner.max_members) is None:
        return
    for instance in config.instance:
        given = msgspec.structs.asdict(instance)
        for name in ("port", "advertise", "vllm_url"):
            if given[name]:
                raise ConfigError(
                    f"planner.max_members = {most} lets the planner start more instances like this "
                    f"one, which cannot share instance.{name} = {given[name]!r}; leave one of both "
                    "out"
                )


def check_planner(planner: PlannerConfig) -> None:
    """Raise ConfigError for bounds that leave nothing between them."""
    bounds = (
        ("prefill", planner.min_prefill, planner.max_prefill),
        ("decode", planner.min_decode, planner.max_decode),
        ("members", planner.min_members, planner.max_members),
    )
    for name, least, most in bounds:
        if most is not None and least > most:
            raise ConfigError(
                f"planner.min_{name} = {least} is above planner.max_{name} = {most}; "
                f"give max_{name} {least} or more"
            )


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `64GiB`, `1.5GB` or `4096`. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]i?B)?", text.strip())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2] or ""])):
        raise ConfigError(f"'{text}' is no size; sizes are like 64GiB, 1500MB or 4096 (bytes)")
    return size


def parse_share(text: str) -> float | None:
    """Return the share of 1 of a percentage such as `90%`; None for another text. Raises
    ConfigError unless it is between 0% and 100%."""
    if not text.endswith("%"):
        return None
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", text.strip())
    share = float(match[1]) / 100 if match is not None else 0.0
    if not 0 < share < 1:
        raise ConfigError(f"'{text}' is not more than 0% and less than 100%, as 50% is")
    return share


def memory_bytes(text: str, name: str, free: int | None) -> int:
    """Return the bytes of the setting `name`: a size, or a percentage of `free` bytes (None: not
    known). Raises ConfigError that names it."""
    try:
        share = parse_share(text)
        if share is None:
            return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if free is None:
        raise ConfigError(
            f"{name} = '{text}': this system does not tell how much memory is free; say 8GiB"
        )
    return int(share * free)


def check_memory(text: str, name: str) -> None:
    """Raise ConfigError, which names the setting, for text that is neither size nor percentage."""
    memory_bytes(text, name, 1)


def _check_vllm(instance: InstanceConfig) -> None:
    """Raise ConfigError for settings that a vLLM server does not take, with vLLM's own arguments
    for them, and for contradictions among the others."""
    own = {
        "hbm": "--gpu-memory-utilization or --kv-cache-memory-bytes",
        "hbm_blocks": "--num-gpu-blocks-override",
        "max_batch_tokens": "--max-num-batched-tokens",
        "mixed_batch_tokens": "--max-num-batched-tokens",
    }
    default = InstanceConfig()
    given, usual = msgspec.structs.asdict(instance), msgspec.structs.asdict(default)
    for name, theirs in own.items():
        if given[name] != usual[name]:
            raise ConfigError(
                f"instance.{name} is the built-in engine's; a vLLM server takes {theirs} "
                "in vllm_args"
            )
    if instance.role is not Role.COLOCATED and instance.dram is instance.vllm_pool is None:
        raise ConfigError(
            f"instance.role = '{instance.role}': a vLLM server hands KV over from host memory; "
            "give it some, such as dram = '8GiB'"
        )
    if instance.dram_blocks != default.dram_blocks:
        raise ConfigError(
            "instance.dram_blocks: how large a block is, a vLLM server decides; give dram = '64GiB'"
        )
    if instance.vllm_url is not None and (
        instance.count > 1 or instance.vllm_args or instance.dram is not None
    ):
        raise ConfigError(
            "instance.vllm_url: the server runs already, with its own arguments, and is one "
            "instance's; leave vllm_args, dram and count out"
        )
    if not instance.vllm_command:
        raise ConfigError("instance.vllm_command is empty")


def _refuse_unknown_keys(data: dict[str, object]) -> None:
    sections = tables()
    _check_keys("", data, tuple(sections))
    for name, value in data.items():
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, dict):
                _check_keys(f"{name}.", table, sections[name].__struct_fields__)


def _check_keys(prefix: str, table: dict[str, object], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key '{prefix}{key}'; {hint}")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
