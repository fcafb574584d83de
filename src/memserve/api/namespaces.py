"""Namespaces: only prompts of one namespace may reuse each other's KV.

Clients choose their salts, so a prefix keeps salts and the ids of sequences apart.
"""

from __future__ import annotations

import hashlib
import re

from memserve.types import SHARED, Namespace

# vLLM (0.32) refuses longer salts, and these characters in them. A salt that begins like one of
# this module's prefixes becomes a digest, so that no salt can be mistaken for another.
_TAKEN_EVERYWHERE = re.compile(r"(?!sha256:|salt:|sequence:)[^@/\\\0]{1,128}")
_SALT = "salt:"
_PRIVATE = "sequence:"


def salted(cache_salt: str | None) -> Namespace:
    """Return the namespace of a salt; without a salt, the shared one."""
    return Namespace(_SALT + cache_salt) if cache_salt else SHARED


def portable(cache_salt: str) -> str:
    """Return the salt in a form that members of every kind accept: itself, or its digest."""
    if not cache_salt or _TAKEN_EVERYWHERE.fullmatch(cache_salt):
        return cache_salt
    return f"sha256:{hashlib.sha256(cache_salt.encode(errors='surrogatepass')).hexdigest()}"


def salt_of(namespace: Namespace) -> str | None:
    """Return the salt of a namespace; None if it has none."""
    return namespace[len(_SALT) :] if namespace.startswith(_SALT) else None


def private(sequence: str) -> Namespace:
    """Return the namespace of one sequence alone, which is dropped when the sequence ends."""
    return Namespace(_PRIVATE + sequence)


def is_private(namespace: str) -> bool:
    """Return whether a namespace belongs to one sequence alone."""
    return namespace.startswith(_PRIVATE)


def cache_salt_of(namespace: Namespace) -> str | None:
    """Return vLLM's `cache_salt` for a namespace: the client's salt, or, if that begins with a
    prefix of this module or there is none, the namespace; None for the shared one."""
    salt = salt_of(namespace)
    if salt is None or salt.startswith((_SALT, _PRIVATE)):
        return namespace or None
    return salt
