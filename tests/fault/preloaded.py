"""Imported once, by the process that the others are forked from: what is imported late."""

import transformers.models.llama.modeling_llama  # noqa: F401

from memserve.engine import engine, model  # noqa: F401
