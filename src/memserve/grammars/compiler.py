"""Compiler of grammars for one model's tokens, by llguidance.

A matcher of the library parses the bytes of tokens with an Earley parser over lazily built
automata, so that compiling costs milliseconds, and each step has a bound of its own. What the
library cannot enforce it refuses: nothing of a schema is ignored.
"""

from __future__ import annotations

import json
import re
import time
from importlib import metadata
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.api.grammar import Grammar, GrammarKind
from memserve.errors import GrammarFailed, RequestError
from memserve.grammars.gbnf_lark import lark_source
from memserve.grammars.json_schema import json_options, parse_schema, place_of
from memserve.grammars.structural_tag import lark_of_tag
from memserve.grammars.vocabulary import library_tokenizer
from memserve.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# CPU time that a call's grammar may take, in all of its sequences together: at the start, more as
# its longest sequence grows by a token, and with each token of any. Most tokens take some ten
# microseconds, the keys of MAX_SCHEMA_PROPERTIES ten milliseconds.
BURST_SECONDS: Final = 0.25
STEP_SECONDS: Final = 0.005
TOKEN_SECONDS: Final = 0.00025
# Earlier versions abort the process at some grammars. vLLM 0.32 asks for 1.7.
_OLDEST: Final = (1, 9)
_ANY_OBJECT: Final = '{"type":"object"}'
_UNKNOWN_KEYS: Final = re.compile(r"Unimplemented keys: (\[.*?\])")


class GrammarCompiler:
    """Compiles grammars for a vocabulary. The vocabulary is prepared at the first one. For one
    thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: of the model's logits, which may have more tokens than the tokenizer."""
        self._tokenizer = tokenizer
        self._size = max(vocab_size, tokenizer.vocab_size)
        self._library: llguidance.LLTokenizer | None = None

    def compile(self, grammar: Grammar) -> LibraryGrammar:
        """Compile a grammar. Raises RequestError that says what is wrong with it and where, or that
        the library is old."""
        import llguidance

        if self._library is None:
            _check_version(metadata.version("llguidance"))
            self._library = library_tokenizer(self._tokenizer, self._size)
        try:
            source = self._source(grammar)
            matcher = llguidance.LLMatcher(self._library, source, log_level=0, limits=_limits())
            if matcher.is_error():
                raise RequestError(_reason(matcher.get_error(), grammar))
            compiled = LibraryGrammar(matcher, self._size)
            _check_first_token(compiled)
        except RequestError as error:
            raise RequestError(f"'{grammar.param}': {error}", grammar.param) from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"'{grammar.param}': {error}", grammar.param) from error
        return compiled

    def _source(self, grammar: Grammar) -> str:
        """Return a grammar in the library's format."""
        import llguidance

        library, source = llguidance.LLMatcher, grammar.source
        if grammar.kind is GrammarKind.REGEX:
            return library.grammar_from_regex(source)
        if grammar.kind is GrammarKind.EBNF:
            return library.grammar_from_lark(lark_source(source))
        if grammar.kind is GrammarKind.CHOICE:
            return library.grammar_from_lark(_lark_of_choice(source))
        if grammar.kind is GrammarKind.STRUCTURAL_TAG:
            return lark_of_tag(source, self._tokenizer.special_tokens, grammar.compact)
        if grammar.kind is GrammarKind.JSON_OBJECT:
            source = _ANY_OBJECT
        else:
            schema = parse_schema(source)
            if schema is False:
                raise RequestError("no text obeys the schema `false`")
            source = "{}" if schema is True else source
        return library.grammar_from_json_schema(source, overrides=json_options(grammar.compact))


def _check_version(version: str) -> None:
    """Raise RequestError if this version of the library must not be given clients' grammars."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    if numbers is None or (int(numbers[1]), int(numbers[2] or 0)) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise RequestError(f"grammars need llguidance {oldest} or newer; the server has {version}")


def _limits() -> llguidance.LLParserLimits:
    """Return what compiling may take, and then each token of a sequence. A token that needs more
    ends its sequence with an error; the hardest grammars get there in 20 to 30 ms."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=60_000,  # time and memory grow with its square
        max_grammar_size=500_000,
        step_lexer_fuel=200_000,
        step_max_items=25_000,
        max_items_in_row=5_000,  # more than the keys of MAX_SCHEMA_PROPERTIES need
        max_lexer_states=100_000,
        verbose_errors=False,
    )


class Budget:
    """CPU time that is left for the matchers of one call."""

    __slots__ = ("_longest", "seconds")

    def __init__(self) -> None:
        self.seconds = BURST_SECONDS
        self._longest = 0  # tokens of the longest sequence

    def token(self, length: int) -> None:
        """Count a token, which makes its sequence so long."""
        self.seconds += TOKEN_SECONDS
        if length > self._longest:
            self._longest = length
            self.seconds += STEP_SECONDS


class LibraryGrammar:
    """A `CompiledGrammar`: a matcher behind no tokens, which is only copied."""

    def __init__(self, start: llguidance.LLMatcher, end: int, budget: Budget | None = None) -> None:
        """`end`: the token that stands for the end of a text. `budget`: of all matchers; None:
        each has its own."""
        self._start = start
        self._end = end
        self._budget = budget

    def of_call(self) -> LibraryGrammar:
        """Return the grammar for the sequences of one call, which share a budget."""
        return LibraryGrammar(self._start, self._end, Budget())

    def matcher(self) -> LibraryMatcher:
        return LibraryMatcher(self._start.deep_copy(), self._end, self._budget or Budget())

    def ends(self, tokens: list[int]) -> bool:
        """Whether no token may follow `tokens`."""
        matcher = self.matcher()
        for token in tokens:
            matcher.accept(token)
        return matcher.ended


class LibraryMatcher:
    """A `Matcher`, with a budget of CPU time. An ambiguous grammar may need ever more time for a
    token, the longer the text is, and all sequences of an engine wait for each other's masks."""

    __slots__ = ("_budget", "_byte", "_end", "_length", "_matcher")

    def __init__(self, matcher: llguidance.LLMatcher, end: int, budget: Budget) -> None:
        self._matcher = matcher
        self._end = end
        self._byte = end // 8, 1 << end % 8  # where the mask says whether the text may end
        self._budget = budget
        self._length = 0  # tokens so far

    def allowed(self) -> tuple[NDArray[np.uint8], bool]:
        if self._budget.seconds < 0:
            raise GrammarFailed("the answer's grammar takes too long: it is too ambiguous")
        began = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._budget.seconds += began - time.thread_time()
        if self._matcher.is_error():
            raise GrammarFailed(f"the answer's grammar failed: {_first_line(self._error)}")
        at, bit = self._byte
        return bits[: (self._end + 7) // 8].copy(), bool(bits[at] & bit)

    def accept(self, token: int) -> None:
        if self._budget.seconds >= 0:
            began = time.thread_time()
            self._matcher.consume_token(token)
            self._length += 1
            self._budget.token(self._length)
            self._budget.seconds += began - time.thread_time()

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def _error(self) -> str:
        return self._matcher.get_error() or "no token may follow"


def _check_first_token(compiled: LibraryGrammar) -> None:
    try:
        bits, _ = compiled.matcher().allowed()
    except GrammarFailed as error:
        raise RequestError(str(error)) from error
    if not bits.any():
        raise RequestError("no text of this model's tokens obeys it, but perhaps the empty one")


def _lark_of_choice(source: str) -> str:
    texts = msgspec.json.decode(source, type=list[str])
    return f"start: T\nT: {' | '.join(map(json.dumps, texts))}\n"


def _reason(error: str, grammar: Grammar) -> str:
    """Return why the library refuses a grammar, and where."""
    reason = _first_line(error)
    if "regex parse error" in error:
        causes = [line for line in error.splitlines() if line.startswith("error: ")]
        return f"not a regular expression that is supported: {(causes or [reason])[0]}"
    if match := _UNKNOWN_KEYS.search(reason):
        keys: list[str] = json.loads(match[1])
        if grammar.kind not in (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG):
            return f"{', '.join(map(repr, keys))} in its schema is not supported"
        schema = msgspec.json.decode(grammar.source)
        return f"{', '.join(map(repr, keys))} at {place_of(schema, keys)} is not supported"
    return reason


def _first_line(error: str) -> str:
    return error.partition("\n<state>")[0].strip().partition("\n")[0]
