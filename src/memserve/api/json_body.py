"""Decoder of clients' JSON, with errors that name the field at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from memserve.api.errors import NotUnderstood, not_json
from memserve.api.limits import MAX_ECHO_CHARACTERS

T = TypeVar("T")

_FIELD_OF_PATH: Final = re.compile(r"`\$\.(\w{1,64})")
_FIELD_OF_MESSAGE: Final = re.compile(r"field `([^`]{0,64})")


def decode_json(
    decode: Callable[[bytes | msgspec.Raw], T], json: bytes | msgspec.Raw, param: str | None = None
) -> T:
    """Return what `decode`, a msgspec decoder's, makes of a body, or of the part of it at `param`.

    The body's depth was checked before (`gateway/body_scan.py`): a decoder follows it by recursion.
    Raises ApiError (400).
    """
    try:
        return decode(json)
    except msgspec.ValidationError as error:
        raise not_understood(error, param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise not_json(error, param) from error


def not_understood(error: msgspec.ValidationError, param: str | None = None) -> NotUnderstood:
    """Return the error of a decoder, with the field's name. `param`: where the value stood."""
    message = str(error)
    field = _FIELD_OF_PATH.search(message) or _FIELD_OF_MESSAGE.search(message)
    if message.startswith("Invalid value") and "].content[" in message:
        message += "; only text content is supported"
    if param is not None:
        message = message.replace("`$", f"`$.{param}")
    found = field.group(1) if field else None
    return NotUnderstood(message[:MAX_ECHO_CHARACTERS], found if param is None else param)
