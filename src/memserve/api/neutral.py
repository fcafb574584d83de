"""Fields of requests that change no answer here, and values that change nothing.

Clients send them, so they are accepted: some fields with any value, others with their neutral
values (null, [], {}, the default) alone.
"""

from __future__ import annotations

from typing import Final

import msgspec

from memserve.api.errors import NotUnderstood

# Bytes of the longest neutral value, with white space.
_LONGEST_NEUTRAL = 256

# Fields on which no answer here depends: any value is accepted. They are about what a provider
# keeps and bills, the pace of its answer, its own ids, and media, which are refused themselves.
IGNORED: Final = frozenset(
    {
        "length_penalty",  # of beam search
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
    }
)
# The same, but checked: they are kept for as long as a request lives.
IGNORED_BUT_CHECKED: Final = frozenset({"metadata", "prompt_cache_key", "safety_identifier"})

# Neutral values besides null, [] and {}.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "include_reasoning": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "return_mm_kwargs": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}

# Fields whose empty object asks for something.
_EMPTY_ASKS: Final = frozenset({"web_search_options"})


def unsupported(field: str) -> NotUnderstood:
    return NotUnderstood(f"'{field}' is not supported.", field, "unsupported_parameter")


def is_neutral_json(field: str, json: msgspec.Raw) -> bool:
    """Return `is_neutral` of a value in JSON."""
    if memoryview(json).nbytes > _LONGEST_NEUTRAL:
        return False
    try:
        value = msgspec.json.decode(json)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return is_neutral(field, value)


def is_neutral(field: str, value: object) -> bool:
    """Return whether a field with this value has no effect on the answer."""
    if value in ([], {}):
        return field not in _EMPTY_ASKS
    return value is None or value in _NEUTRAL.get(field, ())
