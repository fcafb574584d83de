"""llguidance and xgrammar with the same schemas and tokenizer.

`python benchmarks/grammar_libraries.py llguidance|xgrammar MODEL_DIRECTORY`; xgrammar is no
dependency: install it where this runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from memserve.bench.grammars import SCHEMAS, WALK

STRICT: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "[1,1]"),
    ({"type": "object", "not": {"required": ["a"]}}, '{"a":1}'),
    ({"type": "string", "minLength": 2, "pattern": "^a+$"}, '"a"'),
    ({"type": "array", "contains": {"type": "integer"}}, '["a"]'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
    ({"if": {"type": "integer"}, "then": {"minimum": 5}}, "1"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a":1}'),
    ({"type": "integer", "multipleOf": 7}, "8"),
    ({"type": "object", "minProperties": 2}, "{}"),
]


class Llguidance:
    def __init__(self, directory: Path) -> None:
        import llguidance

        from memserve.grammars.vocabulary import library_tokenizer
        from memserve.models.tokenizer import Tokenizer

        self._matcher = llguidance.LLMatcher
        own = Tokenizer.load(directory)
        began = time.perf_counter()
        self._tokenizer = library_tokenizer(own, own.vocab_size)
        self.prepared = time.perf_counter() - began
        self._vocab = own.vocab_size

    def compile(self, schema: Any) -> Any:
        source = self._matcher.grammar_from_json_schema(json.dumps(schema))
        made = self._matcher(self._tokenizer, source, log_level=0)
        if made.is_error():
            raise ValueError(made.get_error())
        return made

    def allowed(self, matcher: Any) -> np.ndarray:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=self._vocab, bitorder="little"))

    def fill(self, matcher: Any) -> None:
        matcher.compute_bitmask()

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def ended(self, matcher: Any) -> bool:
        return bool(matcher.is_stopped())

    def takes(self, matcher: Any, text: str) -> bool:
        tokens = self._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class Xgrammar:
    def __init__(self, directory: Path) -> None:
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        self._library = xgrammar
        own = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        self._vocab = len(own)
        began = time.perf_counter()
        info = xgrammar.TokenizerInfo.from_huggingface(
            own, vocab_size=self._vocab, stop_token_ids=[1]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.prepared = time.perf_counter() - began
        self._bits = xgrammar.allocate_token_bitmask(1, self._vocab)

    def compile(self, schema: Any) -> Any:
        compiled = self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        return self._library.GrammarMatcher(compiled, terminate_without_stop_token=True)

    def allowed(self, matcher: Any) -> np.ndarray:
        self.fill(matcher)
        bits = self._bits.numpy().view(np.uint8).ravel()
        return np.flatnonzero(np.unpackbits(bits, count=self._vocab, bitorder="little"))

    def fill(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self._bits)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def ended(self, matcher: Any) -> bool:
        return bool(matcher.is_terminated())

    def takes(self, matcher: Any, text: str) -> bool:
        return matcher.accept_string(text) and matcher.is_completed()


def main() -> None:
    library = {"llguidance": Llguidance, "xgrammar": Xgrammar}[sys.argv[1]](Path(sys.argv[2]))
    print(f"vocabulary prepared in {library.prepared:.2f} s")
    random = np.random.default_rng(0)
    for name, schema in SCHEMAS.items():
        began = time.perf_counter()
        matcher = library.compile(schema)
        compiled = time.perf_counter() - began
        fills = []
        while len(fills) < WALK and not library.ended(matcher):
            began = time.perf_counter()
            library.fill(matcher)
            fills.append(time.perf_counter() - began)
            if not library.accept(matcher, int(random.choice(library.allowed(matcher)))):
                break
        low, high = np.median(fills) * 1e6, np.percentile(fills, 99) * 1e6
        print(
            f"{name:18s} compiled in {compiled * 1e3:.1f} ms, mask {low:.0f} us, 99% {high:.0f} us"
        )
    for schema, text in STRICT:
        try:
            said = "takes it" if library.takes(library.compile(schema), text) else "does not"
        except (ValueError, RuntimeError) as error:
            said = f"refuses the schema: {str(error).splitlines()[0][:60]}"
        print(f"{json.dumps(schema)[:70]} and {text}: {said}")


if __name__ == "__main__":
    main()
