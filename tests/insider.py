"""Who has the cluster's secret: tests that ask gateways and instances what strangers may not."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from memserve.api.audience import origin_of
from memserve.api.peer_client import PeerClient
from memserve.api.signatures import Signed, Signer, body_digest
from memserve.secrets import Secret, cluster_secret, secret_of

TIMEOUT = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    text: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def peers() -> PeerClient:
    """A client of the cluster's processes, on a running event loop."""
    return PeerClient(Signer(cluster_secret()))


def ask(
    url: str,
    path: str,
    body: bytes | str | None = None,
    method: str = "GET",
    secret: Secret | None = None,
    **headers: str,
) -> Answer:
    """The answer to a signed request; by default with the secret of the gateway at `url`, or else
    this user's: a cluster that was killed may have left one for the same port."""
    answer = _ask(secret or secret_of(url), url, path, body, method, headers)
    if secret is None and answer.status == 401:
        answer = _ask(cluster_secret(), url, path, body, method, headers)
    return answer


def _ask(
    secret: Secret,
    url: str,
    path: str,
    body: bytes | str | None,
    method: str,
    headers: dict[str, str],
) -> Answer:
    signer = Signer(secret)
    data = body.encode() if isinstance(body, str) else body or b""
    for _ in range(2):  # the first one finds out which life it is
        signed = signer.sign(origin_of(url), method.encode(), path.encode(), body_digest(data))
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
        given = {"Authorization": signed.authorization.decode(), **headers}
        connection.request(method, path, data or None, given)
        response = connection.getresponse()
        answer = Answer(response.status, response.headers, response.read())
        connection.close()
        if answer.status != 401 or not learned(signer, url, answer, signed):
            break
    return answer


def learned(signer: Signer, url: str, answer: Answer, signed: Signed) -> bool:
    """Whether the answer has a challenge that is taken in."""
    challenge, proof = answer.headers["WWW-Authenticate"] or "", answer.headers["MemServe-Proof"]
    given = None if proof is None else proof.encode()
    return signer.learn(origin_of(url), challenge, given, signed)


def told(
    url: str,
    path: str,
    body: bytes | str | None = None,
    method: str = "GET",
    secret: Secret | None = None,
) -> Any:
    """Status, and what the JSON of the answer says."""
    answer = ask(url, path, body, method, secret)
    return answer.status, answer.json
