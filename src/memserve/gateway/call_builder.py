"""Builder of instance calls from clients' requests: checks, chat template, tokenisation."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from memserve.api.errors import context_length_exceeded, invalid, model_not_found
from memserve.api.generate import CallKind, GenerateCall, validate_sampling
from memserve.api.limits import (
    LARGE_BODY_BYTES,
    MAX_ECHO_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_PROMPT_SCORES,
    MAX_SEQUENCES,
    MAX_STREAMED_SCORES,
)
from memserve.api.openai import (
    ChatRequest,
    CompletionRequest,
    NotUnderstood,
    chat_logprobs,
    parse_chat,
    parse_completion,
    sampling_params,
    unconstrained,
)
from memserve.api.status import Limits
from memserve.errors import RequestError
from memserve.gateway.bad_words import bad_word_ids
from memserve.gateway.body_scan import check_body, prepare
from memserve.gateway.body_threads import BodyThreads
from memserve.gateway.chat_plan import ChatPlan, is_extended, is_plain, plan_chat
from memserve.gateway.model_formats import ModelFormats
from memserve.gateway.prompts import Prompt, read_prompts
from memserve.models.chat_template import DEFAULT_CHAT_STOPS, DEFAULT_CHAT_TOKENS
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import TokenArray

# Tokenised on the event loop in about 1 ms; longer texts go to a thread.
INLINE_CHARACTERS = 4096
# A prompt that is only counted may be longer than the context: clients ask by how much it is.
COUNTED_CONTEXTS = 4
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_WORD_CHARACTERS = 16  # a text of its own, however short, takes as long as this many characters


class CallBuilder:
    """Builds calls for one model. A cancelled build is dropped if it still waits for a thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: str,
        threads: int,
        formats: ModelFormats = ModelFormats(),  # noqa: B008 (immutable)
        forwards: Callable[[], bool] = lambda: False,
    ) -> None:
        """`forwards`: whether the cluster has nothing but vLLM servers, which are told of tools by
        the client's own request."""
        prepare()
        self._forwards = forwards
        self._formats = formats
        self.model = model
        self._tokenizer = tokenizer
        self._longest_token = tokenizer.longest_token()
        self._life = os.urandom(10).hex()  # part of every id: no two gateways make the same one
        self._numbers = itertools.count(1)
        self.threads = BodyThreads(threads)

    def close(self) -> None:
        """End the threads."""
        self.threads.close()

    def new_id(self, prefix: str) -> str:
        """Return a unique call id that begins with `prefix`."""
        return f"{prefix}-{self._life}{next(self._numbers):012x}"

    async def chat(self, body: bytes, limits: Limits) -> GenerateCall:
        """Return the call of a chat request (JSON). Raises ApiError that names the fault."""
        if len(body) > LARGE_BODY_BYTES:
            return await self.threads.apart(
                lambda: self._chat(self._parse_chat(body, limits), limits)
            )
        request = self._parse_chat(body, limits)
        characters = sum(len(message.text) for message in request.messages)
        if len(body) > INLINE_CHARACTERS and not (is_plain(request) and unconstrained(request)):
            characters = len(body)  # tools, their calls and grammars are text, too
        characters += _bad_characters(request)
        if characters <= INLINE_CHARACTERS:
            return self._chat(request, limits)
        return await self.threads.off_loop(characters, lambda: self._chat(request, limits))

    async def completion(self, body: bytes, limits: Limits) -> GenerateCall:
        """Return the call of a completion request (JSON). Raises ApiError that names the fault."""
        if len(body) > LARGE_BODY_BYTES:
            return await self.threads.apart(
                lambda: self._completion(*self._parse_completion(body, limits), limits)
            )
        request, given = self._parse_completion(body, limits)
        characters = 0
        for prompt in given:
            if isinstance(prompt, str):
                characters += len(prompt)
        characters += _bad_characters(request)
        if characters <= INLINE_CHARACTERS:
            return self._completion(request, given, limits)
        self.check_lengths(given, limits)
        return await self.threads.off_loop(
            characters, lambda: self._completion(request, given, limits)
        )

    def _parse_chat(self, body: bytes, limits: Limits) -> ChatRequest:
        check_body(body)
        request = parse_chat(body)
        self.check_model(request.model)
        if self._forwards() and is_extended(request):
            raise NotUnderstood("Only the built-in engine takes this request.")
        check_sequences(1, request.samples, limits)
        return request

    def _parse_completion(
        self, body: bytes, limits: Limits
    ) -> tuple[CompletionRequest, tuple[Prompt, ...]]:
        check_body(body)
        request = parse_completion(body)
        self.check_model(request.model)
        prompts = read_prompts(request.prompt)
        check_sequences(len(prompts), request.samples, limits)
        return request, prompts

    def _chat(self, request: ChatRequest, limits: Limits) -> GenerateCall:
        plan = plan_chat(request, self._formats)
        text = self._render(plan, limits)
        prompt = self.token_ids(text, request.add_special_tokens is not False)
        asked = request.max_completion_tokens or request.max_tokens
        prompt = _truncated(prompt, request, limits.max_tokens - (asked or 1))
        room = _room(len(prompt), asked, limits, "messages")
        if not self._tokenizer.has_chat_template and not asked:
            room = min(room, DEFAULT_CHAT_TOKENS)
        call = self._call(
            request,
            limits,
            kind=CallKind.CHAT,
            prompts=(prompt,),
            max_tokens=asked or room,
            logprobs=chat_logprobs(request),
        )
        # A request that ignores the end of an answer asks for a length, as benchmarks do.
        wanted = request.stop is not None or request.ignore_eos
        if not (self._tokenizer.has_chat_template or wanted):
            call = msgspec.structs.replace(call, stop=DEFAULT_CHAT_STOPS)
        if plan.answer is None and not plan.extended:
            return call
        return plan.applied(call, text)

    def _completion(
        self, request: CompletionRequest, given: tuple[Prompt, ...], limits: Limits
    ) -> GenerateCall:
        special = request.add_special_tokens is not False
        self.check_lengths(given, limits)
        whole = [self.token_ids(prompt, special) for prompt in given]
        most = limits.max_tokens - max(1, request.max_tokens or 1)
        prompts = tuple([_truncated(prompt, request, most) for prompt in whole])
        room = limits.max_tokens
        for prompt in prompts:
            _check_prompt(prompt, limits)
            room = min(room, _room(len(prompt), request.max_tokens, limits, "prompt"))
        return self._call(
            request,
            limits,
            kind=CallKind.COMPLETION,
            prompts=prompts,
            max_tokens=(
                min(DEFAULT_COMPLETION_TOKENS, room)
                if request.max_tokens is None
                else request.max_tokens
            ),
            logprobs=request.logprobs,
            echo=_texts(given, whole, prompts) if request.echo else (),
        )

    def _call(
        self,
        request: ChatRequest | CompletionRequest,
        limits: Limits,
        *,
        kind: CallKind,
        prompts: tuple[TokenArray, ...],
        max_tokens: int,
        logprobs: int | None,
        echo: tuple[str | None, ...] = (),
    ) -> GenerateCall:
        prompt_logprobs = request.prompt_logprobs
        if echo and logprobs is not None:
            prompt_logprobs = max(logprobs, prompt_logprobs or 0)
        if prompt_logprobs is not None:
            most = MAX_STREAMED_SCORES if request.stream else MAX_PROMPT_SCORES
            _check_scores(prompts, request.samples, prompt_logprobs, most)
        # The engine generates at least one token, from the logits that end the prefill.
        bad = bad_word_ids(self._tokenizer, request.bad_words) if request.bad_words else ()
        sampling = sampling_params(request, max_tokens or 1, logprobs, prompt_logprobs, bad)
        try:
            validate_sampling(sampling, limits.vocab_size)
        except RequestError as error:
            raise invalid(str(error), error.param) from error
        prefix = "chatcmpl" if kind is CallKind.CHAT else "cmpl"
        return GenerateCall(
            id=self.new_id(prefix),
            kind=kind,
            model=self.model,
            created=int(time.time()),
            prompts=prompts,
            sampling=sampling,
            n=request.samples,
            stop=request.stop_strings,
            include_stop_str_in_output=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            continuous_usage=request.continuous_usage,
            echo=echo,
            prompt_only=not max_tokens,
            prompt_logprobs=request.prompt_logprobs,
            return_token_ids=bool(request.return_token_ids),
            return_tokens_as_token_ids=bool(request.return_tokens_as_token_ids),
            cache_salt=request.cache_salt or "",
            session=request.user or None,
            priority=request.priority or 0,
        )

    def check_model(self, asked: str | None) -> None:
        """Raise ApiError (404) if `asked` names another model."""
        if asked not in (None, self.model):
            raise model_not_found((asked or "")[:MAX_ECHO_CHARACTERS], self.model)

    def check_lengths(self, given: tuple[Prompt, ...], limits: Limits) -> None:
        """Call `check_length` for each prompt that is a text."""
        for prompt in given:
            if isinstance(prompt, str):
                self.check_length(prompt, limits, "prompt")

    def check_length(self, text: str, limits: Limits, param: str) -> None:
        """Raise ApiError (400) if `text` has more characters than `max_tokens` tokens can have.
        Tokenising it to count them would take hundreds of bytes of memory for each token."""
        longest = self._longest_token
        if longest is not None and len(text) > limits.max_tokens * longest:
            raise invalid(
                f"This model's maximum context length is {limits.max_tokens} tokens. Your prompt "
                f"has {len(text)} characters, and a token at most {longest}.",
                param,
                "context_length_exceeded",
            )

    def _render(self, plan: ChatPlan, limits: Limits) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                plan.messages,
                add_generation_prompt=plan.opens_answer,
                tools=plan.tools,
                variables=plan.variables,
            )
        except RequestError as error:
            raise invalid(str(error), error.param) from error
        text = plan.completed(text)
        self.check_length(text, limits, "messages")
        return text

    def token_ids(self, prompt: Prompt, special: bool) -> TokenArray:
        """Return a prompt's token ids, [tokens] int32; `special`: tokenise a text with the
        tokenizer's special tokens."""
        if not isinstance(prompt, str):
            return prompt
        return from_ids(self._tokenizer.encode(prompt, add_special_tokens=special))


def with_session(call: GenerateCall, session: bytes) -> GenerateCall:
    """Return the call with the session of header X-Session-Id. Raises ApiError (400) if that is
    too long."""
    if len(session) > MAX_NAME_CHARACTERS:
        raise invalid(
            f"X-Session-Id has {len(session)} bytes, and at most {MAX_NAME_CHARACTERS} may be.",
            "X-Session-Id",
        )
    return msgspec.structs.replace(call, session=session.decode("latin-1"))


def check_sequences(prompts: int, samples: int, limits: Limits) -> None:
    """Raise ApiError (400) if a request has more sequences than allowed."""
    most = min(limits.max_waiting, MAX_SEQUENCES)
    if prompts * samples > most:
        raise invalid(
            f"{prompts} prompts with {samples} samples each are more than the {most} sequences "
            "that one request may have.",
            "prompt" if prompts > most else "n",
        )


def _check_prompt(prompt: TokenArray, limits: Limits) -> None:
    if not len(prompt):
        raise invalid("'prompt' has no tokens; at least one is needed.", "prompt")
    if (highest := int(prompt.max())) >= limits.vocab_size:
        raise invalid(
            f"Token id {highest} is outside the vocabulary of {limits.vocab_size}.", "prompt"
        )


def _check_scores(
    prompts: Sequence[TokenArray], samples: int, alternatives: int, most: int
) -> None:
    """Raise ApiError (400) for more scores of prompts than one answer may have."""
    count = samples * sum(map(len, prompts)) * (1 + alternatives)
    if count > most:
        raise invalid(
            f"The prompts have {count} log-probabilities, and at most {most} may be in such an "
            "answer: send fewer prompts, ask for fewer alternatives, or for no stream.",
            "logprobs",
        )


def _room(prompt_tokens: int, asked: int | None, limits: Limits, param: str) -> int:
    """Return the tokens that are left for the answer, at least `asked` or 1. Raises ApiError if
    there are fewer."""
    room = limits.max_tokens - prompt_tokens
    if room < (asked or 1):
        raise context_length_exceeded(limits.max_tokens, prompt_tokens, asked, param)
    return room


def _truncated(
    prompt: TokenArray, request: ChatRequest | CompletionRequest, most: int
) -> TokenArray:
    """Return what `truncate_prompt_tokens` leaves of a prompt; `most`: for -1."""
    count = request.truncate_prompt_tokens
    if count is None:
        return prompt
    count = max(1, most) if count < 0 else count
    return prompt[:count] if request.truncation_side == "right" else prompt[-count:]


def _bad_characters(request: ChatRequest | CompletionRequest) -> int:
    """Return how many characters of a text take as long as the request's `bad_words`."""
    words = request.bad_words or ()
    return _WORD_CHARACTERS * len(words) + sum(map(len, words))


def _texts(
    given: tuple[Prompt, ...], whole: Sequence[TokenArray], kept: Sequence[TokenArray]
) -> tuple[str | None, ...]:
    """Return the prompts that were sent as text; None for token ids, and for a text that was
    truncated."""
    return tuple(
        [
            prompt if isinstance(prompt, str) and len(all_of_it) == len(rest) else None
            for prompt, all_of_it, rest in zip(given, whole, kept, strict=True)
        ]
    )
