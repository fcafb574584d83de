"""Registering with a gateway, and again whenever a new gateway is there."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import msgspec

from memserve.api.status import JoinRequest

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0  # between registrations; a gateway that knows the instance ignores them
JOIN_TIMEOUT = aiohttp.ClientTimeout(total=JOIN_SECONDS)


async def keep_joined(gateway: str, address: str) -> None:
    """Register `address` with the gateway at URL `gateway`, every few seconds, until cancelled."""
    url = f"{gateway.rstrip('/')}/cluster/members"
    body = msgspec.json.encode(JoinRequest(address))
    async with aiohttp.ClientSession(timeout=JOIN_TIMEOUT) as session:
        while True:
            try:
                async with session.post(url, data=body) as answer:
                    if answer.status != 200:
                        log.warning("%s refuses %s: %s", url, address, await answer.text())
            except (aiohttp.ClientError, TimeoutError) as error:
                log.debug("%s cannot be reached: %s", url, error)
            await asyncio.sleep(JOIN_SECONDS)
