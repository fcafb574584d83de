"""Instructor on a server: `use_instructor.py URL MODEL`; results as JSON."""

import json
import sys
from typing import Any

import instructor
from openai import OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]


class Weather(BaseModel):
    city: str
    degrees: int


def main() -> None:
    results: dict[str, Any] = {}
    question: Any = [{"role": "user", "content": "What is the weather?"}]
    for name, mode in [
        ("structured by a tool", instructor.Mode.TOOLS),
        ("structured", instructor.Mode.JSON_SCHEMA),
    ]:
        client = instructor.from_openai(
            OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode
        )
        asked: dict[str, Any] = {"model": MODEL, "messages": question, "max_retries": 0}
        found = client.chat.completions.create(response_model=Weather, **asked)
        results[name] = found.model_dump()
        parts = list(client.chat.completions.create_partial(response_model=Weather, **asked))
        results[f"{name}, streamed"] = parts[-1].model_dump()
        results[f"{name}, parts"] = len(parts) > 1
    print(json.dumps(results))


main()
