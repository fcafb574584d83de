"""Reader of a completion's prompts: texts, or token ids without an object for each."""

from __future__ import annotations

from typing import cast

import msgspec

from memserve.api.errors import ApiError, invalid, not_json
from memserve.api.json_body import decode_json
from memserve.api.limits import COUNTED_BODY_BYTES, MAX_ECHO_CHARACTERS, MAX_SEQUENCES
from memserve.api.openai import Prompts
from memserve.gateway.body_scan import count_elements, plain_token_ids
from memserve.types import TokenArray

Prompt = str | TokenArray

_QUOTE, _OPEN = map(ord, '"[')
_text = msgspec.json.Decoder(str)
_several = msgspec.json.Decoder(tuple[msgspec.Raw, ...])
_any = msgspec.json.Decoder(Prompts)


def read_prompts(json: msgspec.Raw) -> tuple[Prompt, ...]:
    """Return the prompts of a `prompt` field, at least one and none empty. Raises ApiError (400)
    for too many, counted before any is read, and for any other value."""
    ids = plain_token_ids(json)
    if ids is not None:
        return (ids,)
    first = memoryview(json)[0]
    if first == _QUOTE:
        text = _read_text(json)
        if not text:
            raise _empty()
        return (text,)
    if first != _OPEN:
        raise _refusal(json)
    count = count_elements(memoryview(json))
    if count > MAX_SEQUENCES:
        raise invalid(
            f"'prompt' has {count} prompts, and at most {MAX_SEQUENCES} may be.", "prompt"
        )
    prompts = tuple(map(_read_prompt, _several.decode(json)))
    if not prompts or not all(prompt is not None and len(prompt) for prompt in prompts):
        raise _refusal(json)
    return cast(tuple[Prompt, ...], prompts)


def _read_prompt(json: msgspec.Raw) -> Prompt | None:
    """Return one prompt of a list; None if it is not valid."""
    return _read_text(json) if memoryview(json)[0] == _QUOTE else plain_token_ids(json)


def _read_text(json: msgspec.Raw) -> str:
    return decode_json(_text.decode, json, "prompt")


def _refusal(json: msgspec.Raw) -> ApiError:
    """Return the error of a prompt, or of a list of prompts, that is not valid."""
    if memoryview(json).nbytes > COUNTED_BODY_BYTES:
        return _mixed()
    try:
        prompt = _any.decode(json)
    except msgspec.ValidationError as error:
        message = str(error).replace("`$", "`$.prompt")
        where = "" if "`$" in message else " - at `$.prompt`"
        return invalid(message[:MAX_ECHO_CHARACTERS] + where, "prompt")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return not_json(error, "prompt")
    whole = (type(item) is not int and not item for item in prompt)
    return _empty() if not prompt or any(whole) else _mixed()


def _empty() -> ApiError:
    return invalid("'prompt' is empty; at least one token is needed.", "prompt")


def _mixed() -> ApiError:
    return invalid("'prompt' mixes token ids with prompts.", "prompt")
