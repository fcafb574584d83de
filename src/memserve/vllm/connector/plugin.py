"""The entry point `vllm.general_plugins`. vLLM loads it in each of its processes, so it imports
nothing until a connector is asked for."""

from __future__ import annotations


def register() -> None:
    """Make `"kv_connector": "MemServeConnector"` known to vLLM."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    known = getattr(KVConnectorFactory, "_registry", {})  # to register twice is an error there
    if "MemServeConnector" not in known:
        KVConnectorFactory.register_connector(
            "MemServeConnector", "memserve.vllm.connector.facade", "MemServeConnector"
        )
