"""Store of Responses that clients may ask for again, in bounded memory."""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from typing import NewType

import msgspec

# Responses that are kept, whatever their size.
MAX_STORED_RESPONSES = 10_000
# Memory of one besides its text: keys, objects, a list entry for each item.
_RESPONSE_BYTES = 1024
_ITEM_BYTES = 128

Owner = NewType("Owner", str)  # hexadecimal digest of what tells clients apart

_OWNER_BYTES = 16


def owner_of(name: bytes) -> Owner:
    """Return an owner's digest. The same in each worker of a gateway."""
    return Owner(hashlib.blake2b(name, digest_size=_OWNER_BYTES).hexdigest())


class StoredResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Response, and the conversation before it, as JSON."""

    body: bytes
    input: tuple[bytes, ...]  # items, with those of the responses before
    output: tuple[bytes, ...]  # items

    @property
    def size(self) -> int:
        """Bytes of memory."""
        items = self.input + self.output
        return _RESPONSE_BYTES + len(self.body) + sum(map(len, items)) + _ITEM_BYTES * len(items)


class ResponseStore:
    """Responses by owner and id; nobody finds another owner's. When it is full, the owner with the
    most bytes loses the response that it has not used for longest. Belongs to the event loop."""

    def __init__(self, max_bytes: int, max_count: int = MAX_STORED_RESPONSES) -> None:
        """`max_bytes`: of all responses; 0: nothing is stored."""
        self.max_bytes = max_bytes
        self._max_count = max_count
        self._of: dict[Owner, OrderedDict[str, StoredResponse]] = {}
        self._bytes_of: dict[Owner, int] = {}
        self.bytes = 0
        self.count = 0

    def put(self, owner: Owner, response_id: str, response: StoredResponse) -> bool:
        """Store a response; return whether there is room for one of its size."""
        size = response.size
        if size > self.max_bytes or self._max_count < 1:
            return False
        self.delete(owner, response_id)
        self._of.setdefault(owner, OrderedDict())[response_id] = response
        self._count(owner, size, 1)
        if self.bytes > self.max_bytes or self.count > self._max_count:
            self._make_room(keep=(owner, response_id))
        return True

    def get(self, owner: Owner, response_id: str) -> StoredResponse | None:
        """Return a response, which counts as used now."""
        own = self._of.get(owner)
        if own is None or response_id not in own:
            return None
        own.move_to_end(response_id)
        return own[response_id]

    def delete(self, owner: Owner, response_id: str) -> bool:
        """Forget a response; return whether it was there."""
        own = self._of.get(owner)
        response = None if own is None else own.pop(response_id, None)
        if own is None or response is None:
            return False
        self._count(owner, -response.size, -1)
        if not own:
            del self._of[owner], self._bytes_of[owner]
        return True

    def _count(self, owner: Owner, size: int, number: int) -> None:
        self.bytes += size
        self.count += number
        self._bytes_of[owner] = self._bytes_of.get(owner, 0) + size

    def _make_room(self, keep: tuple[Owner, str]) -> None:
        """Forget responses until the others have room, but not `keep`."""
        owners = [(-size, owner) for owner, size in self._bytes_of.items()]
        heapq.heapify(owners)  # the largest first
        while self.bytes > self.max_bytes or self.count > self._max_count:
            _, owner = heapq.heappop(owners)
            ids = iter(self._of[owner])
            oldest = next(ids)
            if (owner, oldest) == keep and (oldest := next(ids, "")) == "":  # its only one
                continue
            self.delete(owner, oldest)
            if owner in self._bytes_of:
                heapq.heappush(owners, (-self._bytes_of[owner], owner))
