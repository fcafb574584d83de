"""`ClusterKeys`: CURVE keys from the cluster's secret, for authenticated and encrypted sockets.

Connections use CURVE (RFC 26/ZMTP, Curve25519 with fresh keys for each connection): libzmq
encrypts and authenticates every frame and refuses replayed frames. An HMAC per message would
leave prompts readable on the network. The secret yields two key pairs: servers authenticate
with one, clients with the other.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import zmq
from zmq.utils import z85

from memserve.secrets import Secret, cluster_secret

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_ZAP_DOMAIN = b"memserve"
_ZAP_FRAMES = 8  # of a question, the sender's route included, before the credentials
_CURVE = b"CURVE"

_Received = TypeVar("_Received")  # what a socket's `recv` returns: bytes, or a future


@dataclass(frozen=True, slots=True)
class _KeyPair:
    public: bytes
    private: bytes


class ClusterKeys:
    """The key pairs of a secret. `local`: the secret is known on this machine only."""

    def __init__(self, secret: Secret) -> None:
        self.local = secret.local
        masters = secret.masters
        self._server = _derive(masters[0], b"server")
        self._client = _derive(masters[0], b"client")
        # While the secret is being changed, clients with the previous one are accepted too.
        self._known = [z85.decode(_derive(master, b"client").public) for master in masters]

    def secure_server(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_server = True
        socket.curve_secretkey = self._server.private
        socket.zap_domain = _ZAP_DOMAIN

    def secure_client(self, socket: zmq.Socket[_Received]) -> None:
        socket.curve_serverkey = self._server.public
        socket.curve_publickey = self._client.public
        socket.curve_secretkey = self._client.private

    def open_gate(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        """Return the socket on which libzmq asks about clients (RFC 27/ZAP); see `answer`."""
        gate = context.socket(zmq.ROUTER)
        gate.bind(_ZAP_ENDPOINT)
        return gate

    def answer(self, gate: zmq.Socket[bytes]) -> bool:
        """Answer one ZAP request; return whether the client is accepted."""
        frames = gate.recv_multipart()
        if len(frames) < _ZAP_FRAMES:  # not from libzmq
            return False
        route, _, version, request, domain, _, _, mechanism, *keys = frames
        known = (
            version == _ZAP_VERSION
            and domain == _ZAP_DOMAIN
            and mechanism == _CURVE
            and len(keys) == 1
            and any(hmac.compare_digest(keys[0], known) for known in self._known)
        )
        status = (b"200", b"OK") if known else (b"400", b"not of this cluster")
        gate.send_multipart([route, b"", _ZAP_VERSION, request, *status, b"", b""])
        return known


def cluster_keys(secret: str | None = None) -> ClusterKeys:
    """Return the keys of `secret`, by default of `cluster_secret()`. Raises ConfigError."""
    return _cached_keys(cluster_secret(secret))


@lru_cache(maxsize=8)
def _cached_keys(secret: Secret) -> ClusterKeys:
    return ClusterKeys(secret)


def _derive(master: bytes, use: bytes) -> _KeyPair:
    private = z85.encode(hmac.digest(master, use, "sha256"))
    return _KeyPair(zmq.curve_public(private), private)
