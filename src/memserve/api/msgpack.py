"""msgpack encoding of calls that carry tokens, between processes of a cluster.

Such calls and their answers are msgpack only. Tokens are int32 bytes in them (`memserve.tokens`),
not msgpack integers.
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
