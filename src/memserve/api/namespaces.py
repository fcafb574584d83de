"""Namespaces: which prompts may reuse each other's KV.

Clients choose their salts, so salts and the ids of sequences are kept apart by a prefix.
"""

from __future__ import annotations

import hashlib
import re

from memserve.types import SHARED, Namespace

# vLLM (0.32) refuses longer salts, and these characters in them. What looks like something that is
# made here becomes a digest, so that nobody's salt can be taken for another's.
_TAKEN_EVERYWHERE = re.compile(r"(?!sha256:|salt:|sequence:)[^@/\\\0]{1,128}")
_SALT = "salt:"
_PRIVATE = "sequence:"


def salted(cache_salt: str | None) -> Namespace:
    """Of requests with this salt; none: the one that all share."""
    return Namespace(_SALT + cache_salt) if cache_salt else SHARED


def portable(cache_salt: str) -> str:
    """The salt in a form that members of every kind take: itself, or its digest."""
    if not cache_salt or _TAKEN_EVERYWHERE.fullmatch(cache_salt):
        return cache_salt
    return f"sha256:{hashlib.sha256(cache_salt.encode(errors='surrogatepass')).hexdigest()}"


def salt_of(namespace: Namespace) -> str | None:
    """The salt behind a namespace, if there is one."""
    return namespace[len(_SALT) :] if namespace.startswith(_SALT) else None


def private(sequence: str) -> Namespace:
    """Of one sequence alone, dropped when it ends."""
    return Namespace(_PRIVATE + sequence)


def is_private(namespace: str) -> bool:
    """Whether nobody else can ever use what is there."""
    return namespace.startswith(_PRIVATE)


def cache_salt_of(namespace: Namespace) -> str | None:
    """vLLM's `cache_salt` for a namespace: a client's own salt as it is, unless it looks like one
    that we have made."""
    salt = salt_of(namespace)
    if salt is None or salt.startswith((_SALT, _PRIVATE)):
        return namespace or None
    return salt
