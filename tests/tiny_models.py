"""Small models with random weights, saved as any model is, for comparison with Transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 512
WINDOW = 40  # not a multiple of the block size, and shorter than the prompts

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(num_hidden_layers=3, **COMMON),
    "qwen3": Qwen3Config(num_hidden_layers=3, head_dim=32, **COMMON),
    "mistral": MistralConfig(num_hidden_layers=3, sliding_window=WINDOW, **COMMON),
    "gemma3": Gemma3TextConfig(
        num_hidden_layers=4,
        head_dim=32,  # the least that vLLM's attention on CPUs has
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **COMMON,
    ),
}

# Its queries, keys and values have biases, and its last layers a window.
QWEN2 = Qwen2Config(
    num_hidden_layers=3,
    use_sliding_window=True,
    sliding_window=WINDOW,
    max_window_layers=1,
    **COMMON,
)

# Its KV is large beside all else that processes say to each other: 96 KiB a block of 16 tokens.
WIDE_KV = LlamaConfig(num_hidden_layers=3, head_dim=64, **{**COMMON, "num_key_value_heads": 4})


def save_tiny_model(
    name: str, directory: Path, seed: int = 0, config: PretrainedConfig | None = None
) -> Path:
    """Write config and weights of one of `CONFIGS`, or of another `config`; returns the
    directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Wider than usual, so that the next token depends on all of the context.
            if parameter.dim() > 1 or key.endswith("bias"):
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory / name)
    return directory / name


class Reference:
    """Transformers' own generation, greedy, with its own cache."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """The next `tokens` tokens."""
        with torch.inference_mode():
            out = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=False,
            )
        return [int(t) for t in out[0, len(prompt) :]]
