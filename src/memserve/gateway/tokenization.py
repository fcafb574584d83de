"""The endpoints `/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from memserve.api.errors import invalid
from memserve.api.json_body import decode_json
from memserve.api.limits import LARGE_BODY_BYTES, MAX_NAME_CHARACTERS
from memserve.api.neutral import unsupported
from memserve.api.status import Limits
from memserve.gateway.body_scan import check_body, plain_token_ids
from memserve.gateway.call_builder import COUNTED_CONTEXTS, INLINE_CHARACTERS, CallBuilder
from memserve.gateway.prompts import read_prompts
from memserve.models.tokenizer import Tokenizer
from memserve.types import TokenArray

# Bytes of a text for each token of these contexts. A byte may become a token of its own.
_TEXT_BYTES: Final = 4
_Name = Annotated[str, Meta(max_length=MAX_NAME_CHARACTERS)]
_Json = msgspec.Raw | UnsetType

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
# Fields of a chat that its tokens depend on.
_CHAT_FIELDS: Final = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "media_io_kwargs",
        "messages",
        "mm_processor_kwargs",
        "model",
        "tools",
    }
)


class TokenizeRequest(msgspec.Struct, frozen=True):
    """`POST /tokenize`; of a chat, the other fields are read as those of a chat."""

    prompt: _Json = UNSET
    messages: _Json = UNSET
    model: _Name | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /detokenize`. `tokens`: ids."""

    tokens: msgspec.Raw
    model: _Name | None = None


class Tokens(msgspec.Struct, frozen=True):
    """The body that answers `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct, frozen=True):
    """The body that answers `POST /detokenize`."""

    prompt: str


_asked = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)


class Tokenization:
    """Answers for one model, on the threads of its `CallBuilder`: long texts wait for their turn
    there, as prompts do."""

    def __init__(self, calls: CallBuilder, tokenizer: Tokenizer) -> None:
        self._calls = calls
        self._tokenizer = tokenizer

    async def tokenize(self, body: bytes, limits: Limits) -> bytes:
        """Return the tokens of a prompt or a chat, as JSON. Raises ApiError."""
        asked, members = await self._read(body, _read_tokenize)
        self._calls.check_model(asked.model)
        room = msgspec.structs.replace(limits, max_tokens=limits.max_tokens * COUNTED_CONTEXTS)
        if asked.messages is not UNSET:
            chat = {name: members[name] for name in members if name in _CHAT_FIELDS}
            rest = members.keys() - _CHAT_FIELDS - {"return_token_strs", "prompt"}
            if asked.prompt is not UNSET or rest:
                raise unsupported(min(rest, default="prompt")[:64])
            call = await self._calls.chat(_encode(chat), room)
            return await self._off_loop(
                len(call.prompts[0]), lambda: self._told(call.prompts[0], asked, limits)
            )
        rest = members.keys() - set(TokenizeRequest.__struct_fields__)
        if rest:
            raise unsupported(min(rest)[:64])
        if asked.prompt is UNSET:
            raise invalid("'prompt' or 'messages' is needed.", "prompt")
        return await self._off_loop(len(body), lambda: self._prompt(asked, limits, room))

    async def detokenize(self, body: bytes, limits: Limits) -> bytes:
        """Return the text of token ids, as JSON. Raises ApiError."""
        asked = await self._read(body, _detokenize.decode)
        self._calls.check_model(asked.model)
        return await self._off_loop(len(body), lambda: self._text(asked, limits))

    async def _read(self, body: bytes, decode: Callable[[bytes], T]) -> T:
        if len(body) > LARGE_BODY_BYTES:
            return await self._calls.threads.apart(lambda: _decoded(decode, body))
        return _decoded(decode, body)

    async def _off_loop(self, size: int, work: Callable[[], bytes]) -> bytes:
        if size > LARGE_BODY_BYTES:
            return await self._calls.threads.apart(work)
        if size > INLINE_CHARACTERS:
            return await self._calls.threads.off_loop(size, work)
        return work()

    def _prompt(self, asked: TokenizeRequest, limits: Limits, room: Limits) -> bytes:
        assert asked.prompt is not UNSET
        prompts = read_prompts(asked.prompt)
        if len(prompts) != 1 or not isinstance(prompts[0], str):
            raise invalid("'prompt' is a text.", "prompt")
        self._calls.check_lengths(prompts, room)
        most = _TEXT_BYTES * room.max_tokens
        if (size := len(prompts[0].encode(errors="surrogatepass"))) > most:
            raise invalid(f"'prompt' has {size} bytes, and at most {most} may be.", "prompt")
        special = asked.add_special_tokens is not False
        return self._told(self._calls.token_ids(prompts[0], special), asked, limits)

    def _told(self, ids: TokenArray, asked: TokenizeRequest, limits: Limits) -> bytes:
        tokens: list[int] = ids.tolist()
        strings = self._tokenizer.tokens(tokens) if asked.return_token_strs else None
        return _encode(Tokens(len(tokens), limits.max_tokens, tokens, strings))

    def _text(self, asked: DetokenizeRequest, limits: Limits) -> bytes:
        ids = plain_token_ids(asked.tokens)
        if ids is None and bytes(asked.tokens).strip() != b"[]":
            raise invalid("'tokens' is a list of token ids.", "tokens")
        count = 0 if ids is None else len(ids)
        if count > (most := limits.max_tokens * COUNTED_CONTEXTS):
            raise invalid(f"'tokens' has {count} ids, and at most {most} may be.", "tokens")
        if ids is not None and (highest := int(ids.max())) >= limits.vocab_size:
            raise invalid(
                f"Token id {highest} is outside the vocabulary of {limits.vocab_size}.", "tokens"
            )
        tokens: Sequence[int] = () if ids is None else ids.tolist()
        return _encode(Text(self._tokenizer.decode(tokens, skip_special_tokens=False)))


def _read_tokenize(body: bytes) -> tuple[TokenizeRequest, dict[str, msgspec.Raw]]:
    """Return a request, and all of its fields as JSON."""
    return _asked.decode(body), _members.decode(body)


def _decoded(decode: Callable[[bytes], T], body: bytes) -> T:
    check_body(body)
    return decode_json(decode, body)
