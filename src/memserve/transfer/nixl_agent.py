"""`NixlAgent`: a typed interface to the part of NIXL that transfers use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from types import ModuleType
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from memserve.errors import PeerLost, TransferError
from memserve.transfer.base import LocalRegion, Region
from memserve.types import IndexArray

Request = NewType("Request", int)

# Microseconds between two polls of NIXL's progress thread; without a delay it occupies a core.
PROGRESS_DELAY = 1000

_BACKEND = "UCX"
# A mutex instead of a spin lock between the progress thread and the posting thread: spinning took
# 40 % of a sender's time over TCP. UCX_* variables of these names take precedence.
_UCX_OPTIONS = ("USE_MT_MUTEX=y",)
# Bytes that TCP reads ahead, which cost one more copy: the default, 64 KiB, took a fifth of a
# receiver's time. Must not be below _SENT_AHEAD, whose default is 8 KiB.
_READ_AHEAD = "TCP_RX_SEG_SIZE=8k"
_SENT_AHEAD = "UCX_TCP_TX_SEG_SIZE"


class RequestState(Enum):
    """State of a posted request."""

    IN_PROGRESS = "in progress"
    DONE = "done"


class MetadataConflict(TransferError):
    """A peer's metadata contradicts its loaded metadata; forget the peer first."""


def load_bindings() -> ModuleType:
    """Return NIXL's bindings without their Python wrapper, which sets no delay for the progress
    thread. Raises TransferError."""
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise TransferError(
            f"NIXL cannot be imported ({error}); pip install --no-deps nixl nixl-cu12"
        ) from error


def ucx_options(tls: str | None, environment: Mapping[str, str]) -> list[str]:
    """Return UCX's options as NAME=value; variables of `environment` take precedence."""
    options = list(_UCX_OPTIONS)
    if _SENT_AHEAD not in environment:
        options.append(_READ_AHEAD)
    if tls is not None:
        options.append(f"TLS={tls}")
    return options


class NixlAgent:
    """One agent with the UCX backend. All calls from one thread."""

    def __init__(self, name: str, tls: str | None = None) -> None:
        """`tls`: the transports that UCX may use, as in UCX_TLS; None: as UCX_TLS says.

        Raises TransferError.
        """
        nixl = load_bindings()
        self._nixl = nixl
        self._failures: tuple[type[Exception], ...] = (
            nixl.nixlBackendError,
            nixl.nixlCancelledError,
            nixl.nixlInvalidParamError,
            nixl.nixlMismatchError,
            nixl.nixlNotAllowedError,
            nixl.nixlNotFoundError,
            nixl.nixlNotSupportedError,
            nixl.nixlRemoteDisconnectError,
            nixl.nixlUnknownError,
        )
        config = nixl.nixlAgentConfig()
        config.useProgThread = True  # a TCP target makes no progress without this thread
        config.pthrDelay = PROGRESS_DELAY
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = nixl.nixlAgent(name, config)
            self._backend = self._agent.createBackend(
                _BACKEND, {"engine_config": ",".join(ucx_options(tls, os.environ))}
            )
        except self._failures as error:
            raise TransferError(f"NIXL agent {name!r}: {error}") from error

    def register(self, local: LocalRegion) -> object:
        """Register memory; return the handle for `deregister`. Raises TransferError."""
        region = local.region
        row = np.array([[region.address, region.nbytes, region.device or 0]], dtype=np.uint64)
        handle: object = self._nixl.nixlRegDList(self._memory_type(region), row)
        try:
            self._agent.registerMem(handle, [self._backend])
        except self._failures as error:
            raise TransferError(f"NIXL cannot register {region}: {error}") from error
        return handle

    def deregister(self, handle: object) -> None:
        self._agent.deregisterMem(handle, [self._backend])

    def metadata(self) -> bytes:
        """Return the description of this agent and its registered memory, for peers' `load`."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def load(self, metadata: bytes) -> str:
        """Load a peer's metadata; return the name of its agent. Raises MetadataConflict if a
        registration was replaced by another at its address; TransferError."""
        try:
            name: bytes = self._agent.loadRemoteMD(metadata)
        except self._nixl.nixlNotAllowedError as error:
            raise MetadataConflict(str(error)) from error
        except self._failures as error:
            raise TransferError(f"NIXL refuses the metadata of a peer: {error}") from error
        return name.decode(errors="replace")  # a peer chose it

    def forget(self, name: str) -> None:
        """Forget a peer. Requests in progress continue, and their end is not reported."""
        try:
            self._agent.invalidateRemoteMD(name)
        except self._nixl.nixlNotFoundError:
            return  # NIXL forgot it when the connection broke

    def write(
        self,
        name: str,
        source: tuple[Region, IndexArray],
        target: tuple[Region, IndexArray],
        nbytes: IndexArray,
    ) -> Request:
        """Start to write pieces of a local region, at offsets [n], into a peer's region. Raises
        PeerLost."""
        ours = self._descriptors(*source, nbytes)
        theirs = self._descriptors(*target, nbytes)
        request: int | None = None
        try:
            request = self._agent.createXferReq(
                self._nixl.NIXL_WRITE, ours, theirs, name, "", [self._backend]
            )
            self._agent.postXferReq(request, "")
        except self._failures as error:
            if request is not None:
                self.release(Request(request))
            raise PeerLost(f"{name}: {error}") from error
        return Request(request)

    def state(self, request: Request) -> RequestState:
        """Return a request's state. Raises PeerLost for one that failed, which has stopped."""
        try:
            status = self._agent.getXferStatus(request)
        except self._failures as error:
            raise PeerLost(str(error)) from error
        if status == self._nixl.NIXL_IN_PROG:
            return RequestState.IN_PROGRESS
        return RequestState.DONE

    def release(self, request: Request) -> None:
        """Release a request that has ended. A request in progress would continue unreported."""
        with suppress(*self._failures):  # NIXL released it when the connection broke
            self._agent.releaseXferReq(request)

    def _descriptors(self, region: Region, offsets: IndexArray, nbytes: IndexArray) -> object:
        rows: NDArray[np.uint64] = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + region.address
        rows[:, 1] = nbytes
        rows[:, 2] = region.device or 0
        descriptors: object = self._nixl.nixlXferDList(self._memory_type(region), rows)
        return descriptors

    def _memory_type(self, region: Region) -> object:
        kind: object = self._nixl.DRAM_SEG if region.device is None else self._nixl.VRAM_SEG
        return kind
