"""Signatures that prove that an HTTP request, and its answer, come from the cluster.

    Authorization: MemServe HOST:PORT LIFE.SENDER.NUMBER.TIME.MAC
    MemServe-Proof: MAC
    MemServe-Content: MAC

The MAC is HMAC-SHA256, with a key derived from the cluster's secret, over method, target, the
body's digest, and the fields before it. The fields keep a request from being used twice, or at
another server:

- HOST:PORT is the address of the server. A server accepts requests for its own addresses alone
  (`api/audience.py`): a process at a dead member's address cannot pass requests on to another.
- LIFE names the running server. A server tells its own in the challenge of a 401
  (`WWW-Authenticate: MemServe life=..., time=...`), so the first request to a server, or to a
  restarted one, is made twice. A recorded request is worth nothing elsewhere or later. Challenges
  carry a proof, as all answers do: nobody without the secret can set a client's clock.
- SENDER and NUMBER name the request. A server accepts each number of a sender once, in any order.
  It keeps a bitmap for each process that has the secret, and nothing for others.
- TIME, in milliseconds of the server's clock as the challenge told it, bounds for how long the
  server must remember a sender that has gone.

MemServe-Proof covers the request's MAC and the status; MemServe-Content covers the body, too, and
is sent if the body is whole when the answer begins. A process without the secret can give
neither. Signatures hide nothing: confidentiality, and integrity of streamed bodies on a network
that others can write to, need TLS. Within a machine a connection is proven once
(`local_connection`).
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
_NO_LIFE = b"0" * 16  # for a server whose life is not known yet
PROOF_HEADER = b"memserve-proof"
CONTENT_HEADER = b"memserve-content"

# Largest difference of a request's time and the server's: longer than a request waits anywhere
# before it is read. A challenge corrects clocks that differ by more.
WINDOW_SECONDS = 120.0
# How far below a sender's highest number one is still accepted: more than the requests that a
# process has under way to one server.
REORDERED = 1 << 13
# Senders that a server remembers; each has the secret, and is dropped, if there are more, when
# none of its requests can be in the time window.
MAX_SENDERS = 4096
MAX_CHALLENGES = 4096  # servers that a client remembers
INLINE_BYTES = 256 * 1024  # digested on the event loop, in a quarter of a millisecond

_FIELDS = re.compile(
    rb"MemServe ([A-Za-z0-9._:%\[\]-]{1,262}) "
    rb"([0-9a-f]{16})\.([0-9a-f]{16})\.(\d{1,15})\.(\d{1,15})\.([0-9a-f]{64})"
)
_CHALLENGE = re.compile(r"MemServe life=([0-9a-f]{16}), time=(\d{1,15})")


class Mac:
    """HMAC-SHA256 (RFC 2104) with one key. The two keyed hash states are computed once, which is
    most of the work of `hmac.digest` for a short message."""

    __slots__ = ("_inner", "_outer")
    _BLOCK = 64

    def __init__(self, key: bytes) -> None:
        """`key`: at most 64 bytes."""
        padded = key.ljust(self._BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def hex(self, message: bytes) -> bytes:
        """Return the MAC as 64 hexadecimal digits."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.hexdigest().encode()


class _Challenge(NamedTuple):
    """A server's life and clock, from its challenge."""

    life: bytes
    ahead: int  # milliseconds that the server's clock is ahead of ours
    begin: bytes  # first fields of each request to it: address, life and sender


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
        self._challenges: OrderedDict[tuple[str, str | None], _Challenge] = OrderedDict()

    def sign(
        self,
        origin: str,
        method: bytes,
        target: bytes,
        digest: bytes,
        address: str | None = None,
    ) -> Signed:
        """Return a signature for a request to the server at `origin` (scheme://host:port).
        `target`: as it is sent. `digest`: the body's `body_digest`. `address`: tells the servers
        apart that are at one origin; each has a life of its own."""
        known = self._challenges.get((origin, address))
        challenge = known or self._challenge(origin, _NO_LIFE, 0)
        self._number += 1
        now = int(self._wall_clock() * 1000) + challenge.ahead
        fields = b"%b%d.%d" % (challenge.begin, self._number, now)
        mac = _request_mac(self._request_key, method, target, digest, fields)
        return Signed(b"%b%b.%b" % (SCHEME, fields, mac), mac, challenge)

    def learn(
        self,
        origin: str,
        challenge: str,
        proof: bytes | None,
        signed: Signed,
        address: str | None = None,
    ) -> bool:
        """Store the challenge of a 401, if its proof is valid. Return whether another try may
        succeed, since `signed` was for another life or by a clock that is off."""
        match = _CHALLENGE.fullmatch(challenge)
        if match is None or proof is None:
            return False
        if not hmac.compare_digest(proof, _challenge_mac(self._answer_key, signed.mac, challenge)):
            return False
        life, ahead = match[1].encode(), int(match[2]) - int(self._wall_clock() * 1000)
        self._challenges.pop((origin, address), None)
        self._challenges[origin, address] = self._challenge(origin, life, ahead)
        if len(self._challenges) > MAX_CHALLENGES:
            self._challenges.popitem(last=False)
        late = abs(signed.challenge.ahead - ahead) > 1000 * WINDOW_SECONDS / 2
        return signed.challenge.life != life or late

    def clock_ahead(self, origin: str) -> float | None:
        """Seconds that a server's clock is ahead of ours, less the challenge's time on the way;
        None before a challenge."""
        known = self._challenges.get((origin, None))
        return None if known is None else known.ahead / 1000

    def _challenge(self, origin: str, life: bytes, ahead: int) -> _Challenge:
        audience = origin.rpartition("//")[2].encode()
        return _Challenge(life, ahead, b"%b %b.%b." % (audience, life, self._sender))

    def connection_token(self, signed: Signed) -> bytes:
        """Return the token that replaces signatures on the local connection on which this request
        was accepted."""
        return _connection_token(self._answer_key, signed.mac)

    def proves(self, signed: Signed, status: int, proof: bytes | None) -> bool:
        """Return whether the answer comes from a process that has the secret."""
        return proof is not None and hmac.compare_digest(
            proof, _answer_mac(self._answer_key, signed.mac, status)
        )

    def proves_content(
        self, signed: Signed, status: int, body: bytes, content: bytes | None
    ) -> bool:
        """Return whether status and body are exactly what a process with the secret sent."""
        return content is not None and hmac.compare_digest(
            content, _content_mac(self._answer_key, signed.mac, status, body)
        )


class Unauthenticated(ApiError):
    """A 401 with a challenge, and its proof if the request's MAC was valid."""

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
        """Return the error's headers, with the proof."""
        proof = [] if self.proof is None else [(PROOF_HEADER, self.proof)]
        return [*super().headers(), *proof]


class _Numbers:
    """Used numbers of a sender: the highest, and a bit for each of the REORDERED below it."""

    __slots__ = ("_highest", "_used", "until")

    def __init__(self) -> None:
        self._highest = 0
        self._used = 0
        self.until = 0.0  # wall-clock seconds from which on none of its requests is in the window

    def take(self, number: int) -> bool:
        """Use a number. Return False if it was used, or is too low to tell."""
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
    """Checks signatures of requests to one server. Belongs to one event loop."""

    def __init__(
        self,
        secret: Secret,
        audience: Container[str],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`audience`: the server's addresses, as host:port."""
        self._keys = [_keys(master) for master in secret.masters]
        self._audience = audience
        self._wall_clock = wall_clock
        self._life = os.urandom(8).hex().encode()
        self._senders: dict[bytes, _Numbers] = {}
        self.refused = 0

    def turns_away(self, authorization: bytes | None) -> Unauthenticated | None:
        """Return the refusal of a request without a well-formed signature, to save reading its
        body; None if it has one, which is not checked here."""
        if authorization is not None and _FIELDS.fullmatch(authorization) is not None:
            return None
        return self._refusal("This needs the cluster's secret: a signature of it.")

    def check(
        self, authorization: bytes | None, method: bytes, target: bytes, digest: bytes
    ) -> Proof:
        """Check a request's signature; return the proof for its answer. Raises Unauthenticated."""
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
    """Key and MAC of an accepted request, which make the proofs in its answer."""

    key: Mac
    mac: bytes

    def connection_token(self) -> bytes:
        """Return the token that `Signer.connection_token` returns to the client."""
        return _connection_token(self.key, self.mac)

    def headers(self, status: int, body: bytes | bytearray | None) -> list[tuple[bytes, bytes]]:
        """Return the answer's proof headers. `body`: None if it is not whole yet."""
        proof = (PROOF_HEADER, _answer_mac(self.key, self.mac, status))
        if body is None:
            return [proof]
        return [proof, (CONTENT_HEADER, _content_mac(self.key, self.mac, status, body))]


async def digest_of(body: bytes) -> bytes:
    """Return `body_digest(body)`; computed on a thread if the body is larger than INLINE_BYTES."""
    if len(body) <= INLINE_BYTES:
        return body_digest(body)
    return await asyncio.to_thread(body_digest, body)


def body_digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _keys(master: bytes) -> tuple[Mac, Mac]:
    """Return the keys of requests and of answers: neither MAC is valid as the other."""
    request = hmac.digest(master, b"http request", "sha256")
    return Mac(request), Mac(hmac.digest(master, b"http answer", "sha256"))


def _request_mac(key: Mac, method: bytes, target: bytes, digest: bytes, fields: bytes) -> bytes:
    # The separators are unambiguous: HTTP allows no line break in a method or target.
    return key.hex(b"%b\n%b\n%b\n%b" % (method, target, fields, digest))


def _content_mac(key: Mac, mac: bytes, status: int, body: bytes | bytearray) -> bytes:
    return key.hex(b"%b %d %b" % (mac, status, hashlib.sha256(body).digest()))


def _challenge_mac(key: Mac, mac: bytes, challenge: str) -> bytes:
    return key.hex(b"%b challenge %b" % (mac, challenge.encode("latin-1", "replace")))


def _connection_token(key: Mac, mac: bytes) -> bytes:
    return key.hex(b"%b connection" % mac)


def _answer_mac(key: Mac, mac: bytes, status: int) -> bytes:
    return key.hex(b"%b %d" % (mac, status))
