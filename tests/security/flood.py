"""Sends a publisher of KV events what no subscriber needs: `python -m tests.security.flood
KIND ENDPOINT BYTES`. Says `hung up` when the publisher has hung up.

A process of its own: libzmq crashes when it frees a subscription of that size.
"""

from __future__ import annotations

import os
import sys

import zmq

from memserve.transfer.secret import cluster_keys

PATIENCE_MS = 30_000


def main(kind: str, endpoint: str, size: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.XSUB if kind == "subscription" else zmq.DEALER)
    cluster_keys(None).secure_client(socket)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(endpoint)
    for _ in range(3):
        socket.send(b"\x01" + bytes(int(size)))
    print("hung up" if monitor.poll(PATIENCE_MS) else "nothing", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:4])
