"""The connection to a Ray cluster: made once in a process, with errors that say what to do."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading

import ray
import ray.exceptions
import ray.util

from memserve.config import BackendConfig
from memserve.errors import ClusterError
from memserve.ray.order import PREFIX

_VERSION_HINT = "Ray and Python must have the same version on all nodes"


async def connect(cluster: BackendConfig) -> None:
    """Connect this process to the Ray cluster. Raises ClusterError if there is none at the
    address."""
    if ray.is_initialized():
        return

    def init() -> None:
        ray.init(
            address=cluster.ray_address,
            namespace=cluster.ray_namespace,
            log_to_driver=False,  # `Member.report` has what the processes print
            logging_level=logging.ERROR,
        )

    try:
        # In a thread, where Ray cannot replace this process's handlers of signals. But its library
        # takes SIGTERM all the same, to print a stack as of a crash before it passes it on.
        await asyncio.to_thread(init)
        _keep_handler(signal.SIGTERM)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster at cluster.ray_address = '{cluster.ray_address}' "
            f"({first_line(error)}): `ray start --head` starts one, and this machine must be a "
            "node of it"
        ) from error
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"Ray at '{cluster.ray_address}': {first_line(error)} ({_VERSION_HINT})"
        ) from error


def _keep_handler(number: signal.Signals) -> None:
    """Have Python handle a signal again as it was told to. Other threads cannot, and need not."""
    handler = signal.getsignal(number)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


async def disconnect() -> None:
    """Leave the Ray cluster: actors that are not detached end."""
    await asyncio.to_thread(ray.shutdown)


def node_resources() -> list[dict[str, float]]:
    """Return the total resources of each node that lives."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


async def process_names(namespace: str) -> list[str]:
    """Return the names of the processes that actors of a cluster's namespace run."""
    named = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    return [
        one["name"].removeprefix(PREFIX)
        for one in named
        if one["namespace"] == namespace and one["name"].startswith(PREFIX)
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which Ray follows with pages of advice."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
