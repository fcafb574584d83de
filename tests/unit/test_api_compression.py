"""Compressed bodies: whole ones are taken, and what is missing of one is noticed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
import zstandard

from memserve.api.compression import Decompression
from memserve.api.errors import ApiError

BODY = b'{"prompt": "a", "max_tokens": 2}'


def _checked(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


CODINGS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"gzip", gzip.compress),
    (b"deflate", zlib.compress),
    (b"zstd", zstandard.compress),
    (b"zstd", _checked),
    (b"zstd", lambda data: zstandard.compress(data[:-7], 19)),
]


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
def test_a_body_that_is_cut_off_is_refused_wherever_it_ends(
    coding: bytes, compress: Callable[[bytes], bytes]
) -> None:
    for padding in (b"", b" " * 200_000):  # white space, so that the JSON is whole early
        body = compress(BODY + padding + b" " * 7)
        assert Decompression(coding, body, 2**20).rest().rstrip() == BODY
        for end in range(len(body)) if len(body) < 500 else (1, 20, len(body) - 1):
            with pytest.raises(ApiError) as refused:
                Decompression(coding, body[:end], 2**20).rest()
            assert refused.value.status == 400
            assert refused.value.detail.code == "invalid_content_encoding"


def test_zstd_frames_behind_each_other_are_one_body() -> None:
    body = zstandard.compress(BODY) + zstandard.compress(b" ") + zstandard.compress(b"\n")
    assert Decompression(b"zstd", body, 2**20).rest() == BODY + b" \n"


def test_what_follows_a_zstd_frame_must_be_one() -> None:
    with pytest.raises(ApiError):
        Decompression(b"zstd", zstandard.compress(BODY) + b"more", 2**20).rest()
