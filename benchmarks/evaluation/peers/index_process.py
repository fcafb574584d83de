"""One index of prefixes, timed: `PYTHON index_process.py INDEX JSON`; prints JSON.

Runs in the environments of the peers, so that it needs nothing but Python: each index imports
what it is made of, and gets its prompts in the form that it takes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import sys
import time
import types
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Protocol

BLOCK = 16
VOCABULARY = 128_000
WORKERS = 8  # that hold prompts, where an index tells workers apart
BATCHES = 10  # that the insertions are timed in: figures are medians of them
_SGLANG = "sglang.srt.mem_cache"
# SGLang's radix tree; whatever else its package imports is not used by it.
_GENUINE = tuple(
    f"{_SGLANG}.{name}"
    for name in (
        *("radix_cache", "base_prefix_cache", "cache_init_params", "events"),
        *("evict_policy", "utils"),
    )
)


class Index(Protocol):
    """Prompts as the index takes them."""

    def form(self, tokens: list[int]) -> Any: ...

    def insert(self, number: int, prompt: Any) -> None: ...

    def match(self, prompt: Any) -> int:
        """Tokens that are held of it; returns when all insertions before have been made."""
        ...


class PoolIndex:
    """Ours, of one instance: `MemPool.insert` and `match`, with the pool's own book-keeping."""

    def __init__(self, blocks: int) -> None:
        layout = importlib.import_module("memserve.pool.layout").KVLayout(
            layers=1, kv_heads=1, head_dim=1, dtype="int8", block_tokens=BLOCK, model="bench"
        )
        pool = importlib.import_module("memserve.pool.pool").BlockPool
        self._numpy = importlib.import_module("numpy")
        self._pool = pool(layout, blocks, instance="bench")

    def form(self, tokens: list[int]) -> Any:
        return self._numpy.array(tokens, dtype="int32")

    def insert(self, number: int, prompt: Any) -> None:
        inserted = self._pool.insert(prompt, self._pool.alloc_mem(len(prompt) // BLOCK))
        self._pool.free_mem(inserted.duplicate)

    def match(self, prompt: Any) -> int:
        found = self._pool.match(prompt)
        found.release()
        return int(found.tokens)


class PromptTrees:
    """Ours, of a gateway: which of the instances hold what, told by their events."""

    def __init__(self) -> None:
        self._tree = importlib.import_module("memserve.scheduler.prompt_tree").PromptTree()
        self._numpy = importlib.import_module("numpy")
        self._names = [f"worker-{number}" for number in range(WORKERS)]
        for name in self._names:
            self._tree.join(name, BLOCK)

    def form(self, tokens: list[int]) -> Any:
        prompt = self._numpy.array(tokens, dtype="int32")
        return prompt, _chain(tokens)

    def insert(self, number: int, prompt: Any) -> None:
        self._tree.stored(self._names[number % WORKERS], "", None, prompt[1], prompt[0])

    def match(self, prompt: Any) -> int:
        return max(self._tree.match("", prompt[0]).values(), default=0)


class SglangIndex:
    """SGLang's RadixCache without the memory behind it, its own way to be simulated."""

    def __init__(self) -> None:
        cache = sglang_radix_cache()
        base = importlib.import_module(f"{_SGLANG}.base_prefix_cache")
        self._torch = importlib.import_module("torch")
        self._key, self._insert, self._match = (
            cache.RadixKey,
            base.InsertParams,
            base.MatchPrefixParams,
        )
        self._cache = cache.RadixCache.create_simulated(page_size=BLOCK)

    def form(self, tokens: list[int]) -> Any:
        return array("q", tokens)

    def insert(self, number: int, prompt: Any) -> None:
        first = number * len(prompt)
        value = self._torch.arange(first, first + len(prompt))
        self._cache.insert(self._insert(key=self._key(token_ids=prompt), value=value))

    def match(self, prompt: Any) -> int:
        key = self._key(token_ids=prompt)
        return int(self._cache.match_prefix(self._match(key=key)).device_prefix_len)


class VllmIndex:
    """vLLM's block hashes, chained, and a look-up of each."""

    def __init__(self) -> None:
        self._utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
        named = importlib.import_module("vllm.utils.hashing").get_hash_fn_by_name
        self._hash = named("sha256")  # its default
        self._utils.init_none_hash(self._hash)
        self._blocks: dict[bytes, int] = {}

    def form(self, tokens: list[int]) -> Any:
        return tokens

    def _hashes(self, tokens: list[int]) -> Iterator[bytes]:
        parent = None
        for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
            parent = self._utils.hash_block_tokens(self._hash, parent, tokens[at : at + BLOCK])
            yield parent

    def insert(self, number: int, prompt: Any) -> None:
        first = number * (len(prompt) // BLOCK)
        for at, key in enumerate(self._hashes(prompt)):
            self._blocks.setdefault(key, first + at)

    def match(self, prompt: Any) -> int:
        count = 0
        for key in self._hashes(prompt):
            if key not in self._blocks:
                break
            count += 1
        return count * BLOCK


class DynamoIndex:
    """Dynamo's RadixTree, told by the workers' events, which are encoded before."""

    def __init__(self) -> None:
        core = importlib.import_module("dynamo._core")
        self._tree = core.RadixTree()
        self._hash = core.compute_block_hash_for_seq

    def form(self, tokens: list[int]) -> Any:
        named = zip(_chain(tokens), self._hash(tokens, BLOCK), strict=True)
        blocks = [{"block_hash": name, "tokens_hash": content} for name, content in named]
        event = {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}
        return tokens, json.dumps(event).encode()

    def insert(self, number: int, prompt: Any) -> None:
        self._tree.apply_event(number % WORKERS, prompt[1])

    def match(self, prompt: Any) -> int:
        scores = self._tree.find_matches(self._hash(prompt[0], BLOCK)).scores
        return max(scores.values(), default=0) * BLOCK


def _chain(tokens: list[int]) -> list[int]:
    """Names of blocks as an engine gives them: of their tokens and all before."""
    names, name = [], 0
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        name = hash((name, tuple(tokens[at : at + BLOCK]))) & (2**63 - 1)
        names.append(name)
    return names


class _Absent(types.ModuleType):
    """Has every name, each a class without content."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _AbsentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """What SGLang's packages import and its radix tree does not use: kernels, servers, CUDA."""

    def find_spec(
        self, name: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sglang" or name in _GENUINE:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It is empty."""


def sglang_radix_cache() -> Any:
    """The module, imported from its own file in the installed package."""
    found = importlib.util.find_spec("sglang")
    assert found is not None
    assert found.submodule_search_locations is not None
    root = Path(found.submodule_search_locations[0])
    for name in ("sglang", "sglang.srt", _SGLANG):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    sys.meta_path.insert(0, _AbsentModules())
    return importlib.import_module(f"{_SGLANG}.radix_cache")


def prompts(count: int, tokens: int, prefixes: int, prefix_tokens: int) -> Iterator[list[int]]:
    """The same ones each time, made as they are needed."""
    choose = random.Random(0)
    shared = [choose.choices(range(VOCABULARY), k=prefix_tokens) for _ in range(prefixes)]
    for number in range(count):
        own = choose.choices(range(VOCABULARY), k=tokens - prefix_tokens)
        yield [*shared[number % prefixes], *own]


def measure(index: Index, shape: dict[str, int]) -> dict[str, float]:
    """Microseconds of an insertion and of a match, bytes for each prompt."""
    # All are made first, and kept: nothing that is freed makes room for what is measured.
    made = list(prompts(**{name: shape[name] for name in _SHAPE}))
    formed = [index.form(tokens) for tokens in made]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    size = max(1, len(formed) // BATCHES)
    inserts = [
        _time_batch(index, first, formed[first : first + size])
        for first in range(0, len(formed), size)
    ]
    growth = _resident_bytes() - before
    matches = []
    for prompt in formed[:: max(1, len(formed) // shape["samples"])]:
        started = time.perf_counter_ns()
        held = index.match(prompt)
        matches.append((time.perf_counter_ns() - started) / 1e3)
        if held != shape["tokens"]:
            raise SystemExit(f"{held} of {shape['tokens']} stored tokens are held")
    return {
        "insert_us": median(inserts),
        "match_us": median(matches),
        "bytes_per_prompt": growth / len(formed),
    }


_SHAPE = ("count", "tokens", "prefixes", "prefix_tokens")


def _time_batch(index: Index, first: int, batch: list[Any]) -> float:
    """Microseconds for each insertion. Some are made by a thread of the index's own: the batch
    ends when a match has seen all of them, less what a match takes that finds all done."""
    started = time.perf_counter_ns()
    for number, prompt in enumerate(batch, first):
        index.insert(number, prompt)
    index.match(batch[-1])
    seen = time.perf_counter_ns()
    index.match(batch[-1])
    again = time.perf_counter_ns() - seen
    return max(0, seen - started - again) / 1e3 / len(batch)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    name = sys.argv[1]
    if name == "check-sglang":
        sglang_radix_cache()
        return
    shape = json.loads(sys.argv[2])
    blocks = (shape["count"] + 1) * shape["tokens"] // BLOCK
    indexes: dict[str, Callable[[], Index]] = {
        "pool": lambda: PoolIndex(blocks),
        "prompt-trees": PromptTrees,
        "sglang": SglangIndex,
        "vllm": VllmIndex,
        "dynamo": DynamoIndex,
    }
    json.dump(measure(indexes[name](), shape), sys.stdout)


if __name__ == "__main__":
    main()
