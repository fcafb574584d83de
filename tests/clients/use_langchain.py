"""LangChain on a server: `use_langchain.py URL MODEL`; results as JSON."""

import json
import sys
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def conversation(model: Any) -> str:
    """A question, the tool's call, its result, and the answer."""
    messages: list[BaseMessage] = [HumanMessage("What is the weather?")]
    answer = model.invoke(messages)
    messages.append(answer)
    messages += [
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        for call in answer.tool_calls
    ]
    return model.invoke(messages).content


def main() -> None:
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_retries=0)
    question = "What is the weather?"
    results: dict[str, Any] = {}
    results["plain"] = model.invoke(question).content
    results["stream"] = "".join(chunk.content for chunk in model.stream(question))
    results["tools"] = conversation(model.bind_tools([weather]))
    whole = None
    for chunk in model.bind_tools([weather]).stream(question):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    results["stream of tools"] = [[call["name"], call["args"]] for call in whole.tool_calls]
    required = model.bind_tools([weather], tool_choice="any").invoke(question)
    results["required"] = [[call["name"], call["args"]] for call in required.tool_calls]
    named = model.bind_tools([weather], tool_choice="weather").invoke(question)
    results["named"] = [[call["name"], call["args"]] for call in named.tool_calls]
    by_tool = model.with_structured_output(Weather, method="function_calling")
    results["structured by a tool"] = by_tool.invoke(question).model_dump()
    native = model.with_structured_output(Weather, method="json_schema")
    results["structured"] = native.invoke(question).model_dump()
    print(json.dumps(results))


main()
