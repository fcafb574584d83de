"""Functions compiled with numba: once per machine, and never during a request.

numba caches compiled code beside the source (`__pycache__`), or in the user's cache folder if
that is read-only; `NUMBA_CACHE_DIR` names another folder. If no folder can be written, each
process compiles at its start, and logs a warning.

Only `Kernels.prepare` imports numba. Without this call the functions run as plain Python, which
is enough for an instance: it uses its cost model a few times at its start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Generic, ParamSpec, TypeVar

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOADED_SECONDS = 1.0  # a longer `prepare` has compiled, not loaded from the cache


class Compiled(Generic[_P, _R]):
    """A function and its numba signature. Once prepared, `run` raises TypeError for arguments of
    other types instead of compiling."""

    __slots__ = ("python", "run", "signature")

    def __init__(self, python: Callable[_P, _R], signature: str) -> None:
        self.python = python
        self.signature = signature
        self.run: Callable[_P, _R] = python


class Kernels:
    """A group of functions that are compiled together, with the same numba options."""

    def __init__(
        self, whose: str, *, fastmath: Collection[str] = (), without_gil: bool = False
    ) -> None:
        """`whose`: name of the group in log lines. `fastmath`: LLVM's fast-math flags.
        `without_gil`: release the GIL while a function runs."""
        self._whose = whose
        self._fastmath = set(fastmath)
        self._without_gil = without_gil
        self._unprepared: list[Compiled[..., Any]] = []
        self._parts: list[Callable[..., Any]] = []

    def compiled(self, signature: str) -> Callable[[Callable[_P, _R]], Compiled[_P, _R]]:
        """Decorate a function that `prepare` compiles for the types of `signature`.

        numba's cache is valid until the function's own file changes, so the functions that it
        calls and the constants that it reads must be in the same file.
        """

        def decorate(function: Callable[_P, _R]) -> Compiled[_P, _R]:
            kernel = Compiled(function, signature)
            self._unprepared.append(kernel)
            return kernel

        return decorate

    def inlined(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Decorate a function that `compiled` functions of the same file call."""
        self._parts.append(function)
        return function

    def prepare(self) -> None:
        """Compile all functions, or load them from the cache; with NUMBA_DISABLE_JIT they stay
        Python.

        Raises OSError if the cache folder cannot be read.
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
    """Compile for one signature; return whether the result is cached for other processes."""
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
