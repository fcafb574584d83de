"""LiteLLM on a server: `use_litellm.py URL MODEL`; results as JSON."""

import json
import sys
from typing import Any

import litellm
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class Weather(BaseModel):
    city: str
    degrees: int


def ask(provider: str, messages: list[Any], **fields: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL}",
        api_base=f"{URL}/v1",
        api_key="none",
        messages=messages,
        num_retries=0,
        **fields,
    )


def main() -> None:
    results: dict[str, Any] = {}
    for provider in ("openai", "hosted_vllm"):
        question: list[Any] = [{"role": "user", "content": "What is the weather?"}]
        told: dict[str, Any] = {}
        told["plain"] = ask(provider, question).choices[0].message.content
        chunks = list(ask(provider, question, stream=True))
        told["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        message = ask(provider, question, tools=TOOLS).choices[0].message
        answers = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in message.tool_calls
        ]
        told["tools"] = (
            ask(provider, [*question, message.model_dump(), *answers], tools=TOOLS)
            .choices[0]
            .message.content
        )
        chunks = list(ask(provider, question, tools=TOOLS, stream=True))
        whole = litellm.stream_chunk_builder(chunks, messages=question)
        told["stream of tools"] = [
            [call.function.name, json.loads(call.function.arguments)]
            for call in whole.choices[0].message.tool_calls
        ]
        for name, choice in [
            ("required", "required"),
            ("named", {"type": "function", "function": {"name": "weather"}}),
        ]:
            message = ask(provider, question, tools=TOOLS, tool_choice=choice).choices[0].message
            told[name] = [
                [call.function.name, json.loads(call.function.arguments)]
                for call in message.tool_calls
            ]
        structured = ask(provider, question, response_format=Weather).choices[0].message.content
        told["structured"] = json.loads(structured)
        results[provider] = told
    print(json.dumps(results))


main()
