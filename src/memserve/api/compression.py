"""Decompression of request bodies, piece by piece: what a few bytes become (a "zip bomb") is never
held beyond the limit."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Final

import zstandard

from memserve.api.errors import ApiError, body_too_large, invalid

# Bytes of a piece: a tenth of a millisecond or two.
PIECE_BYTES: Final = 64 * 1024
# Memory of a zstd frame's window; RFC 9659 has HTTP's senders keep to it.
_MAX_WINDOW_BYTES: Final = 8 * 1024 * 1024
_GZIP_BITS: Final = 31  # zlib's: the largest window, and gzip's header
_ZLIB_METHOD: Final = 8  # deflate, in the lower half of zlib's first byte
# A frame, and what it holds. Its bytes end with a checksum: where they are taken for the text of a
# block that was cut off, the text does not end with what the frame holds.
_LAST: Final = b"\0memserve"
_LAST_FRAME: Final = zstandard.ZstdCompressor(write_checksum=True).compress(_LAST)


class Decompression:
    """One body on its way. `limit`: the most bytes that it may become. Raises ApiError (415) for
    a coding that is not known; all methods raise ApiError for a body that is not valid (400) or too
    large (413)."""

    def __init__(self, coding: bytes, body: bytes, limit: int) -> None:
        """`coding`: the value of Content-Encoding."""
        self._pieces = _pieces(coding, body)
        self._limit = limit
        self._out = bytearray()

    def take(self, size: int) -> bool:
        """Decompress some `size` bytes more; return whether that was all."""
        enough = len(self._out) + size
        while len(self._out) < enough:
            try:
                piece = next(self._pieces, None)
            except (zlib.error, zstandard.ZstdError) as error:
                raise _damaged(str(error)) from error
            if piece is None:
                return True
            self._out += piece
            if len(self._out) > self._limit:
                raise body_too_large(self._limit)
        return False

    def rest(self) -> bytes:
        """Decompress to the end; return the whole."""
        while not self.take(PIECE_BYTES):
            pass
        return bytes(self._out)


def _pieces(coding: bytes, body: bytes) -> Iterator[bytes]:
    match coding.strip().lower():
        case b"" | b"identity":
            return iter((body,))
        case b"gzip" | b"x-gzip":
            return _inflated(body, _GZIP_BITS)
        case b"deflate":
            return _inflated(body, zlib.MAX_WBITS if _has_zlib_header(body) else -zlib.MAX_WBITS)
        case b"zstd":
            return _zstd(body)
    raise ApiError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        f"Content-Encoding {ascii(coding[:64])[1:]} is not supported; gzip, deflate and zstd are, "
        "one of them.",
        code="unsupported_content_encoding",
    )


def _inflated(body: bytes, window_bits: int) -> Iterator[bytes]:
    stream = zlib.decompressobj(window_bits)
    for begin in range(0, len(body), PIECE_BYTES):
        data = body[begin : begin + PIECE_BYTES]
        while not stream.eof:
            piece = stream.decompress(data, PIECE_BYTES)
            data = stream.unconsumed_tail
            yield piece
            if not data and len(piece) < PIECE_BYTES:
                break
        if stream.eof:
            if stream.unused_data or begin + PIECE_BYTES < len(body):
                raise _damaged("something follows its end")
            return
    raise _damaged("it is cut off")


def _has_zlib_header(body: bytes) -> bool:
    """Return whether "deflate" is what the RFC means by it, and not the bare format that some
    clients send."""
    return len(body) > 1 and body[0] & 15 == _ZLIB_METHOD and (body[0] << 8 | body[1]) % 31 == 0


def _zstd(body: bytes) -> Iterator[bytes]:
    """Yield the pieces of zstd frames. A reader of the library does not say whether the last frame
    has ended: one more behind it, which then comes last, tells."""
    if not body:
        raise _damaged("it is empty")
    window = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    held = b""
    with window.stream_reader(io.BytesIO(body + _LAST_FRAME), read_across_frames=True) as reader:
        while piece := reader.read(PIECE_BYTES):
            held += piece
            yield held[: -len(_LAST)]
            held = held[-len(_LAST) :]
    if held != _LAST:
        raise _damaged("it is cut off")


def _damaged(why: str) -> ApiError:
    return invalid(
        f"The request body is not what its Content-Encoding says: {why}.",
        code="invalid_content_encoding",
    )
