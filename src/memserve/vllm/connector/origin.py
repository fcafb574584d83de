"""What a vLLM server's KV is: everything that the bytes of its blocks depend on.

Two servers of which it is the same take each other's KV, so what is not known to be the same is
taken for something else.
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
    """The origin of KV that this server computes; `settings`: what its user says of it."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.world_size
    return Origin(
        settings.model or served_name(model),
        _revision(model, settings.revision or ""),
        settings_digest(model.hf_config.to_dict()),
        " ".join((_pages(ranks), *_meanings(vllm_config), _packing(kv_cache_config))),
    )


def served_name(model: Any) -> str:
    """What its API calls a model."""
    served = model.served_model_name
    return str((served[0] if isinstance(served, list) else served) or model.model)


def _pages(ranks: int) -> str:
    """The layout of a block's pages. Where it does not say that heads are outermost, it may differ
    by the number of tensor-parallel ranks."""
    version = require_version(vllm.__version__)
    return version.layout if version.is_full else f"{version.layout} {ranks}"


def _meanings(vllm_config: Any) -> list[str]:
    """What decides what the bytes of a page mean, beside their type."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    rope = getattr(model.hf_config, "rope_parameters", None)
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    said = [model.dtype, model.quantization, cache.cache_dtype, backend]
    # Some models turn keys in another way where longer contexts are allowed.
    said.append(original is not None and model.max_model_len > original)
    return list(map(str, said))


def _revision(model: Any, given: str) -> str:
    """As `ModelDirectory.identity`: a digest of a directory's weights, or the commit of a hub's
    model; where nothing tells weights apart one of its own, unless the user has `given` one."""
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
    """On a CPU the order of bytes within a page depends on what it can do."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"{current_platform.device_type} {current_platform.__class__.__name__}"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    return f"cpu {_get_attn_isa(spec.dtype, spec.block_size, spec.head_size)}"
