"""Converts GGUF to safetensors: `python -m memserve.models.convert_gguf MODEL.gguf DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, directory: Path) -> None:
    """Write config.json, bfloat16 safetensors and the tokenizer's files into `directory`."""
    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    # The weights are dequantised; with these attributes they would be saved and loaded as GGUF.
    del model.config.quantization_config
    del model.hf_quantizer
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _ask_for_bos(directory / "tokenizer_config.json")


def _ask_for_bos(path: Path) -> None:
    """Set `add_bos_token`: GGUF has this setting, and Transformers drops it when saving.

    Without it Gemma's perplexity on plain text is 446 instead of 6.5.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["add_bos_token"] = True
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
