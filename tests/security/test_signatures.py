"""What a signature is good for: one request, once, to one life of one server, soon."""

from __future__ import annotations

import contextlib
import hmac
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.api.errors import ApiError
from memserve.api.signatures import (
    REORDERED,
    WINDOW_SECONDS,
    Mac,
    Proof,
    Signed,
    Signer,
    Unauthenticated,
    Verifier,
    body_digest,
)
from memserve.secrets import Secret

SECRET = Secret(("of the cluster",))
ORIGIN = "http://10.0.0.1:8000"
AUDIENCE = {"10.0.0.1:8000"}
BODY = b'{"address":"http://10.0.0.2:9000"}'


class WallClock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Wire:
    """A client, a server, and what goes between them."""

    def __init__(self, theirs: Secret = SECRET, ours: Secret = SECRET) -> None:
        self.client_clock, self.server_clock = WallClock(), WallClock()
        self.signer = Signer(theirs, self.client_clock)
        self.ours = ours
        self.restart()

    def restart(self) -> None:
        self.verifier = Verifier(self.ours, AUDIENCE, self.server_clock)

    def sign(self, method: bytes = b"POST", target: bytes = b"/x", body: bytes = BODY) -> Signed:
        return self.signer.sign(ORIGIN, method, target, body_digest(body))

    def check(
        self, signed: Signed, method: bytes = b"POST", target: bytes = b"/x", body: bytes = BODY
    ) -> Proof:
        return self.verifier.check(signed.authorization, method, target, body_digest(body))

    def meet(self) -> None:
        """The client learns which life the server is in."""
        signed = self.sign()
        assert self.learn(signed)

    def learn(self, signed: Signed) -> bool:
        """Whether the client takes in the challenge to a request."""
        with pytest.raises(Unauthenticated) as refused:
            self.check(signed)
        challenge = refused.value.authenticate
        assert challenge is not None
        return self.signer.learn(ORIGIN, challenge, refused.value.proof, signed)


@pytest.fixture
def wire() -> Wire:
    met = Wire()
    met.meet()
    return met


def test_a_signed_request_is_taken_and_its_answer_proves_itself(wire: Wire) -> None:
    signed = wire.sign()
    headers = dict(wire.check(signed).headers(200, b"body"))
    assert wire.signer.proves(signed, 200, headers[b"memserve-proof"])
    content = headers[b"memserve-content"]
    assert wire.signer.proves_content(signed, 200, b"body", content)
    for status, body in ((200, b"bodY"), (200, b""), (404, b"body")):
        assert not wire.signer.proves_content(signed, status, body, content)
    assert not wire.signer.proves_content(signed, 200, b"body", None)


def test_an_answer_is_not_believed_for_another_request_or_status(wire: Wire) -> None:
    signed, other = wire.sign(), wire.sign()
    ((_, proof),) = wire.check(signed).headers(200, None)
    assert not wire.signer.proves(signed, 404, proof)
    assert not wire.signer.proves(other, 200, proof)
    assert not wire.signer.proves(signed, 200, None)
    assert not wire.signer.proves(signed, 200, b"")


def test_a_request_is_taken_once(wire: Wire) -> None:
    signed = wire.sign()
    wire.check(signed)
    with pytest.raises(ApiError, match="made before"):
        wire.check(signed)


@pytest.mark.parametrize(
    "changed",
    [
        lambda wire, signed: wire.check(signed, method=b"DELETE"),
        lambda wire, signed: wire.check(signed, target=b"/y"),
        lambda wire, signed: wire.check(signed, target=b"/x?n=1"),
        lambda wire, signed: wire.check(signed, body=BODY + b" "),
        lambda wire, signed: wire.check(signed, body=b""),
    ],
)
def test_what_was_signed_cannot_be_changed(
    wire: Wire, changed: Callable[[Wire, Signed], None]
) -> None:
    signed = wire.sign()
    with pytest.raises(ApiError) as refused:
        changed(wire, signed)
    assert refused.value.status == 401


def test_no_bit_of_a_signature_can_be_changed(wire: Wire) -> None:
    signed = wire.sign()
    for at in range(len(signed.authorization)):
        for bit in (0x01, 0x20, 0x80):
            header = bytearray(signed.authorization)
            header[at] ^= bit
            with pytest.raises(ApiError):
                wire.verifier.check(bytes(header), b"POST", b"/x", body_digest(BODY))
    wire.check(signed)  # none of that used it up


def test_another_secret_is_refused() -> None:
    wire = Wire(theirs=Secret(("of another",)))
    with pytest.raises(ApiError, match="another one"):
        wire.check(wire.sign())


def test_a_recorded_request_is_worth_nothing_to_a_server_that_was_started_again(
    wire: Wire,
) -> None:
    signed = wire.sign()
    wire.restart()
    with pytest.raises(ApiError, match="another life"):
        wire.check(signed)
    wire.meet()
    wire.check(wire.sign())


def test_a_recorded_request_is_worth_nothing_later(wire: Wire) -> None:
    signed = wire.sign()
    wire.server_clock.now += WINDOW_SECONDS + 1
    with pytest.raises(ApiError, match="too long ago"):
        wire.check(signed)


@pytest.mark.parametrize("hours", [-30, 30])
def test_clocks_of_two_machines_may_differ(hours: int) -> None:
    wire = Wire()
    wire.client_clock.now += 3600 * hours
    wire.meet()
    wire.check(wire.sign())


def test_a_clock_that_is_put_right_in_the_middle_is_followed(wire: Wire) -> None:
    wire.check(wire.sign())
    wire.server_clock.now += 7200
    wire.meet()
    wire.check(wire.sign())


def test_a_server_that_challenges_for_ever_is_not_asked_for_ever(wire: Wire) -> None:
    wire.check(first := wire.sign())
    with pytest.raises(Unauthenticated) as refused:
        wire.check(first)  # refused now, for a reason that no clock mends
    assert refused.value.authenticate is not None
    told = refused.value.authenticate, refused.value.proof
    assert not wire.signer.learn(ORIGIN, *told, first)  # nothing new


def test_a_challenge_of_a_stranger_is_not_taken_in(wire: Wire) -> None:
    """Else it could have requests dated for later, or made for somebody else."""
    signed = wire.sign()
    challenge = f"MemServe life={'0' * 16}, time=9999999999999"
    for proof in (None, b"", b"0" * 64, signed.mac):
        assert not wire.signer.learn(ORIGIN, challenge, proof, signed)
    wire.check(signed)
    # Nor one that was meant for another request.
    wire.restart()
    first, second = wire.sign(), wire.sign()
    with pytest.raises(Unauthenticated) as refused:
        wire.check(first)
    assert refused.value.authenticate is not None
    assert not wire.signer.learn(ORIGIN, refused.value.authenticate, refused.value.proof, second)


def test_what_was_signed_for_another_address_is_refused(wire: Wire) -> None:
    for origin in ("http://10.0.0.1:8001", "http://10.0.0.2:8000", "http://gateway:8000"):
        signed = wire.signer.sign(origin, b"POST", b"/x", body_digest(BODY))
        with pytest.raises(Unauthenticated) as refused:
            wire.check(signed)
        assert refused.value.detail.code == "wrong_address"


def test_two_requests_at_once_may_find_out_about_a_server() -> None:
    wire = Wire()
    first, second = wire.sign(), wire.sign()
    for signed in (first, second):
        assert wire.learn(signed)
        wire.check(wire.sign())


@pytest.mark.parametrize(
    "challenge", ["", "Basic", "MemServe life=x, time=1", "MemServe life=" + "0" * 16, "é" * 99]
)
def test_challenges_that_are_none_are_ignored(challenge: str) -> None:
    signer = Signer(SECRET)
    assert not signer.learn(
        ORIGIN, challenge, b"0" * 64, signer.sign(ORIGIN, b"GET", b"/", body_digest(b""))
    )


def test_both_secrets_are_taken_while_one_replaces_the_other() -> None:
    both = Secret(("new", "old"))
    for theirs in (Secret(("old",)), Secret(("new",)), both):
        wire = Wire(theirs=theirs, ours=both)
        wire.meet()
        signed = wire.sign()
        ((_, proof),) = wire.check(signed).headers(200, None)
        assert wire.signer.proves(signed, 200, proof)
    wire = Wire(theirs=Secret(("older",)), ours=both)
    with pytest.raises(ApiError):
        wire.check(wire.sign())


@given(st.integers(0, 2**32), st.integers(1, 400))
def test_requests_may_overtake_each_other_and_none_counts_twice(seed: int, count: int) -> None:
    wire = Wire()
    wire.meet()
    order = [wire.sign() for _ in range(count)] * 2
    random.Random(seed).shuffle(order)
    taken = 0
    for signed in order:
        with contextlib.suppress(ApiError):
            wire.check(signed)
            taken += 1
    assert taken == count


def test_what_was_overtaken_by_too_many_is_refused(wire: Wire) -> None:
    late = wire.sign()
    for _ in range(REORDERED):
        newest = wire.sign()
    wire.check(newest)
    with pytest.raises(ApiError, match="made before"):
        wire.check(late)


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_our_hmac_is_the_library_s(key: bytes, message: bytes) -> None:
    assert Mac(key).hex(message) == hmac.digest(key, message, "sha256").hex().encode()


@given(st.binary(max_size=200))
def test_headers_that_are_none_are_refused(data: bytes) -> None:
    verifier = Verifier(SECRET, AUDIENCE)
    for header in (data, b"MemServe " + data, b"Bearer " + data):
        with pytest.raises(ApiError):
            verifier.check(header, b"GET", b"/", body_digest(b""))


def test_strangers_leave_nothing_behind(wire: Wire) -> None:
    stranger = Wire(theirs=Secret(("of another",)))
    stranger.verifier = wire.verifier
    for _ in range(1000):
        with pytest.raises(ApiError):
            stranger.check(stranger.sign())
    assert len(wire.verifier._senders) == 0
    wire.check(wire.sign())
    assert len(wire.verifier._senders) == 1
