"""Pydantic AI on a server: `use_pydantic_ai.py URL MODEL`; results as JSON."""

import asyncio
import json
import sys
from collections.abc import AsyncIterable
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:]
asked: list[str] = []


class Weather(BaseModel):
    city: str
    degrees: int


def agent(**settings: Any) -> Agent[None, Any]:
    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    return Agent(OpenAIChatModel(MODEL, provider=provider), **settings)


def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "rain"


async def streamed(asking: Agent[None, Any]) -> str:
    async with asking.run_stream("What is the weather?") as run:
        return "".join([text async for text in run.stream_text(delta=True)])


async def main() -> None:
    question = "What is the weather?"
    results: dict[str, Any] = {}
    results["plain"] = (await agent().run(question)).output
    results["stream"] = await streamed(agent())
    results["tools"] = (await agent(tools=[weather]).run(question)).output
    kinds: list[str] = []

    async def heard(context: object, events: AsyncIterable[Any]) -> None:
        kinds.extend([event.event_kind async for event in events])

    told = await agent(tools=[weather]).run(question, event_stream_handler=heard)
    results["stream of tools"] = [told.output, kinds.count("part_delta") > 3]
    results["asked"] = asked
    by_tool = await agent(output_type=Weather).run(question)
    results["structured by a tool"] = by_tool.output.model_dump()
    both = await agent(output_type=Weather, tools=[weather]).run(question)
    results["structured by a tool, and tools"] = both.output.model_dump()
    native = await agent(output_type=NativeOutput(Weather)).run(question)
    results["structured"] = native.output.model_dump()
    print(json.dumps(results))


asyncio.run(main())
