"""The OpenAI Agents SDK on a server: `use_openai_agents.py URL MODEL`; results as JSON."""

import asyncio
import json
import sys
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
asked: list[str] = []


class Weather(BaseModel):
    city: str
    degrees: int


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "rain"


def agent(**settings: Any) -> Agent:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return Agent("tester", model=OpenAIChatCompletionsModel(MODEL, client), **settings)


async def streamed(asking: Agent) -> dict[str, Any]:
    run = Runner.run_streamed(asking, "What is the weather?")
    kinds = [event.type async for event in run.stream_events()]
    return {"output": run.final_output, "raw": kinds.count("raw_response_event") > 3}


async def main() -> None:
    set_tracing_disabled(True)
    question = "What is the weather?"
    results: dict[str, Any] = {}
    results["plain"] = (await Runner.run(agent(), question)).final_output
    results["stream"] = (await streamed(agent()))["output"]
    results["tools"] = (await Runner.run(agent(tools=[weather]), question)).final_output
    results["stream of tools"] = await streamed(agent(tools=[weather]))
    required = ModelSettings(tool_choice="required")
    made = agent(tools=[weather], model_settings=required)
    results["required"] = (await Runner.run(made, question)).final_output
    named = ModelSettings(tool_choice="weather")
    made = agent(tools=[weather], model_settings=named)
    results["named"] = (await Runner.run(made, question)).final_output
    results["asked"] = asked
    structured = await Runner.run(agent(output_type=Weather), question)
    results["structured"] = structured.final_output.model_dump()
    both = await Runner.run(agent(output_type=Weather, tools=[weather]), question)
    results["structured and tools"] = both.final_output.model_dump()
    print(json.dumps(results))


asyncio.run(main())
