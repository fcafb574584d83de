"""A model that does what its prompt asks for, by a script: it calls the first tool that it is told
of, tells a tool's result, and fills in the schema that its answer has to obey."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from memserve.engine.request import EngineRequest
from memserve.models.tokenizer import Tokenizer
from tests.fakes import FakeEngine

EOS = 1
TOKENS = 16_384  # tools have many, where a token is a character
PLAIN = "Hello! 你好 👍"
FOUND = "It is so: "
TEXT, NUMBER = "Oslo", 21

_TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def scripted_engine(tokenizer: Tokenizer, **settings: Any) -> FakeEngine:
    """An engine on which the model runs. It asks for tools in Hermes' format."""

    def answer(request: EngineRequest) -> Sequence[int]:
        prompt = tokenizer.decode(request.prompt.tolist())
        grammar = request.sampling.grammar
        said = answer_to(prompt, None if grammar is None else grammar.source)
        ids = tokenizer.encode(said, add_special_tokens=False)
        if request.grammar is not None:
            matcher = request.grammar.matcher()
            for token_id in ids:
                matcher.accept(token_id)
            assert matcher.allowed()[1], f"no whole text of the grammar: {said}"
        return [*ids, EOS]

    return FakeEngine(
        **{"answer": answer, "max_model_len": TOKENS, "pool_tokens": TOKENS, **settings}
    )


def answer_to(prompt: str, schema: str | None = None) -> str:
    """What the model says. `schema`: the JSON schema that the answer obeys, or a structural tag of
    such an answer or calls."""
    results = _RESULT.findall(prompt)
    told_results = results and prompt.rindex("</tool_response>") > prompt.rfind("</tool_call>")
    lead = "I look.\n"
    whole = json.loads(schema or "{}")
    if "format" in whole:  # calls are possible, too
        whole = whole["format"]
        if not told_results or "elements" not in whole:  # without: beside any text
            schema, lead = None, ""
        else:
            whole = whole["elements"][0]["json_schema"]
    if schema is not None:
        choices = whole.get("items", {}).get("anyOf", [])
        if choices and told_results:  # the last tool is the one that takes the answer
            return json.dumps([example_of(choices[-1], whole)], ensure_ascii=False)
        return json.dumps(example_of(whole, whole), ensure_ascii=False)
    if told_results:
        return FOUND + "; ".join(results)
    told = _TOOLS.search(prompt)
    if told is None:
        return PLAIN
    function = json.loads(told[1].splitlines()[0])["function"]
    parameters = function.get("parameters", {"type": "object"})
    call = {"name": function["name"], "arguments": example_of(parameters, parameters)}
    return f"{lead}<tool_call>\n{json.dumps(call)}\n</tool_call>"


def example_of(schema: Any, whole: Any) -> Any:
    """A value that obeys a schema, with every property. `whole`: where references lead."""
    if "$ref" in schema:
        found = whole
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return example_of(found, whole)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return example_of(schema[word][0], whole)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_of(each, whole) for name, each in properties.items()}
    if kind == "array":
        return [example_of(schema.get("items", {"type": "string"}), whole)]
    return {"string": TEXT, "integer": NUMBER, "number": 21.5, "boolean": True, "null": None}[kind]
