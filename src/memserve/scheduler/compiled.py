"""Functions that are compiled to machine code: once for a machine, and never within a request.

numba keeps what it compiled beside the source (`__pycache__`), or in the user's cache folder
where that is read-only; `NUMBA_CACHE_DIR` names another one. Where it can write nowhere, each
process compiles when it starts, and says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from numba import njit
from numba.core.dispatcher import Dispatcher

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LOADED_SECONDS = 1.0  # what takes longer was compiled, and not found

# numba's stubs do not say what a compiled function takes.
_jit: Any = njit(error_model="numpy")
_unprepared: list[tuple[Dispatcher[Any], str]] = []


def compiled(signature: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Compile a function for these types, when `prepare` is called, and for no others.

    What is compiled is found again until the function's own file changes: the functions that it
    calls and the constants that it reads must stand in the same file.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        dispatcher: Callable[_P, _R] = _jit(function)
        if isinstance(dispatcher, Dispatcher):  # not so with NUMBA_DISABLE_JIT
            _unprepared.append((dispatcher, signature))
        return dispatcher

    return decorate


def inlined(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A part of functions that are `compiled`, in the same file."""
    part: Callable[_P, _R] = _jit(function)
    return part


def prepare() -> None:
    """Compile what is not compiled yet, or load it. From then on a call with other types raises
    TypeError instead of compiling. OSError: the folder of compiled code cannot be read."""
    started = time.perf_counter()
    kept = True
    while _unprepared:
        kept &= _prepare(*_unprepared.pop())
    took = time.perf_counter() - started
    if not kept:
        log.warning("compiled the scheduler in %.1f s; no folder can be written to keep it", took)
    elif took > _LOADED_SECONDS:
        log.info("compiled the scheduler in %.1f s", took)


def _prepare(dispatcher: Dispatcher[Any], signature: str) -> bool:
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
