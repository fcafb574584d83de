"""Clusters to attack."""

from tests.e2e.conftest import (
    spawn,
    start_cluster,
    start_module_cluster,
    tokenizer,
    tokenizer_directory,
)

__all__ = ["spawn", "start_cluster", "start_module_cluster", "tokenizer", "tokenizer_directory"]
