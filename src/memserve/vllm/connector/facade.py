"""`MemServeConnector`, the class that vLLM loads in its scheduler and in each worker.

The calls have the form of vLLM 0.30 to 0.33; the methods that only 0.27 to 0.29 call are here, too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import vllm
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    hash_block_tokens,
    maybe_convert_block_hash,
)

from memserve.config import ModelConfig, parse_bytes
from memserve.errors import ConfigError
from memserve.transfer.mempool import MemPool
from memserve.vllm.connector.events import (
    MEDIUM,
    BlockName,
    NameBlock,
    Removed,
    Stored,
    TierEvents,
)
from memserve.vllm.connector.layout import (
    Version,
    layout_of,
    require_version,
)
from memserve.vllm.connector.member import (
    Member,
    MemberSettings,
    instance_command,
    read_arguments,
    read_settings,
)
from memserve.vllm.connector.metadata import CopiesDone, StepCopies
from memserve.vllm.connector.origin import origin_of, served_name
from memserve.vllm.connector.pool_server import PoolServer, Ready, tell_nobody
from memserve.vllm.connector.scheduler import PoolScheduler
from memserve.vllm.connector.sequence import Spaces
from memserve.vllm.connector.worker import Worker
from memserve.vllm.pool_messages import PARAMETERS

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:  # vLLM before 0.30 calls `get_finished`
    KVConnectorTransferResults = None

KVConnectorMetadata.register(StepCopies)
KVConnectorWorkerMetadata.register(CopiesDone)

log = logging.getLogger(__name__)

_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")  # methods of speculative decoding without own KV


class MemServeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A KV connector that puts a pool in host memory behind vLLM's KV cache."""

    _scheduler: PoolScheduler
    _server: PoolServer | None = None
    _member: Member | None = None
    _worker: Worker

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises ConfigError if the pool cannot hold the KV cache, or a setting is invalid."""
        super().__init__(vllm_config, role, kv_cache_config)
        version = require_version(vllm.__version__)
        _require_plain(vllm_config, kv_cache_config, version)
        parallel = vllm_config.parallel_config
        if role == KVConnectorRole.SCHEDULER:
            self._begin(vllm_config, kv_cache_config)
        else:
            groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
            blocks = kv_cache_config.num_blocks
            self._worker = Worker(groups, parallel.rank, parallel.world_size, blocks)

    def _begin(self, vllm_config: Any, kv_cache_config: Any) -> None:
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            raise ConfigError("MemServeConnector needs 'kv_load_failure_policy': 'recompute'")
        settings = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        served = settings.socket is not None or settings.gateways
        if served and vllm_config.parallel_config.data_parallel_size > 1:
            raise ConfigError(
                "MemServeConnector: an instance has one engine; start a server for each "
                "data-parallel rank"
            )
        name = settings.instance or f"vllm-{vllm_config.instance_id}"
        pool = _pool(vllm_config, kv_cache_config, settings, name)
        path = None if settings.socket is None else Path(settings.socket)
        if settings.gateways:
            command, key = _instance(vllm_config, settings, name)
            self._member = Member()
            path = self._member.pool
        ready: Ready = tell_nobody
        spaces = Spaces()
        if path is not None:
            self._server = PoolServer(pool, spaces, path)
            ready = self._server.ready
        ranks = vllm_config.parallel_config.world_size
        events = _events(vllm_config, kv_cache_config, spaces)
        self._scheduler = PoolScheduler(pool, ranks, spaces, events, ready)
        if self._server is not None:
            self._server.start()
        if self._member is not None:
            self._member.start([*command, "--vllm-pool", str(path)], key)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: the end of a request does not wait for its saves."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        return require_version(vllm.__version__).layout

    # --- workers

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        loaded, failed = self._worker.take_loaded()
        self._worker.take_invalid()  # `failed` already names the requests
        return KVConnectorTransferResults(set(), loaded, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str] | None]:
        return None, self._worker.take_loaded()[0] or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid() if KVConnectorTransferResults is None else set()

    def build_connector_worker_meta(self) -> CopiesDone | None:
        return self._worker.take_saved()

    # --- the scheduler

    def on_new_request(self, request: Any) -> None:
        plain = not (request.mm_features or request.prompt_embeds is not None)
        self._scheduler.arrived(request, plain and request.lora_request is None, _order(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        found = self._scheduler.offer(request, num_computed_tokens)
        return found, found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        block_ids = blocks.get_block_ids() if num_external_tokens else ()
        self._scheduler.allocated(request.request_id, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepCopies:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.update(
            connector_output.finished_recving or (),
            getattr(connector_output, "failed_recving", None) or (),
            connector_output.invalid_block_ids,
            connector_output.kv_connector_worker_meta,
        )

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._scheduler.finished(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return self.request_finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """While this is True, an engine without requests goes on stepping, so that workers can
        report."""
        return self._scheduler.busy

    def take_events(self) -> Iterable[Any]:
        block = self._vllm_config.cache_config.block_size
        return [_vllm_event(event, block) for event in self._scheduler.take_events()]

    def reset_cache(self) -> bool:
        self._scheduler.reset()
        return True

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            if self._member is not None:
                self._member.close()
            if self._server is not None:
                self._server.close()
            self._scheduler.close()


def _order(request: Any) -> int:
    """Return the number of the order that a request names, or 0."""
    said = (request.kv_transfer_params or {}).get(PARAMETERS)
    order = said.get("order") if isinstance(said, dict) else None
    return order if isinstance(order, int) else 0


def _vllm_event(event: Stored | Removed, block_tokens: int) -> Any:
    names = [maybe_convert_block_hash(name) for name in event.names]
    if isinstance(event, Removed):
        return BlockRemoved(block_hashes=names, medium=MEDIUM)
    begins = event.parent is None and event.salt
    return BlockStored(
        block_hashes=names,
        parent_block_hash=None if event.parent is None else maybe_convert_block_hash(event.parent),
        token_ids=event.tokens,
        block_size=block_tokens,
        lora_id=None,
        medium=MEDIUM,
        lora_name=None,
        extra_keys=[(event.salt,) if begins and not at else None for at in range(len(names))],
    )


def _require_plain(vllm_config: Any, kv_cache_config: Any, version: Version) -> None:
    """Raises ConfigError for unsupported forms of parallelism, KV caches and draft models."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline", "decode_context", "prefill_context"):
        if getattr(parallel, f"{name}_parallel_size", 1) > 1:
            raise ConfigError(
                f"MemServeConnector does not work with {name}_parallel_size > 1; "
                "tensor parallelism works"
            )
    if getattr(kv_cache_config, "kv_tp_replicas", 1) > 1:
        raise ConfigError(
            "MemServeConnector: more tensor-parallel ranks than KV heads are not supported"
        )
    layout, wanted = getattr(kv_cache_config, "kv_cache_layout", None), version.layout
    if layout is not None and str(layout).rpartition(".")[2] != wanted:
        raise ConfigError(
            f"MemServeConnector needs the KV cache layout {wanted}, vLLM has chosen {layout}; "
            f"another attention backend may allow it (VLLM_KV_CACHE_LAYOUT={wanted})"
        )
    if not version.is_full and len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            "MemServeConnector works with models of several KV cache groups (sliding windows "
            "beside full attention) from vLLM 0.30 on"
        )
    if any(
        getattr(group.kv_cache_spec, "non_causal", False)
        for group in kv_cache_config.kv_cache_groups
    ):
        raise ConfigError("MemServeConnector needs causal attention: KV depends on what follows")
    drafts = vllm_config.speculative_config
    if any(
        getattr(group, "is_eagle_group", False) for group in kv_cache_config.kv_cache_groups
    ) or (drafts is not None and drafts.method not in _WITHOUT_KV):
        raise ConfigError(
            "MemServeConnector does not work with draft models that have KV; n-gram drafts work"
        )


def _pool(vllm_config: Any, kv_cache_config: Any, settings: MemberSettings, name: str) -> MemPool:
    origin = origin_of(vllm_config, kv_cache_config, settings)
    ranks = vllm_config.parallel_config.world_size
    layout = layout_of(kv_cache_config.kv_cache_groups, origin, ranks)
    blocks = parse_bytes(str(settings.dram_bytes)) // layout.block_bytes
    if not blocks:
        raise ConfigError(f"dram_bytes: one block alone has {layout.block_bytes} bytes")
    return MemPool(layout, hbm_blocks=0, dram_blocks=blocks, instance=name)


def _instance(
    vllm_config: Any, settings: MemberSettings, name: str
) -> tuple[list[str], str | None]:
    """Return the command of the instance that joins a cluster, without `--vllm-pool`, and the
    server's API key or None. Raises ConfigError if the server's URL is unknown."""
    said = read_arguments(sys.argv[1:])
    if settings.url is None and said is None:
        raise ConfigError(
            "kv_connector_extra_config: 'join' needs 'url', that of this server's API: its "
            "command line does not tell"
        )
    model = vllm_config.model_config
    own = ModelConfig(
        path=str(model.model), served_name=served_name(model), revision=model.revision
    )
    told = vllm_config.kv_events_config
    events = None
    if told is not None and told.enable_kv_cache_events and told.publisher == "zmq":
        events = str(told.endpoint).replace("*", "127.0.0.1")
    else:
        log.warning(
            'no KV events are published (--kv-events-config \'{"enable_kv_cache_events": true, '
            '"publisher": "zmq"}\'): gateways will not know what this server has cached'
        )
    url = settings.url or (said.url if said is not None else "")
    return instance_command(settings, name, own, url, events), said.key if said else None


def _events(vllm_config: Any, kv_cache_config: Any, spaces: Spaces) -> TierEvents | None:
    """Return the pool's listener; None if KV events are off, or vLLM does not hash blocks of the
    pool's size."""
    told, cache = vllm_config.kv_events_config, vllm_config.cache_config
    if told is None or not told.enable_kv_cache_events:
        return None
    # One block size for all groups: a block of the pool has a part of each. Followers of vLLM's
    # events use the group with full attention, whose blocks have the same hashes.
    block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    hashed = getattr(kv_cache_config, "hash_block_size", None) or block
    if not hashed == block == cache.block_size:
        return None
    digest = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
    return TierEvents(block, _names(digest), spaces)


class _Salted(NamedTuple):
    """The fields of vLLM's `Request` that the hashes of its blocks depend on."""

    cache_salt: str | None
    mm_features: tuple[()] = ()
    lora_request: None = None
    prompt_embeds: None = None


def _names(digest: Callable[[Any], bytes]) -> NameBlock:
    def name(parent: BlockName | None, tokens: list[int], salt: str) -> BlockName:
        keys = None
        if parent is None and salt:
            keys, _ = generate_block_hash_extra_keys(_Salted(salt), 0, len(tokens), 0)
        block: BlockName = hash_block_tokens(digest, parent, tokens, keys)
        return block

    return name
