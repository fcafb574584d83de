"""Cost of grammars: preparing the vocabulary, compiling, masks, and what plain requests notice.

`python -m memserve.bench.grammars [MODEL] [--dtype bfloat16] [--threads N]`
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import numpy as np
import torch

from memserve.api.generate import SamplingParams
from memserve.api.grammar import Grammar, GrammarKind
from memserve.bench.own_engine import load_own_engine
from memserve.config import ModelConfig
from memserve.engine.constraint import Constraint
from memserve.engine.engine import Engine
from memserve.engine.request import EngineRequest, TokenOutput
from memserve.engine.sampler import SamplerState, sample
from memserve.grammars.compiler import GrammarCompiler, LibraryGrammar
from memserve.models.resolve import resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.pool.pool import BlockPool
from memserve.types import RequestId

PERSON: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: Final = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "of": {"items": {"$ref": "#/$defs/node"}}},
        }
    },
    "$ref": "#/$defs/node",
}
WIDE: Final = {
    "type": "object",
    "properties": {
        f"field_{at}": ({"type": "integer", "minimum": 0, "maximum": 1000}, PERSON)[at % 2]
        for at in range(100)
    },
    "required": [f"field_{at}" for at in range(0, 100, 2)],
}
SCHEMAS: Final[dict[str, Any]] = {
    "any object": {"type": "object"},
    "3 properties": PERSON,
    "list of such": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 20},
    "recursive": TREE,
    "100 properties": WIDE,
    "1,000 values": {"enum": [f"value number {at}" for at in range(1000)]},
    "string of 10,000": {"type": "string", "maxLength": 10_000},
}
WALK = 300  # tokens
ROUNDS = 5
TOKENS = 32
PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=ModelConfig().path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    wanted = ModelConfig(path=given.model, dtype=given.dtype)
    directory = resolve_model(wanted, print).path
    tokenizer = Tokenizer.load(directory)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    print(f"vocabulary of {tokenizer.vocab_size}: {_prepared(compiler)}")
    for name, schema in SCHEMAS.items():
        print(f"{name:18s} {_one(compiler, schema, tokenizer.vocab_size)}")
    endless = compiler.compile(_grammar({"type": "array", "items": PERSON, "minItems": 1000}))
    print(_sampling(endless, tokenizer.vocab_size))
    _beside(wanted, given.threads, endless)


def _grammar(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def _prepared(compiler: GrammarCompiler) -> str:
    before = _resident()
    took = _seconds(lambda: compiler.compile(Grammar(GrammarKind.CHOICE, '["a"]')))
    return f"prepared in {took:.2f} s, {(_resident() - before) / 2**20:.0f} MiB"


def _one(compiler: GrammarCompiler, schema: Any, vocab: int) -> str:
    grammar = compiler.compile(_grammar(schema))
    compiling = [_seconds(lambda: compiler.compile(_grammar(schema))) for _ in range(ROUNDS)]
    fills, masks = _walk(grammar, vocab)
    low, high = median(fills) * 1e6, quantiles(fills, n=100)[98] * 1e6
    return (
        f"compiled in {median(compiling) * 1e3:.2f} ms; a token's mask {low:.0f} us, at the 99th "
        f"percentile {high:.0f}, first {fills[0] * 1e6:.0f}, most {max(fills) * 1e6:.0f}; "
        f"put on the logits: {median(masks) * 1e6:.0f} us more"
    )


def _walk(grammar: LibraryGrammar, vocab: int) -> tuple[list[float], list[float]]:
    """Return the seconds for the mask of each token of random texts, and for its use."""
    random = np.random.default_rng(0)
    logits = random.normal(size=vocab).astype(np.float32)
    matcher, constraint = grammar.matcher(), Constraint(grammar, ())
    ends = np.zeros(0, np.int64)
    fills: list[float] = []
    masks: list[float] = []
    while len(fills) < WALK:
        if matcher.ended:
            matcher, constraint = grammar.matcher(), Constraint(grammar, ())
        began = time.perf_counter()
        bits, _ = matcher.allowed()
        filled = time.perf_counter()
        row = logits.copy()
        whole = _seconds(lambda c=constraint, r=row: c.mask(r, ends))  # type: ignore[misc]
        fills.append(filled - began)
        again = _seconds(lambda m=matcher: m.allowed())  # type: ignore[misc]
        masks.append(max(0.0, whole - min(again, whole)))
        allowed = np.flatnonzero(np.unpackbits(bits, count=vocab, bitorder="little"))
        token = int(random.choice(allowed))
        matcher.accept(token)
        constraint.accept(token)
    return fills, masks


def _sampling(grammar: LibraryGrammar, vocab: int) -> str:
    """Return the time to sample a row, with and without a grammar."""
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(1, vocab)).astype(np.float32))
    rows = rows.to(torch.bfloat16)
    params = SamplingParams(seed=1)
    plain = SamplerState(params, np.array([2], np.int32), ())
    bound = SamplerState(params, np.array([2], np.int32), (), None, Constraint(grammar, ()))
    took: list[list[float]] = [[], []]
    for _ in range(WALK):
        for state, seconds in zip((plain, bound), took, strict=True):
            began = time.perf_counter()
            (chosen,) = sample(rows, [state])
            seconds.append(time.perf_counter() - began)
            state.append(chosen.token)
    free, constrained = (median(seconds) * 1e6 for seconds in took)
    return f"sampling a row of {vocab}: {free:.0f} us, constrained {constrained:.0f} us"


def _beside(wanted: ModelConfig, threads: int | None, grammar: LibraryGrammar) -> None:
    """Print the time of a step (the median of one answer's, the least of ROUNDS) with plain
    sequences, and with constrained ones among them."""
    own = load_own_engine(wanted, threads, 512, lambda text: print(text))
    with BlockPool(own.layout, 512, 0, instance="bench", device=str(own.model.device)) as pool:
        engine = Engine(own.model, pool, own.settings)
        steps = _Steps()
        engine.start(steps)
        try:
            for batch in (1, 8, 32):
                mixes = {"plain": 0, "half constrained": (batch + 1) // 2, "constrained": batch}
                found: dict[str, list[float]] = {name: [] for name in mixes}
                for _ in range(ROUNDS):
                    for name, constrained in mixes.items():
                        found[name].append(_step(engine, steps, batch, constrained, grammar))
                told = ", ".join(f"{name} {min(s) * 1e3:.1f} ms" for name, s in found.items())
                print(f"a step of {batch:2d} sampled sequences: {told}")
        finally:
            engine.stop()


def _step(
    engine: Engine, steps: _Steps, batch: int, constrained: int, grammar: LibraryGrammar
) -> float:
    """Return the median seconds of a step."""
    random = np.random.default_rng(7)
    requests = [
        EngineRequest(
            id=RequestId(f"{id(random)}-{time.perf_counter_ns()}-{at}"),
            prompt=random.integers(3, 9999, PROMPT_TOKENS).astype(np.int32),
            sampling=SamplingParams(max_tokens=TOKENS, seed=at, ignore_eos=True),
            grammar=grammar if at < constrained else None,
        )
        for at in range(batch)
    ]
    steps.expect(batch)
    engine.submit(requests)
    return steps.median()


class _Steps:
    """The engine's sink: the time between steps of all sequences."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._left = self._batch = 0
        self._done = threading.Event()

    def expect(self, batch: int) -> None:
        self._times, self._left, self._batch = [], batch, batch
        self._done.clear()

    def __call__(self, outputs: Sequence[TokenOutput]) -> None:
        if len(outputs) == self._batch:
            self._times.append(time.perf_counter())
        self._left -= sum(output.finish_reason is not None for output in outputs)
        if self._left == 0:
            self._done.set()

    def median(self) -> float:
        self._done.wait()
        return median(np.diff(self._times).tolist())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
