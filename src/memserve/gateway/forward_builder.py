"""Builder of calls that forward a client's request to a vLLM server."""

from __future__ import annotations

import time

from memserve.api.forward import GENERATING_PATHS, ForwardPath
from memserve.api.generate import CallKind, GenerateCall, SamplingParams
from memserve.api.limits import LARGE_BODY_BYTES
from memserve.api.status import Limits
from memserve.errors import RequestError
from memserve.gateway.call_builder import (
    DEFAULT_COMPLETION_TOKENS,
    INLINE_CHARACTERS,
    CallBuilder,
    check_sequences,
)
from memserve.gateway.conversation import Conversation, conversation_of, has_media
from memserve.gateway.forward_request import ForwardRequest, read_request
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from memserve.types import TokenArray

_NO_PROMPT = from_ids((0,))
_PREFIXES = {ForwardPath.CHAT: "chatcmpl", ForwardPath.COMPLETIONS: "cmpl"}


class ForwardBuilder:
    """Builds calls for one model, on the threads of its `CallBuilder`.

    A call's prompt only serves the choice of an instance. It equals the server's if the gateway's
    template renders as the server's does; with images, only the first part is equal.
    """

    def __init__(self, calls: CallBuilder, tokenizer: Tokenizer) -> None:
        self._calls = calls
        self._tokenizer = tokenizer

    async def build(self, path: ForwardPath, body: bytes, limits: Limits) -> GenerateCall:
        """Return the call of a request (JSON). Raises ApiError for faults that are known here;
        the server checks the rest."""
        if len(body) > LARGE_BODY_BYTES:
            return await self._calls.threads.apart(lambda: self._build(path, body, limits))
        if len(body) > INLINE_CHARACTERS:
            work = lambda: self._build(path, body, limits)  # noqa: E731
            return await self._calls.threads.off_loop(len(body), work)
        return self._build(path, body, limits)

    def _build(self, path: ForwardPath, body: bytes, limits: Limits) -> GenerateCall:
        request = read_request(path, body)
        asked = request.asked
        self._calls.check_model(asked.model)
        check_sequences(max(1, len(request.prompts)), asked.samples, limits)
        prompt, renders = self._prompt(request, limits)
        return GenerateCall(
            id=self._calls.new_id(_PREFIXES.get(path, "fwd")),
            kind=CallKind.CHAT if path is ForwardPath.CHAT else CallKind.COMPLETION,
            model=self._calls.model,
            created=int(time.time()),
            prompts=(prompt,),
            sampling=SamplingParams(max_tokens=_output_tokens(request, len(prompt), limits)),
            n=asked.samples,
            stream=bool(asked.stream),
            cache_salt=asked.cache_salt or "",
            session=asked.user or None,
            priority=asked.priority or 0,
            forward=request.forward(renders and path in GENERATING_PATHS),
        )

    def _prompt(self, request: ForwardRequest, limits: Limits) -> tuple[TokenArray, bool]:
        """Return the prompt, [tokens] int32, and whether it should equal the server's."""
        special = request.asked.add_special_tokens
        if request.path is ForwardPath.COMPLETIONS and request.prompts:
            self._calls.check_lengths(request.prompts, limits)
            ids = self._calls.token_ids(request.prompts[0], special is not False)
            return ids if len(ids) else _NO_PROMPT, len(request.prompts) == 1
        conversation = conversation_of(request.path, request.fields)
        if conversation is None:
            return _NO_PROMPT, False
        text, renders = self._render(conversation)
        self._calls.check_length(text, limits, "messages")
        ids = self._calls.token_ids(text, bool(special))
        return ids if len(ids) else _NO_PROMPT, renders and not has_media(request.fields)

    def _render(self, conversation: Conversation) -> tuple[str, bool]:
        try:
            text = self._tokenizer.apply_chat_template(
                conversation.messages,
                conversation.add_generation_prompt,
                conversation.tools,
                conversation.variables,
            )
        except RequestError:  # the server's own template may know better
            return conversation.text(), False
        return text, True


def _output_tokens(request: ForwardRequest, prompt_tokens: int, limits: Limits) -> int:
    """Return the most output tokens to expect: for the choice of an instance, not as a limit."""
    if request.path not in GENERATING_PATHS:
        return 1
    if (asked := request.asked.output_tokens) is not None:
        return asked
    if request.path is ForwardPath.COMPLETIONS:
        return DEFAULT_COMPLETION_TOKENS
    return max(1, limits.max_tokens - prompt_tokens)
