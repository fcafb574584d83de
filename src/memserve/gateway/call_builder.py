"""From a client's request to the call that an instance gets: checked, templated, tokenised."""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from memserve.api.errors import ApiError, context_length_exceeded, invalid, model_not_found
from memserve.api.generate import CallKind, GenerateCall, validate_sampling
from memserve.api.openai import (
    ChatRequest,
    CompletionFields,
    CompletionRequest,
    Message,
    chat_logprobs,
    parse_chat,
    parse_completion,
    parse_token_completion,
    sampling_params,
)
from memserve.api.status import Limits
from memserve.api.token_ids import TokenIds
from memserve.errors import RequestError
from memserve.gateway.token_parser import plain_token_ids
from memserve.models.tokenizer import Tokenizer

# About a millisecond of tokenising; longer texts go to a thread and leave the loop to others.
INLINE_CHARACTERS = 4096
MAX_SEQUENCES = 1024  # of one request: prompts times samples
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

T = TypeVar("T")


class CallBuilder:
    """Builds calls for one model."""

    def __init__(self, tokenizer: Tokenizer, model: str, threads: int) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._life = os.urandom(10).hex()  # in every id, so that gateways' differ
        self._numbers = itertools.count(1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    async def chat(self, body: bytes, limits: Limits) -> GenerateCall:
        """Raises ApiError that says what is wrong with the request."""
        request = parse_chat(body)
        self._check_model(request)
        prompt = await self._off_loop(
            sum(len(message.text) for message in request.messages),
            lambda: self._render(request),
        )
        asked = request.max_completion_tokens or request.max_tokens
        room = _room(len(prompt), asked, limits, "messages")
        return self._call(
            request,
            limits,
            kind=CallKind.CHAT,
            prompts=(prompt,),
            max_tokens=asked or room,
            logprobs=chat_logprobs(request),
        )

    async def completion(self, body: bytes, limits: Limits) -> GenerateCall:
        """Raises ApiError that says what is wrong with the request."""
        request: CompletionFields
        if (found := parse_token_completion(body, plain_token_ids)) is not None:
            request, ids = found
            self._check_model(request)
            prompts: tuple[TokenIds, ...] = (ids,)
        else:
            request = parse_completion(body)
            self._check_model(request)
            given = _prompts(request)
            special = request.add_special_tokens is not False
            prompts = await self._off_loop(
                sum(len(prompt) for prompt in given if isinstance(prompt, str)),
                lambda: tuple(self._token_ids(prompt, special) for prompt in given),
            )
        room = limits.max_tokens
        for prompt in prompts:
            _check_prompt(prompt, limits)
            room = min(room, _room(len(prompt), request.max_tokens, limits, "prompt"))
        return self._call(
            request,
            limits,
            kind=CallKind.COMPLETION,
            prompts=prompts,
            max_tokens=request.max_tokens or min(DEFAULT_COMPLETION_TOKENS, room),
            logprobs=request.logprobs,
            echo=bool(request.echo),
        )

    def _call(
        self,
        request: ChatRequest | CompletionFields,
        limits: Limits,
        *,
        kind: CallKind,
        prompts: tuple[TokenIds, ...],
        max_tokens: int,
        logprobs: int | None,
        echo: bool = False,
    ) -> GenerateCall:
        if len(prompts) * request.samples > MAX_SEQUENCES:
            raise invalid(
                f"{len(prompts)} prompts with {request.samples} samples each are more than the "
                f"{MAX_SEQUENCES} sequences that one request may have.",
                "n",
            )
        sampling = sampling_params(request, max_tokens, logprobs)
        try:
            validate_sampling(sampling, limits.vocab_size)
        except RequestError as error:
            raise invalid(str(error), error.param) from error
        prefix = "chatcmpl" if kind is CallKind.CHAT else "cmpl"
        number = next(self._numbers)
        return GenerateCall(
            id=f"{prefix}-{self._life}{number:012x}",
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
            echo=echo,
            return_token_ids=bool(request.return_token_ids),
            cache_salt=request.cache_salt or "",
            session=request.user or None,
            priority=request.priority or 0,
        )

    def _check_model(self, request: ChatRequest | CompletionFields) -> None:
        if request.model not in (None, self.model):
            raise model_not_found(request.model, self.model)

    def _render(self, request: ChatRequest) -> TokenIds:
        try:
            text = self._tokenizer.apply_chat_template(
                [_template_message(message) for message in request.messages],
                add_generation_prompt=request.add_generation_prompt is not False,
            )
        except RequestError as error:
            raise invalid(str(error), error.param) from error
        return self._token_ids(text, request.add_special_tokens is not False)

    def _token_ids(self, prompt: str | tuple[int, ...], special: bool) -> TokenIds:
        if isinstance(prompt, str):
            return TokenIds.of(self._tokenizer.encode(prompt, add_special_tokens=special))
        try:
            return TokenIds.of(prompt)
        except struct.error as error:
            raise _mixed() from error

    async def _off_loop(self, characters: int, work: Callable[[], T]) -> T:
        if characters <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _template_message(message: Message) -> dict[str, str]:
    # "developer" is what OpenAI now calls the system's role; templates know the old name.
    role = "system" if message.role == "developer" else message.role
    rendered = {"role": role, "content": message.text}
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _prompts(request: CompletionRequest) -> Sequence[str | tuple[int, ...]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        prompt = (prompt,)
    if prompt and type(prompt[0]) is int:
        return (cast(tuple[int, ...], prompt),)  # `TokenIds` looks at all of it
    if int in set(map(type, prompt)):
        raise _mixed()
    if not prompt or not all(prompt):
        raise invalid("'prompt' is empty; at least one token is needed.", "prompt")
    return cast(tuple[str | tuple[int, ...], ...], prompt)


def _check_prompt(prompt: TokenIds, limits: Limits) -> None:
    if not prompt:
        raise invalid("'prompt' has no tokens; at least one is needed.", "prompt")
    if prompt.highest >= limits.vocab_size:
        raise invalid(
            f"Token id {prompt.highest} is outside the vocabulary of {limits.vocab_size}.", "prompt"
        )


def _mixed() -> ApiError:
    return invalid("'prompt' mixes token ids with prompts.", "prompt")


def _room(prompt_tokens: int, asked: int | None, limits: Limits, param: str) -> int:
    """Tokens that are left for the answer, at least 1 and at least what was asked for."""
    room = limits.max_tokens - prompt_tokens
    if room < (asked or 1):
        raise context_length_exceeded(limits.max_tokens, prompt_tokens, asked, param)
    return room
