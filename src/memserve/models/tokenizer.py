"""Tokenizer of a model directory: text to token ids and back, without torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tokenizers
from tokenizers.models import WordLevel, WordPiece

from memserve.errors import ConfigError, ModelError
from memserve.models.chat_template import DEFAULT_CHAT_TEMPLATE, ChatTemplate
from memserve.models.response_template import ResponseTemplate, response_template

_log = logging.getLogger(__name__)

# Transformers' tokenizer classes that prepend <bos> by default, even if tokenizer.json (for
# example one made from a GGUF file) has no post-processor for it.
_BOS_CLASSES = frozenset({"LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer"})


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The fields of tokenizer_config.json in use."""

    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    add_bos_token: bool | None = None
    tokenizer_class: str | None = None
    chat_template: str | list[_NamedTemplate] | None = None
    response_template: Any = None


UNDECODABLE = "\ufffd"  # decoders' replacement for bytes that form no whole character
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    A printable byte's character is itself; the other bytes' characters follow from U+0100 on.
    Source: GPT-2's `bytes_to_unicode`.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printed]
    return {chr(value): value for value in printed} | {
        chr(0x100 + at): value for at, value in enumerate(others)
    }


_BYTE_OF = _byte_characters()


class _ModelFile(msgspec.Struct, frozen=True):
    """The fields of config.json and generation_config.json in use."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    model_type: str | None = None


class _TemplateFile(msgspec.Struct, frozen=True):
    chat_template: str | None = None


_File = TypeVar("_File", bound=msgspec.Struct)


_DECODED_AT_ONCE = 256  # tokens: tens of microseconds


class Tokenizer:
    """A model's vocabulary, its chat template, and the token ids that begin and end a text.

    Immutable after loading; any thread may call any method.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        add_bos_token: bool = False,
        eos_token_ids: Sequence[int] = (),
        chat_template: str = DEFAULT_CHAT_TEMPLATE,
        tools_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        model_type: str | None = None,
        response_template: ResponseTemplate | None = None,
    ) -> None:
        """`backend`: owned by this object from now on; its truncation and padding are turned off.
        `tools_template`: the chat template for conversations with tools, if it is another one.
        `special_tokens`: variables of the chat template (bos_token, eos_token, ...).
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._add_bos_token = add_bos_token
        self._chat_template = ChatTemplate(chat_template, special_tokens or {})
        self.has_chat_template = chat_template != DEFAULT_CHAT_TEMPLATE
        self.tools_template = (
            self._chat_template
            if tools_template is None
            else ChatTemplate(tools_template, special_tokens or {})
        )
        self.model_type = model_type  # in config.json
        self.response_template = response_template  # how it writes answers, if it says so
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.special_ids = frozenset(self.special_tokens.values())
        # Special tokens that the response template is about.
        self.response_ids = frozenset(
            token_id
            for name, token_id in self.special_tokens.items()
            if response_template is not None and name in response_template.source
        )
        # Some decoders drop the leading space of a text; a token behind this one keeps its space.
        self._anchor = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)

    @classmethod
    def load(cls, directory: Path, chat_template: str | None = None) -> Tokenizer:
        """Load a model directory. `chat_template`: path of a Jinja file that replaces the model's.

        Raises ModelError for a directory without a usable tokenizer.json, and for other files
        that are malformed; ConfigError for a template file that cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory} has no tokenizer.json (a 'fast' tokenizer is needed)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise ModelError(f"{path}: {error}") from error
        settings = _read(directory / "tokenizer_config.json", _TokenizerFile)
        model = _read(directory / "config.json", _ModelFile)
        generation = _read(directory / "generation_config.json", _ModelFile)
        special_tokens = _special_tokens(settings)
        bos = special_tokens.get("bos_token")
        bos_token_id = model.bos_token_id if bos is None else backend.token_to_id(bos)
        template, tools_template = _template_sources(directory, settings, chat_template)
        return cls(
            backend,
            bos_token_id=bos_token_id,
            add_bos_token=_adds_bos(settings) and bos_token_id is not None,
            eos_token_ids=_eos_token_ids(
                backend, special_tokens.get("eos_token"), generation, model
            ),
            chat_template=template,
            tools_template=tools_template,
            special_tokens=special_tokens,
            model_type=model.model_type,
            response_template=_response_template(settings, directory),
        )

    def longest_token(self) -> int | None:
        """Return the most characters of text that one token stands for.

        None for word tokenizers, whose unknown token stands for a word of any length. Does not
        count text that a tokenizer drops (repeated spaces) or joins (unknown characters in a
        row). Looks at every token of the vocabulary.
        """
        if isinstance(self._backend.model, WordLevel | WordPiece):
            return None
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with one <bos> in front if the model expects it.

        A text that begins with <bos> already, as a rendered chat template often does, gets no
        second one.
        """
        # Unlike `encode`, the batch call releases the GIL.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        bos = self.bos_token_id
        if bos is None or not add_special_tokens:
            return ids
        if ids[:2] == [bos, bos]:
            return ids[1:]
        if self._add_bos_token and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens around it."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def offsets(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """Return the offset in `text`, in characters, of each of the tokens `ids` that it was
        encoded to; None if it is encoded to others. A token without text, as <bos>, has the offset
        of the token before it."""
        for special in (True, False):
            encoding = self._backend.encode(text, add_special_tokens=special)
            at, lead = 0, len(ids) - len(encoding.ids)
            offsets = []
            # `encode` adds a <bos> in front, or removes one.
            for start, end in [(0, 0)] * lead + encoding.offsets[max(0, -lead) :]:
                at = max(at, start if end > start else 0)
                offsets.append(at)
            if list(ids[max(0, lead) :]) == encoding.ids[max(0, -lead) :] and abs(lead) <= 1:
                return offsets
        return None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that form no whole character become U+FFFD."""
        if len(ids) <= _DECODED_AT_ONCE:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        # Unlike `decode`, the batch call releases the GIL.
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the entries of the vocabulary that token ids stand for."""
        return [self._backend.id_to_token(token_id) or "" for token_id in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return messages (`role`, `content`) as the text that the model continues; see
        `ChatTemplate.render`. Raises RequestError if the template refuses them.
        """
        template = self.tools_template if tools else self._chat_template
        return template.render(messages, add_generation_prompt, tools, variables)

    def special_among(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the ids of those of `texts` that are special tokens."""
        ids = map(self._backend.token_to_id, texts)
        return frozenset(token_id for token_id in ids if token_id in self.special_ids)

    def token_text(self, token_id: int) -> str:
        """Return one token's text within a longer text, including its leading space."""
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def token_bytes(self, token_id: int, text: str) -> bytes:
        """Return the UTF-8 bytes that one token, whose `token_text` is `text`, adds to a longer
        text; a token may add only a part of a character."""
        if UNDECODABLE not in text:
            return text.encode()
        piece = self._backend.id_to_token(token_id) or ""
        if match := _BYTE_TOKEN.fullmatch(piece):  # sentencepiece's byte fallback
            return bytes([int(match[1], 16)])
        values = [_BYTE_OF.get(character) for character in piece]
        if None in values:
            return text.encode()
        return bytes(value for value in values if value is not None)


def _read(path: Path, kind: type[_File]) -> _File:
    """Return the fields of a JSON file that `kind` names; the defaults if the file is missing.
    Raises ModelError for a malformed file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return kind()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: {error}") from error


def _special_tokens(settings: _TokenizerFile) -> dict[str, str]:
    tokens = {
        "bos_token": settings.bos_token,
        "eos_token": settings.eos_token,
        "pad_token": settings.pad_token,
        "unk_token": settings.unk_token,
    }
    return {
        name: token.content if isinstance(token, _AddedToken) else token
        for name, token in tokens.items()
        if token is not None
    }


def _response_template(settings: _TokenizerFile, directory: Path) -> ResponseTemplate | None:
    """Return the model's response template. One that cannot be used is logged: answers can be read
    without it."""
    if settings.response_template is None:
        return None
    try:
        return response_template(settings.response_template)
    except ModelError as error:
        _log.warning("%s is not used: %s", directory / "tokenizer_config.json", error)
        return None


def _adds_bos(settings: _TokenizerFile) -> bool:
    """Return whether to prepend <bos> if tokenizer.json's own post-processor does not."""
    if settings.add_bos_token is not None:
        return settings.add_bos_token
    return (settings.tokenizer_class or "").removesuffix("Fast") in _BOS_CLASSES


def _eos_token_ids(
    backend: tokenizers.Tokenizer, eos_token: str | None, generation: _ModelFile, model: _ModelFile
) -> tuple[int, ...]:
    """Return the tokens that end an answer: generation_config.json's, or else config.json's, and
    the tokenizer's."""
    configured = generation.eos_token_id
    if configured is None:
        configured = model.eos_token_id
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    own = None if eos_token is None else backend.token_to_id(eos_token)
    if own is not None:
        ids.append(own)
    return tuple(dict.fromkeys(ids))


def read_template(path: str) -> str:
    """Return the text of the setting `chat_template`, a file. Raises ConfigError."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        said = error.strerror or str(error)
    except (UnicodeDecodeError, ValueError) as error:  # ValueError: a NUL in its name
        said = f"no text in UTF-8: {error}" if isinstance(error, UnicodeDecodeError) else str(error)
    raise ConfigError(f"gateway.chat_template = {path!r}: {said}; it is the path of a Jinja file")


def _template_sources(
    directory: Path, settings: _TokenizerFile, override: str | None
) -> tuple[str, str | None]:
    """Return the chat template: `override`'s file, chat_template.jinja, chat_template.json,
    tokenizer_config.json, or the default, in this order; and the one for tools, if the model has
    its own."""
    if override is not None:
        return read_template(override), None
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.is_file():
        other = directory / "additional_chat_templates" / "tool_use.jinja"
        for_tools = other.read_text(encoding="utf-8") if other.is_file() else None
        return jinja_file.read_text(encoding="utf-8"), for_tools
    own = (
        _read(directory / "chat_template.json", _TemplateFile).chat_template
        or settings.chat_template
    )
    if isinstance(own, list):
        by_name = {entry.name: entry.template for entry in own}
        return by_name.get("default", DEFAULT_CHAT_TEMPLATE), by_name.get("tool_use")
    return DEFAULT_CHAT_TEMPLATE if own is None else own, None
