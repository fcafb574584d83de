"""Loading and forward pass of a decoder-only Transformers model over a pool's blocks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from memserve.engine import attention
from memserve.engine.compiled_layers import CompiledLayers
from memserve.engine.devices import runs_triton
from memserve.engine.fused import fuse
from memserve.engine.layer_ops import LayerOps
from memserve.engine.linear import speed_up_products
from memserve.errors import ModelError
from memserve.pool.layout import KVLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model that the pool and the scheduler need."""

    layers: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # tokens of context
    eos_token_ids: tuple[int, ...]
    rope: str  # rotary-embedding parameters as text, for the fingerprint: they change cached keys


class Model:
    """A loaded model on one device. Not thread-safe: for one engine thread."""

    def __init__(self, module: nn.Module, shape: ModelShape, dtype: torch.dtype) -> None:
        self.module = module
        self.shape = shape
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def layout(
        self, name: str, block_tokens: int, aggregated: bool, revision: str = ""
    ) -> KVLayout:
        """Return the layout of this model's KV in blocks. `name` and `revision` identify the model
        in the fingerprint."""
        return KVLayout(
            layers=self.shape.layers,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            block_tokens=block_tokens,
            aggregated=aggregated,
            model=name,
            revision=revision,
            rope=self.shape.rope,
        )

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        keep: Tensor,
        backend: attention.AttentionBackend,
    ) -> Tensor:
        """Run the step that `backend` has planned. Returns logits [rows, vocab].

        tokens and positions: [tokens] int64. keep: [rows] int64, the rows of the packed batch
        that need logits.
        """
        output = self.module(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            backend=backend,
        )
        logits: Tensor = output.logits[0]
        return logits


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """Load configuration and weights (safetensors) from a local directory.

    Raises ModelError unless it holds a decoder-only model that this Transformers version and the
    built-in engine support.
    """
    attention.register()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        shape = read_shape(config, directory)
        with _quiet_transformers():
            module = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=attention.ATTENTION_NAME,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"cannot load a model from {directory}: {error}") from error
    return ready(module, shape, dtype, device)


def ready(module: nn.Module, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Model:
    """Return a model for inference on `device`, with the engine's own layers where it has some."""
    module.eval()
    module.requires_grad_(False)
    if device.type == "cpu":
        speed_up_products(module)
    if (ops := layer_ops(device)) is not None:
        fuse(module, ops, device)
    module.to(device)
    return Model(module, shape, dtype)


def layer_ops(device: torch.device) -> LayerOps | None:
    """Return the layer operations for models on `device`. None: Transformers' own are used."""
    if runs_triton(device):
        from memserve.engine.gpu.layers import TritonLayers  # Triton is not everywhere

        return TritonLayers()
    return CompiledLayers() if device.type == "cpu" else None


def read_shape(config: PretrainedConfig, directory: Path | None) -> ModelShape:
    """Return the shape of a text decoder. `directory`: with generation settings, if any.

    Raises ModelError for encoder-decoders, for KV shared between layers, and for latent attention.
    """
    text = config.get_text_config(decoder=True)
    if text.is_encoder_decoder:
        raise ModelError(f"{text.model_type} is an encoder-decoder; only decoders are served")
    values = text.to_dict()
    if values.get("num_kv_shared_layers"):
        raise ModelError(f"{text.model_type} shares KV between layers, which is not supported")
    if values.get("kv_lora_rank"):
        raise ModelError(f"{text.model_type} uses latent attention, which is not supported")
    heads = int(text.num_attention_heads)
    head_dim = values.get("head_dim") or int(text.hidden_size) // heads
    return ModelShape(
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        vocab_size=int(text.vocab_size),
        max_position=int(values.get("max_position_embeddings") or 1 << 20),
        eos_token_ids=_eos_token_ids(config, directory),
        rope=repr(values.get("rope_parameters")),
    )


def _eos_token_ids(config: PretrainedConfig, directory: Path | None) -> tuple[int, ...]:
    """Return the end tokens: those of the generation settings, if any, else the model's, as in
    Transformers' `generate`."""
    ids = config.get_text_config(decoder=True).eos_token_id
    if directory is not None:
        with contextlib.suppress(OSError):  # many models ship without generation settings
            generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
            if generation.eos_token_id is not None:
                ids = generation.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turn Transformers' progress bar off, which would write into the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
