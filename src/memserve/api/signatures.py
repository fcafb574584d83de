"""Proof that an HTTP request comes from the cluster, and that its answer does.

    Authorization: MemServe HOST:PORT LIFE.SENDER.NUMBER.TIME.MAC
    MemServe-Proof: MAC
    MemServe-Content: MAC

The MAC is HMAC-SHA256, with a key that is derived from the cluster's secret, over method, target,
the body's digest, and the fields before it. They keep a request from being used twice, or by
another server than the one that it is meant for:

- HOST:PORT is the address that is asked. A server takes requests for its own addresses alone
  (`api/audience.py`): who listens at a dead member's address cannot have another one answer.
- LIFE names the running server that it is for. A server tells its own in the challenge of a 401
  (`WWW-Authenticate: MemServe life=..., time=...`), so the first request to a server, or to one
  that was started again, is made twice. What was recorded is worth nothing elsewhere or later.
  A challenge proves itself, as every answer does: nobody else can set a client's clock.
- SENDER and NUMBER name the request. A server accepts each number of a sender once, in whatever
  order they come; so it keeps a few words for each process that has the secret, and nothing for
  strangers.
- TIME, in milliseconds, by the server's clock as the challenge told it, bounds for how long it
  must remember a sender that has gone.

The proof in the answer is over the request's MAC and the status, and the other one over the body,
too, if that is whole when the answer begins. Whoever listens at a member's address without the
secret can give none, and is not believed. What is said is not hidden: that is TLS's part, and so
is a stream's body on a network that others can write to. Within a machine a connection is proven
once (`local_connection`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Container
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from memserve.api.errors import ApiError
from memserve.secrets import Secret

SCHEME = b"MemServe "
_NO_LIFE = b"0" * 16  # of a server that has told none yet
PROOF_HEADER = b"memserve-proof"
CONTENT_HEADER = b"memserve-content"

# How far apart a request's time and the server's may be: longer than a request waits anywhere
# before it is read. Clocks that differ by more are put right first.
WINDOW_SECONDS = 120.0
# Numbers below a sender's highest one that are still accepted: more requests than a process has
# on their way to one server at a time.
REORDERED = 1 << 13
# Senders that are remembered; each has the secret, and is forgotten when nothing of it can be
# used any more.
MAX_SENDERS = 4096
MAX_CHALLENGES = 4096  # servers that a client remembers
INLINE_BYTES = 256 * 1024  # digested on the spot: a quarter of a millisecond

_FIELDS = re.compile(
    rb"MemServe ([A-Za-z0-9._:%\[\]-]{1,262}) "
    rb"([0-9a-f]{16})\.([0-9a-f]{16})\.(\d{1,15})\.(\d{1,15})\.([0-9a-f]{64})"
)
_CHALLENGE = re.compile(r"MemServe life=([0-9a-f]{16}), time=(\d{1,15})")


class Mac:
    """HMAC-SHA256 (RFC 2104) with one key. Its two inner states are made once, which is most of
    what `hmac.digest` does for a short message."""

    __slots__ = ("_inner", "_outer")
    _BLOCK = 64

    def __init__(self, key: bytes) -> None:
        """`key`: of at most 64 bytes."""
        padded = key.ljust(self._BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def hex(self, message: bytes) -> bytes:
        """64 hexadecimal digits."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.hexdigest().encode()


class _Challenge(NamedTuple):
    """What a server said of itself."""

    life: bytes
    ahead: int  # of our clock, milliseconds
    begin: bytes  # of the fields of each request that is signed for it


class Signed(msgspec.Struct, frozen=True):
    """A request's header value, its MAC, and the challenge that it answers."""

    authorization: bytes
    mac: bytes
    challenge: _Challenge


class Signer:
    """Signs requests, and checks the answers' proofs. One for a process."""

    def __init__(self, secret: Secret, wall_clock: Callable[[], float] = time.time) -> None:
        self._request_key, self._answer_key = _keys(secret.masters[0])
        self._wall_clock = wall_clock
        self._sender = os.urandom(8).hex().encode()
        self._number = 0
        self._challenges: OrderedDict[str, _Challenge] = OrderedDict()

    def sign(self, origin: str, method: bytes, target: bytes, digest: bytes) -> Signed:
        """For a server whose scheme, host and port are `origin`; `target` as it is sent, and the
        `body_digest`."""
        challenge = self._challenges.get(origin) or self._challenge(origin, _NO_LIFE, 0)
        self._number += 1
        now = int(self._wall_clock() * 1000) + challenge.ahead
        fields = b"%b%d.%d" % (challenge.begin, self._number, now)
        mac = _request_mac(self._request_key, method, target, digest, fields)
        return Signed(b"%b%b.%b" % (SCHEME, fields, mac), mac, challenge)

    def learn(self, origin: str, challenge: str, proof: bytes | None, signed: Signed) -> bool:
        """Take in the challenge with which a request was refused, if it proves itself. Whether it
        asks for another answer than this request had, so that another try may succeed."""
        match = _CHALLENGE.fullmatch(challenge)
        if match is None or proof is None:
            return False
        if not hmac.compare_digest(proof, _challenge_mac(self._answer_key, signed.mac, challenge)):
            return False
        life, ahead = match[1].encode(), int(match[2]) - int(self._wall_clock() * 1000)
        self._challenges.pop(origin, None)
        self._challenges[origin] = self._challenge(origin, life, ahead)
        if len(self._challenges) > MAX_CHALLENGES:
            self._challenges.popitem(last=False)
        late = abs(signed.challenge.ahead - ahead) > 1000 * WINDOW_SECONDS / 2
        return signed.challenge.life != life or late

    def clock_ahead(self, origin: str) -> float | None:
        """Seconds that a server's clock is ahead of ours, less the time that its challenge took to
        come here; None where it has told none."""
        known = self._challenges.get(origin)
        return None if known is None else known.ahead / 1000

    def _challenge(self, origin: str, life: bytes, ahead: int) -> _Challenge:
        audience = origin.rpartition("//")[2].encode()
        return _Challenge(life, ahead, b"%b %b.%b." % (audience, life, self._sender))

    def connection_token(self, signed: Signed) -> bytes:
        """What stands for a signature on a local connection on which this request was accepted."""
        return _connection_token(self._answer_key, signed.mac)

    def proves(self, signed: Signed, status: int, proof: bytes | None) -> bool:
        """Whether an answer comes from somebody who has the secret."""
        return proof is not None and hmac.compare_digest(
            proof, _answer_mac(self._answer_key, signed.mac, status)
        )

    def proves_content(
        self, signed: Signed, status: int, body: bytes, content: bytes | None
    ) -> bool:
        """Whether this is what was answered, to the last byte."""
        return content is not None and hmac.compare_digest(
            content, _content_mac(self._answer_key, signed.mac, status, body)
        )


class Unauthenticated(ApiError):
    """A 401 with a challenge, which proves itself to who has the secret."""

    def __init__(self, message: str, code: str, challenge: str, proof: bytes | None) -> None:
        super().__init__(
            HTTPStatus.UNAUTHORIZED,
            message,
            type="authentication_error",
            code=code,
            authenticate=challenge,
        )
        self.proof = proof

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that go with it."""
        proof = [] if self.proof is None else [(PROOF_HEADER, self.proof)]
        return [*super().headers(), *proof]


class _Numbers:
    """Which numbers of a sender were used: the highest, and a bit for each below it."""

    __slots__ = ("_highest", "_used", "until")

    def __init__(self) -> None:
        self._highest = 0
        self._used = 0
        self.until = 0.0  # when nothing of it can be used any more

    def take(self, number: int) -> bool:
        """Use a number. False: it was used, or is so old that it may have been."""
        ahead = number - self._highest
        if ahead > 0:
            self._used = (self._used << min(ahead, REORDERED) | 1) & ((1 << REORDERED) - 1)
            self._highest = number
            return True
        if -ahead >= REORDERED or self._used >> -ahead & 1:
            return False
        self._used |= 1 << -ahead
        return True


class Verifier:
    """Checks requests to one server, and proves its answers. Belongs to one event loop."""

    def __init__(
        self,
        secret: Secret,
        audience: Container[str],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`audience`: addresses, as host:port, that the server answers at."""
        self._keys = [_keys(master) for master in secret.masters]
        self._audience = audience
        self._wall_clock = wall_clock
        self._life = os.urandom(8).hex().encode()
        self._senders: dict[bytes, _Numbers] = {}
        self.refused = 0

    def turns_away(self, authorization: bytes | None) -> Unauthenticated | None:
        """Why a request is not worth reading: it has no signature at all. None: it has one."""
        if authorization is not None and _FIELDS.fullmatch(authorization) is not None:
            return None
        return self._refusal("This needs the cluster's secret: a signature of it.")

    def check(
        self, authorization: bytes | None, method: bytes, target: bytes, digest: bytes
    ) -> Proof:
        """What proves the answer to a request. Raises Unauthenticated."""
        match = None if authorization is None else _FIELDS.fullmatch(authorization)
        if match is None:
            raise self._refusal("This needs the cluster's secret.")
        audience, life, sender, number, at, mac = match.groups()
        fields = authorization[len(SCHEME) : match.end(5)] if authorization is not None else b""
        for request_key, key in self._keys:
            if hmac.compare_digest(mac, _request_mac(request_key, method, target, digest, fields)):
                proof = Proof(key, mac)
                break
        else:
            raise self._refusal("This needs the cluster's secret; another one was used.")
        if audience.decode() not in self._audience:
            raise self._refusal(
                f"Signed for {audience.decode()}, where this server is not; the setting "
                "'advertise' says where else it is reached.",
                "wrong_address",
                proof,
            )
        if life != self._life:
            raise self._refusal("Signed for another life of this server.", "wrong_life", proof)
        now = self._wall_clock()
        if abs(int(at) / 1000 - now) > WINDOW_SECONDS:
            raise self._refusal(
                "Signed too long ago, or by a clock that is wrong.", "wrong_time", proof
            )
        if not self._numbers(sender, now).take(int(number)):
            raise self._refusal("This request was made before.", "replayed", proof)
        return proof

    def _numbers(self, sender: bytes, now: float) -> _Numbers:
        numbers = self._senders.get(sender)
        if numbers is None:
            if len(self._senders) >= MAX_SENDERS:
                self._senders = {s: n for s, n in self._senders.items() if n.until > now}
            if len(self._senders) >= MAX_SENDERS:
                raise self._refusal(f"More than {MAX_SENDERS} processes sign requests here.")
            numbers = self._senders[sender] = _Numbers()
        numbers.until = now + 2 * WINDOW_SECONDS
        return numbers

    def _refusal(
        self, message: str, code: str = "unauthenticated", proof: Proof | None = None
    ) -> Unauthenticated:
        self.refused += 1
        now = int(self._wall_clock() * 1000)
        challenge = f"MemServe life={self._life.decode()}, time={now}"
        proven = None if proof is None else _challenge_mac(proof.key, proof.mac, challenge)
        return Unauthenticated(message, code, challenge, proven)


class Proof(NamedTuple):
    """Of an accepted request: what its answer proves itself with."""

    key: Mac
    mac: bytes

    def connection_token(self) -> bytes:
        """As `Signer.connection_token`."""
        return _connection_token(self.key, self.mac)

    def headers(self, status: int, body: bytes | bytearray | None) -> list[tuple[bytes, bytes]]:
        """`body`: None where it is not whole yet."""
        proof = (PROOF_HEADER, _answer_mac(self.key, self.mac, status))
        if body is None:
            return [proof]
        return [proof, (CONTENT_HEADER, _content_mac(self.key, self.mac, status, body))]


async def digest_of(body: bytes) -> bytes:
    """What stands for a body in a signature. That of a large one takes milliseconds, and is
    made on a thread."""
    if len(body) <= INLINE_BYTES:
        return body_digest(body)
    return await asyncio.to_thread(body_digest, body)


def body_digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _keys(master: bytes) -> tuple[Mac, Mac]:
    """Of requests, and of answers: one is never mistaken for the other."""
    request = hmac.digest(master, b"http request", "sha256")
    return Mac(request), Mac(hmac.digest(master, b"http answer", "sha256"))


def _request_mac(key: Mac, method: bytes, target: bytes, digest: bytes, fields: bytes) -> bytes:
    # Neither method nor target can have a line break in it: HTTP allows none.
    return key.hex(b"%b\n%b\n%b\n%b" % (method, target, fields, digest))


def _content_mac(key: Mac, mac: bytes, status: int, body: bytes | bytearray) -> bytes:
    return key.hex(b"%b %d %b" % (mac, status, hashlib.sha256(body).digest()))


def _challenge_mac(key: Mac, mac: bytes, challenge: str) -> bytes:
    return key.hex(b"%b challenge %b" % (mac, challenge.encode("latin-1", "replace")))


def _connection_token(key: Mac, mac: bytes) -> bytes:
    return key.hex(b"%b connection" % mac)


def _answer_mac(key: Mac, mac: bytes, status: int) -> bytes:
    return key.hex(b"%b %d" % (mac, status))
