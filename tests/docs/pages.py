"""Pages of the documentation as tests see them: blocks of commands, and what they print.

Blocks marked `bash` are commands, and a `text` block behind one is its output, with `...` for what
differs. A block marked `bash host-b` is run on host B.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
END = "--- end of block ---"
_BLOCK = re.compile(r"^```(\w*)(?: host-(\w))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_same = doctest.OutputChecker().check_output


class Block(NamedTuple):
    commands: str
    printed: str | None
    host: str | None  # in capitals; None: the page knows one host

    def check(self, got: str) -> None:
        """Fails unless this is what the page says."""
        if self.printed is not None:
            assert _same(self.printed, got, _FLAGS), f"{self.commands}\nprinted:\n{got}"


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    before = ""
    for language, host, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            found.append(Block(text, None, host.upper() or None))
        elif language == "text":
            assert before == "bash", f"{page.name}: output without a command:\n{text}"
            found[-1] = found[-1]._replace(printed=text)
        before = language
    return found
