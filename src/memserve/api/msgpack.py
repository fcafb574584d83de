"""msgpack, as processes of a cluster encode what has tokens in it.

Calls that carry tokens, and their answers, are msgpack and nothing else. Tokens in them are bytes
(`memserve.tokens`): a prompt is neither written nor read as numbers.
"""

from __future__ import annotations

import msgspec
import numpy as np

from memserve.tokens import to_wire

MEDIA = "application/msgpack"
HEADER = (b"content-type", MEDIA.encode())


def _encodable(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return to_wire(value)
    raise NotImplementedError(f"{type(value)} is no part of a message")


encode = msgspec.msgpack.Encoder(enc_hook=_encodable).encode
