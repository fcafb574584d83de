"""Functions that are compiled to machine code: once for a machine, and never within a request.

numba keeps what it compiled beside the source (`__pycache__`), or in the user's cache folder
where that is read-only; `NUMBA_CACHE_DIR` names another one. Where it can write nowhere, each
process compiles when it starts, and says so.

Only who calls `Kernels.prepare` imports numba. Without, the same functions run as the Python that
they are: enough for an instance, which asks its cost model a few times when it starts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Generic, ParamSpec, TypeVar

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOADED_SECONDS = 1.0  # what takes longer was compiled, and not found


class Compiled(Generic[_P, _R]):
    """A function for certain types. Once prepared, `run` raises TypeError for others instead of
    compiling."""

    __slots__ = ("python", "run", "signature")

    def __init__(self, python: Callable[_P, _R], signature: str) -> None:
        self.python = python
        self.signature = signature
        self.run: Callable[_P, _R] = python


class Kernels:
    """What is prepared together. Belongs to the modules whose functions it compiles."""

    def __init__(
        self, whose: str, *, fastmath: Collection[str] = (), without_gil: bool = False
    ) -> None:
        """`whose`: in log lines. `fastmath`: LLVM's flags of what may be reordered."""
        self._whose = whose
        self._fastmath = set(fastmath)
        self._without_gil = without_gil
        self._unprepared: list[Compiled[..., Any]] = []
        self._parts: list[Callable[..., Any]] = []

    def compiled(self, signature: str) -> Callable[[Callable[_P, _R]], Compiled[_P, _R]]:
        """Compile a function for these types, when `prepare` is called.

        What is compiled is found again until the function's own file changes: the functions that
        it calls and the constants that it reads must stand in the same file.
        """

        def decorate(function: Callable[_P, _R]) -> Compiled[_P, _R]:
            kernel = Compiled(function, signature)
            self._unprepared.append(kernel)
            return kernel

        return decorate

    def inlined(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """A part of functions that are `compiled`, in the same file."""
        self._parts.append(function)
        return function

    def prepare(self) -> None:
        """Compile what is not compiled yet, or load it; with NUMBA_DISABLE_JIT it stays Python.

        OSError: the folder of compiled code cannot be read.
        """
        if not self._unprepared:
            return
        started = time.perf_counter()
        # Imports numba: a sixth of a second and some 60 MB.
        from numba import njit
        from numba.extending import register_jitable

        while self._parts:
            register_jitable(self._parts.pop())
        jit: Any = njit(
            error_model="numpy", fastmath=self._fastmath or False, nogil=self._without_gil
        )
        kept = True
        while self._unprepared:
            kernel = self._unprepared.pop()
            dispatcher = jit(kernel.python)
            if dispatcher is kernel.python:  # NUMBA_DISABLE_JIT
                continue
            kept &= _compile(dispatcher, kernel.signature)
            kernel.run = dispatcher
        took = time.perf_counter() - started
        if not kept:
            log.warning(
                "compiled %s in %.1f s; no folder can be written to keep it", self._whose, took
            )
        elif took > _LOADED_SECONDS:
            log.info("compiled %s in %.1f s", self._whose, took)


def _compile(dispatcher: Any, signature: str) -> bool:
    """Whether the next process will find it."""
    kept = True
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # nowhere to write
        kept = False
    try:
        dispatcher.compile(signature)
    except OSError:
        if not dispatcher.signatures:
            raise
        kept = False  # the disk is full, for example
    dispatcher.disable_compile()
    return kept
