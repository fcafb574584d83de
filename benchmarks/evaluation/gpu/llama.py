"""Llama models with random weights, in the sizes that are published, made on the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

Size = Literal["tiny", "1b", "8b"]

# Hidden size, layers, width of the feed-forward part, heads, KV heads, vocabulary: of Llama 3.2 1B
# and Llama 3.1 8B; "tiny" tries the measurement out.
_SHAPES: dict[Size, tuple[int, int, int, int, int, int]] = {
    "tiny": (64, 2, 128, 4, 2, 512),
    "1b": (2048, 16, 8192, 32, 8, 128_256),
    "8b": (4096, 32, 14336, 32, 8, 128_256),
}


def config_of(size: Size) -> LlamaConfig:
    """Return the configuration of a model."""
    hidden, layers, feed_forward, heads, kv_heads, vocabulary = _SHAPES[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=size == "1b",
        bos_token_id=1,
        eos_token_id=2,
    )


def random_llama(size: Size, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    """Return a model for inference with weights of seed 0 and one of Transformers' attentions."""
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config_of(size), dtype=dtype, attn_implementation=attention
        )
    return model.to(device).eval().requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a decode step reads of a model's weights: all but an embedding that is
    no output layer."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(total) - (0 if head is embedding else embedding.numel() * embedding.element_size())
