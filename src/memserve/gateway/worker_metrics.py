"""Merger of several workers' metrics into one text, with the label `worker`."""

from __future__ import annotations

from collections.abc import Mapping

WORKER = "worker"
_FAMILY = b"# HELP "


def merged(pages: Mapping[int, bytes]) -> bytes:
    """Merge pages that `memserve.api.metric` has written, by worker index, into one text: each
    metric's series stand together, or Prometheus would refuse all of it."""
    families: dict[bytes, list[bytes]] = {}
    for index, page in pages.items():
        label = b'%b="%d"' % (WORKER.encode(), index)
        lines: list[bytes] = []
        for line in page.split(b"\n"):
            if line.startswith(_FAMILY):
                lines = families.setdefault(line, [])
            elif line.startswith(b"#"):
                if line not in lines:
                    lines.append(line)
            elif line:
                lines.append(_with(label, line))
    return b"".join(b"%b\n" % line for head, lines in families.items() for line in (head, *lines))


def _with(label: bytes, line: bytes) -> bytes:
    """Return a series' line with one label more, behind its own."""
    name, _, value = line.rpartition(b" ")
    if name.endswith(b"}"):
        return b"%b,%b} %b" % (name[:-1], label, value)
    return b"%b{%b} %b" % (name, label, value)
