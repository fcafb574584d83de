"""The origin of a vLLM server's KV: everything that the bytes of its blocks depend on.

Servers with equal origins exchange KV, so the origin also has every property whose effect on the
bytes is unknown.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import vllm

from memserve.models.resolve import weights_digest
from memserve.vllm.connector.layout import Origin, require_version, settings_digest
from memserve.vllm.connector.member import MemberSettings

log = logging.getLogger(__name__)


def origin_of(vllm_config: Any, kv_cache_config: Any, settings: MemberSettings) -> Origin:
    """Return the origin of the KV that this server computes; `model` and `revision` of `settings`
    name the model where they are set."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.world_size
    return Origin(
        settings.model or served_name(model),
        _revision(model, settings.revision or ""),
        settings_digest(model.hf_config.to_dict()),
        " ".join((_pages(ranks), *_meanings(vllm_config), _packing(kv_cache_config))),
    )


def served_name(model: Any) -> str:
    """Return the first name of the model in the server's API, or its path."""
    served = model.served_model_name
    return str((served[0] if isinstance(served, list) else served) or model.model)


def _pages(ranks: int) -> str:
    """Return the layout of a block's pages. Before vLLM 0.30 the layout does not say that heads are
    outermost, so bytes may depend on the number of tensor-parallel ranks, which is then added."""
    version = require_version(vllm.__version__)
    return version.layout if version.is_full else f"{version.layout} {ranks}"


def _meanings(vllm_config: Any) -> list[str]:
    """Return the settings that decide how a page's bytes are computed and encoded."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    rope = getattr(model.hf_config, "rope_parameters", None)
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    said = [model.dtype, model.quantization, cache.cache_dtype, backend]
    # Some models use another rotary embedding if max_model_len exceeds the original length.
    said.append(original is not None and model.max_model_len > original)
    return list(map(str, said))


def _revision(model: Any, given: str) -> str:
    """Return the revision of the weights, as `ModelDirectory.identity`: the digest of a directory's
    weights, or else a hub model's commit, or else `given`, or else vLLM's `revision`. If all are
    unknown, a random one, so that no other server has the same."""
    if Path(model.model).is_dir() and (digest := weights_digest(Path(model.model))):
        return digest
    commit = getattr(model.hf_config, "_commit_hash", None)
    if known := str(commit or given or model.revision or ""):
        return known
    log.warning(
        "which weights these are, nothing tells: no KV goes to other servers, unless all have the "
        "same 'revision' in kv_connector_extra_config"
    )
    return f"unknown {os.urandom(16).hex()}"


def _packing(kv_cache_config: Any) -> str:
    """Return the platform. On a CPU the order of bytes within a page depends on the instruction set
    of the attention kernels, which is then added."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"{current_platform.device_type} {current_platform.__class__.__name__}"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    return f"cpu {_get_attn_isa(spec.dtype, spec.block_size, spec.head_size)}"
