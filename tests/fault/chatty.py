"""A process that says too much: `python -m tests.fault.chatty URL BYTES`.

After its address come a line of so many bytes, some without an end, and one more line.
"""

from __future__ import annotations

import sys


def main(url: str, size: str) -> None:
    out = sys.stdout
    print("a warning, before anybody listens: http://nowhere.example", flush=True)
    print(url, flush=True)
    out.write("x" * int(size))
    out.write("\nsaid after it\n")
    out.flush()
    sys.stdin.buffer.read(1)  # until the test has seen that, or has gone
    out.write("y" * int(size))
    out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
