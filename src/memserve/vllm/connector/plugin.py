"""The entry point `vllm.general_plugins`. vLLM calls it in each of its processes, so the connector
itself is imported only when vLLM asks for it."""

from __future__ import annotations


def register() -> None:
    """Make `"kv_connector": "MemServeConnector"` known to vLLM."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    known = getattr(KVConnectorFactory, "_registry", {})  # registering a name twice is an error
    if "MemServeConnector" not in known:
        KVConnectorFactory.register_connector(
            "MemServeConnector", "memserve.vllm.connector.facade", "MemServeConnector"
        )
