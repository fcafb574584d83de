"""From a chat with tools to the prompt, and to the format and grammar of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from memserve.api.answer.format import AnswerFormat, Function, ReasoningFormat, ToolFormat
from memserve.api.errors import ApiError
from memserve.api.generate import GenerateCall
from memserve.api.grammar import Grammar, GrammarKind
from memserve.api.limits import MAX_DEPTH, MAX_TEMPLATE_CHARACTERS, MAX_TOOL_CHARACTERS
from memserve.api.status import Limits
from memserve.config import ModelConfig, ReasoningParser, ToolCallParser
from memserve.gateway.call_builder import CallBuilder
from memserve.gateway.model_formats import ModelFormats, formats_of
from memserve.models.chat_template import DEFAULT_CHAT_TEMPLATE
from memserve.models.tokenizer import Tokenizer
from tests.fakes import MODEL, tiny_tokenizer

LIMITS = Limits(
    vocab_size=320,
    max_model_len=4096,
    pool_tokens=4096,
    max_tokens=4096,
    block_tokens=16,
    dtype="float32",
    device="cpu",
    threads=1,
    max_waiting=64,
)
# Shows all that a template is given, and knows a switch for reasoning.
TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c | tojson }}{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %};"
    "{% endfor %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% if add_generation_prompt %}[answer]{% if enable_thinking %}<think>\n{% endif %}"
    "{% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "note": {"type": ["string", "null"]},
    },
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS},
}
ADD = {"type": "function", "function": {"name": "add", "strict": False}}
TOOLS = [WEATHER, ADD]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def tokenizer(template: str) -> Tokenizer:
        if template not in made:
            directory: Path = tmp_path_factory.mktemp("tokenizer")
            made[template] = tiny_tokenizer(directory, template)
        return made[template]

    return tokenizer


class Asked:
    """What becomes of a request."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig | None = None) -> None:
        self._tokenizer = tokenizer
        self._formats = formats_of(config or ModelConfig(), tokenizer)

    async def __call__(self, **fields: Any) -> tuple[str, GenerateCall]:
        """The prompt's text, and the call."""
        builder = CallBuilder(self._tokenizer, MODEL, 1, self._formats)
        try:
            body = json.dumps({"messages": HI, **fields}).encode()
            call = await builder.chat(body, LIMITS)
        finally:
            builder.close()
        return self._tokenizer.decode(call.prompts[0].tolist()), call


@pytest.fixture
def ask(tokenizer_of: Callable[[str], Tokenizer]) -> Asked:
    return Asked(tokenizer_of(TEMPLATE))


@pytest.fixture
def ask_directly(tokenizer_of: Callable[[str], Tokenizer]) -> Asked:
    """A model without reasoning."""
    return Asked(tokenizer_of(TEMPLATE), ModelConfig(reasoning_parser="none"))


async def test_the_template_gets_tools_as_transformers_gives_them(ask: Asked) -> None:
    text, call = await ask(tools=TOOLS)
    told = [
        {"type": "function", "function": {**WEATHER["function"]}},  # type: ignore[dict-item]
        {"type": "function", "function": {"name": "add"}},
    ]
    assert text.startswith(f"TOOLS {json.dumps(told, ensure_ascii=False)}\n[user]hi")
    assert call.answer == AnswerFormat(
        ToolFormat.HERMES, (Function("weather"), Function("add")), reasoning=ReasoningFormat.QWEN3
    )
    assert call.sampling.grammar is None
    assert call.own_engine


async def test_calls_and_their_results_come_decoded(ask: Asked) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "add", "arguments": "{a"}}
    text, asked = await ask(
        messages=[
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call, broken]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
        ]
    )
    decoded = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert text == (
        f"[user]hi;[assistant]<tool_call>{json.dumps(decoded)}<tool_call>{json.dumps(broken)};"
        "[tool]2(call_1);[answer]"
    )
    assert asked.answer == AnswerFormat(reasoning=ReasoningFormat.QWEN3)
    assert asked.own_engine  # a server with token ids alone would not know


async def test_none_is_neither_told_of_tools_nor_read_for_calls(ask: Asked) -> None:
    text, call = await ask(tools=TOOLS, tool_choice="none")
    assert text == "[user]hi;[answer]"
    assert call.answer is not None
    assert call.answer.functions == ()
    assert call.own_engine


async def test_required_gives_a_list_of_calls(ask_directly: Asked) -> None:
    text, call = await ask_directly(tools=TOOLS, tool_choice="required")
    assert text.startswith("TOOLS")
    functions = (Function("weather"), Function("add"))
    assert call.answer == AnswerFormat(ToolFormat.JSON_CALLS, functions)
    assert _schema(call) == {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": "weather"}, "parameters": PARAMETERS},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"name": {"const": "add"}, "parameters": {"type": "object"}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                },
            ]
        },
    }
    _, single = await ask_directly(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert _schema(single)["maxItems"] == 1
    assert single.answer is not None
    assert not single.answer.parallel


def _schema(call: GenerateCall) -> Any:
    grammar = call.sampling.grammar
    assert isinstance(grammar, Grammar)
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    return json.loads(grammar.source)


async def test_a_named_function_gives_its_arguments(ask_directly: Asked) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    _, call = await ask_directly(tools=TOOLS, tool_choice=choice)
    assert call.answer == AnswerFormat(
        ToolFormat.JSON_ARGUMENTS, (Function("weather"),), named=True
    )
    assert _schema(call) == PARAMETERS


async def test_some_of_the_tools_may_be_allowed(ask_directly: Asked) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    choice: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"tools": [named]}}
    choice["allowed_tools"]["mode"] = "auto"
    text, call = await ask_directly(tools=TOOLS, tool_choice=choice)
    assert "weather" in text  # the prompt stays, and its KV
    assert call.answer is not None
    assert call.answer.functions == (Function("add"),)
    assert call.sampling.grammar is None
    choice["allowed_tools"]["mode"] = "required"
    _, call = await ask_directly(tools=TOOLS, tool_choice=choice)
    assert _schema(call)["items"]["properties"]["name"] == {"const": "add"}


async def test_references_of_schemas_lead_where_they_did(ask_directly: Asked) -> None:
    nodes = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "$ref": {"type": "string"}},
        "$defs": {"node": {"type": "object", "properties": {"up": {"$ref": "#"}}}},
    }
    tools = [ADD, {"type": "function", "function": {"name": "link", "parameters": nodes}}]
    _, call = await ask_directly(tools=tools, tool_choice="required")
    schema = _schema(call)
    there = schema["items"]["anyOf"][1]["properties"]["parameters"]
    assert there == {"$ref": "#/$defs/1"}
    assert schema["$defs"] == {
        "1": {
            "type": "object",
            "properties": {
                "root": {"$ref": "#/$defs/1/$defs/node"},
                "$ref": {"type": "string"},
            },
            "$defs": {"node": {"type": "object", "properties": {"up": there}}},
        }
    }


async def test_where_the_prompt_begins_the_reasoning_the_answer_is_in_it(ask: Asked) -> None:
    text, call = await ask(chat_template_kwargs={"enable_thinking": True})
    assert text.endswith("[answer]<think>\n")
    assert call.answer == AnswerFormat(reasoning=ReasoningFormat.QWEN3, reasoning_begun=True)
    _, call = await ask(chat_template_kwargs={"enable_thinking": True}, include_reasoning=False)
    assert call.answer is not None
    assert not call.answer.include_reasoning
    _, call = await ask()
    assert call.answer == AnswerFormat(reasoning=ReasoningFormat.QWEN3)
    assert not call.own_engine  # plain: any member takes it


@pytest.mark.parametrize(("effort", "end"), [("none", "[answer]"), ("low", "[answer]<think>\n")])
async def test_effort_is_the_template_s(ask: Asked, effort: str, end: str) -> None:
    text, _ = await ask(reasoning_effort=effort)
    assert text == f"[user]hi;effort {effort}\n{end}"


async def test_a_required_call_comes_behind_the_reasoning(ask: Asked) -> None:
    asked = {"tools": [ADD], "tool_choice": "required"}
    text, call = await ask(**asked, chat_template_kwargs={"enable_thinking": True})
    assert text.endswith("[answer]<think>\n")
    assert call.answer is not None
    assert call.answer.reasoning_begun
    form = _tags(call)
    assert form["type"] == "sequence"
    reasoning, _, answer = form["elements"]
    assert (reasoning["begin"], reasoning["content"], reasoning["end"]) == (
        "",
        {"type": "any_text"},
        "</think>",
    )
    assert answer["json_schema"]["items"]["properties"]["name"] == {"const": "add"}
    # Where the prompt leaves it open, both are possible.
    _, call = await ask(**asked)
    form = _tags(call)
    assert form["type"] == "or"
    assert form["elements"][0] == answer
    assert form["elements"][1]["elements"][0]["begin"] == "<think>"


def _tags(call: GenerateCall) -> Any:
    grammar = call.sampling.grammar
    assert isinstance(grammar, Grammar)
    assert grammar.kind is GrammarKind.STRUCTURAL_TAG
    return json.loads(grammar.source)["format"]


async def test_reasoning_can_be_sent_back(ask: Asked) -> None:
    for name in ("reasoning", "reasoning_content"):
        text, _ = await ask(messages=[*HI, {"role": "assistant", "content": "yes", name: "why"}])
        assert "[assistant]yes<think>why</think>" in text


async def test_the_last_message_can_be_continued(ask: Asked) -> None:
    messages = [*HI, {"role": "assistant", "content": " Once upon "}]
    text, call = await ask(messages=messages, continue_final_message=True)
    assert text == "[user]hi;[assistant] Once upon"
    assert call.answer is None  # it is past the reasoning
    messages = [*HI, {"role": "assistant", "content": "<think>I see"}]
    _, call = await ask(messages=messages, continue_final_message=True)
    assert call.answer == AnswerFormat(reasoning=ReasoningFormat.QWEN3, reasoning_begun=True)


def _deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def _tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [_tool(parameters=_deep(MAX_DEPTH))]}, "tools"),
        ({"tools": [_tool(parameters=_deep(900))]}, "tools"),
        ({"tools": [_tool(description="x" * MAX_TOOL_CHARACTERS)]}, "tools"),
        ({"tools": [_tool(parameters=[])]}, "tools"),
        (
            {
                "tools": [_tool(parameters={"description": "x" * 300_000})],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": _deep(MAX_DEPTH)}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * MAX_TEMPLATE_CHARACTERS}}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            {"continue_final_message": True, "messages": [{"role": "user", "content": " "}]},
            "continue_final_message",
        ),
    ],
)
async def test_a_refusal_names_what_is_wrong(
    ask: Asked, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        await ask(**fields)
    assert (refused.value.status, refused.value.detail.param) == (400, param)


async def test_arguments_too_deep_for_a_template_are_refused(ask: Asked) -> None:
    function = {"name": "add", "arguments": json.dumps(_deep(900))}
    call = {"id": "1", "type": "function", "function": function}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ApiError) as refused:
        await ask(messages=messages)
    assert (refused.value.status, refused.value.detail.param) == (400, "messages")


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


async def test_a_template_that_knows_no_tools_is_told_in_text(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    ask = Asked(tokenizer_of(PLAIN))
    function = {"name": "add", "arguments": '{"a": 1}'}
    call = {"id": "1", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": "Be kind."},
        *HI,
        {"role": "assistant", "content": "Yes.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "1", "content": "two"},
        {"role": "user", "content": "and?"},
    ]
    text, asked = await ask(messages=messages, tools=TOOLS)
    system, rest = text.split("[user]hi")
    assert system.startswith("[system]Be kind.\n\n")
    assert json.dumps({"type": "function", "function": {"name": "add"}}) in system
    assert rest == (
        '[assistant]Yes.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "[user]<tool_response>\none\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response>\nand?"
    )
    assert asked.answer is not None
    assert asked.answer.tools is ToolFormat.HERMES
    text, _ = await ask(tools=TOOLS)  # some templates know no system role
    assert text.startswith("[user]You may call functions.")
    assert text.endswith("\n\nhi")
    # Whoever names another format has told the model of it.
    ask = Asked(tokenizer_of(PLAIN), ModelConfig(tool_call_parser="pythonic"))
    text, asked = await ask(tools=TOOLS)
    assert text == "[user]hi"
    assert asked.answer is not None
    assert asked.answer.tools is ToolFormat.PYTHONIC


async def test_without_a_parser_calls_are_content(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    ask = Asked(
        tokenizer_of(TEMPLATE), ModelConfig(tool_call_parser="none", reasoning_parser="none")
    )
    text, call = await ask(tools=TOOLS)
    assert text.startswith("TOOLS")
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.NONE
    _, call = await ask()
    assert call.answer is None
    # A choice that a grammar makes sure of needs none.
    _, call = await ask(tools=TOOLS, tool_choice="required")
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.JSON_CALLS


@pytest.mark.parametrize(
    ("template", "model_type", "expected"),
    [
        ("{{ tools }}<tool_call>", None, ToolFormat.HERMES),
        ("{{ tools }}<tool_call><function=", "qwen3_moe", ToolFormat.QWEN3_CODER),
        ("{{ tools }}[TOOL_CALLS]", None, ToolFormat.MISTRAL),
        ("{{ tools }}<|python_tag|>", None, ToolFormat.LLAMA3_JSON),
        ("{{ tools }}<|python_start|>", None, ToolFormat.PYTHONIC),
        ("{{ tools }}<｜tool▁calls▁begin｜>```json", None, ToolFormat.DEEPSEEK_V3),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "deepseek_v3", ToolFormat.DEEPSEEK_V31),
        ("{{ tools }}<tool_call><arg_key>", None, ToolFormat.GLM45),
        ("{{ tools }}<|tool_call|>", None, ToolFormat.GRANITE),
        ("{{ tools }}<|tool_call_argument_begin|>", None, ToolFormat.KIMI_K2),
        ("{{ tools }}", "llama", ToolFormat.LLAMA3_JSON),
        ("{{ tools }}", "glm4_moe", ToolFormat.GLM45),
        ("{{ tools }}", "kimi_k2", ToolFormat.KIMI_K2),
        ("{{ tools }}", "mistral", ToolFormat.MISTRAL),
        ("{{ tools }}<tool_call>", "llama", ToolFormat.HERMES),  # a fine-tune
        ("{{ tools }}", "unheard_of", ToolFormat.HERMES),
        ("{{ messages }}", "llama", ToolFormat.HERMES),  # told in text
        (DEFAULT_CHAT_TEMPLATE, None, ToolFormat.HERMES),
    ],
)
def test_auto_goes_by_template_and_type(
    tmp_path: Path, template: str, model_type: str | None, expected: ToolFormat
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = tiny_tokenizer(tmp_path, template)
    formats = formats_of(ModelConfig(), tokenizer)
    assert (formats.tools, formats.reasoning) == (expected, ReasoningFormat.NONE)
    assert formats.in_text is ("tools" not in template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ m.content.split('</think>') }}", ReasoningFormat.QWEN3),
        ("[THINK][/THINK]", ReasoningFormat.MISTRAL),
        ("plain", ReasoningFormat.NONE),
    ],
)
def test_auto_finds_the_reasoning_in_the_template(
    tokenizer_of: Callable[[str], Tokenizer], template: str, expected: ReasoningFormat
) -> None:
    assert formats_of(ModelConfig(), tokenizer_of(template)).reasoning is expected
    fixed = ModelConfig(reasoning_parser="deepseek_r1")
    assert formats_of(fixed, tokenizer_of(template)).reasoning is ReasoningFormat.DEEPSEEK_R1


def test_a_template_of_its_own_for_tools_is_used(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }}<tool_call>"},
    ]
    tokenizer = tiny_tokenizer(tmp_path, named)  # type: ignore[arg-type]
    assert tokenizer.apply_chat_template(HI) == "plain"
    assert tokenizer.apply_chat_template(HI, tools=TOOLS) == "2<tool_call>"
    assert not formats_of(ModelConfig(), tokenizer).in_text
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0] }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template(HI) == "jinja"
    assert tokenizer.apply_chat_template(HI, tools=["a"]) == "a"


HARMONY = (
    "{{ tools }}{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "<|end|>{% endfor %}<|start|>assistant<|channel|>"
)


@pytest.fixture
def ask_harmony(tokenizer_of: Callable[[str], Tokenizer]) -> Asked:
    return Asked(tokenizer_of(HARMONY))


async def test_harmony_is_read_by_one_template(ask_harmony: Asked) -> None:
    _, call = await ask_harmony()
    plain = AnswerFormat(reasoning=ReasoningFormat.OPENAI, begun="<|channel|>")
    assert call.answer == plain
    _, call = await ask_harmony(tools=TOOLS)
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.OPENAI
    assert call.sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, ["weather", "add"]),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            ["add"],
        ),
        ({"response_format": {"type": "json_object"}}, ["final"]),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, ["add", "final"]),
        ({"tools": [{**ADD, "function": {"name": "add", "strict": True}}]}, ["add", "final"]),
    ],
)
async def test_what_must_be_in_harmony_is_its_own(
    ask_harmony: Asked, fields: dict[str, Any], ends: list[str]
) -> None:
    _, call = await ask_harmony(**fields)
    assert call.answer is not None
    assert call.answer.tools is (ToolFormat.OPENAI if "tools" in fields else ToolFormat.NONE)
    *before, last = _tags(call)["elements"]
    assert [each["type"] for each in before] == ["optional", "optional"]  # it may think first
    assert len(last["elements"]) == len(ends)
    for end, tag in zip(ends, last["elements"], strict=True):
        assert end in tag["begin"]


# As gpt-oss's: an answer opens its channel itself, and those of earlier turns are final.
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{{ channel or '<|channel|>final' }}{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
JSON_ANSWER = {"response_format": {"type": "json_object"}}
STRICT_ADD = {"tools": [{**ADD, "function": {"name": "add", "strict": True}}]}
BEGUN_MESSAGE = [*HI, {"role": "assistant", "content": "Here:"}]


@pytest.mark.parametrize(("template", "marker"), [(HARMONY, False), (GPT_OSS, True)])
async def test_a_grammar_in_harmony_goes_on_where_the_prompt_ends(
    tokenizer_of: Callable[[str], Tokenizer], template: str, marker: bool
) -> None:
    for fields in (JSON_ANSWER, STRICT_ADD, {"tools": [ADD], "tool_choice": "required"}):
        _, call = await Asked(tokenizer_of(template), ModelConfig(tool_call_parser="openai"))(
            **fields
        )
        elements = _tags(call)["elements"]
        assert ({"type": "const_string", "value": "<|channel|>"} in elements) == marker
        for tag in elements[-1]["elements"]:
            assert not tag["begin"].startswith("<|")


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        (JSON_ANSWER, Grammar(GrammarKind.JSON_OBJECT, "", param="response_format")),
        (
            {**JSON_ANSWER, "tools": TOOLS},
            Grammar(GrammarKind.JSON_OBJECT, "", param="response_format"),
        ),
        (STRICT_ADD, None),
    ],
)
async def test_a_final_message_in_harmony_goes_on_with_the_grammar_alone(
    tokenizer_of: Callable[[str], Tokenizer], fields: dict[str, Any], grammar: Grammar | None
) -> None:
    ask = Asked(tokenizer_of(GPT_OSS), ModelConfig(tool_call_parser="openai"))
    text, call = await ask(messages=BEGUN_MESSAGE, continue_final_message=True, **fields)
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>Here:")
    assert call.sampling.grammar == grammar
    assert call.answer is not None
    assert call.answer.functions == ()
    assert call.answer.begun == "<|channel|>final<|message|>Here:"


@pytest.mark.parametrize(
    ("fields", "channel"),
    [
        ({"tools": [ADD], "tool_choice": "required"}, "<|channel|>final"),
        (JSON_ANSWER, "<|channel|>analysis"),
        (STRICT_ADD, "<|channel|>commentary"),
        (JSON_ANSWER, "<|channel|>final<|message|>a<|end|>"),
    ],
)
async def test_no_constraint_in_harmony_holds_behind_any_other_message(
    tokenizer_of: Callable[[str], Tokenizer], fields: dict[str, Any], channel: str
) -> None:
    ask = Asked(tokenizer_of(GPT_OSS), ModelConfig(tool_call_parser="openai"))
    asked = {
        "messages": BEGUN_MESSAGE,
        "continue_final_message": True,
        "chat_template_kwargs": {"channel": channel},
    }
    await ask(**asked)  # without a constraint, any message can be continued
    with pytest.raises(ApiError, match="in harmony") as refused:
        await ask(**asked, **fields)
    assert (refused.value.status, refused.value.detail.param) == (400, "continue_final_message")


TEMPLATED: dict[str, Any] = {
    "start_anchor": "[answer]",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open": "<call>", "close": "</call>", "content": "json"},
        "content": {},
    },
}


def _own(tmp_path: Path, config: ModelConfig | None = None) -> Asked:
    """A model with a response template."""
    tiny_tokenizer(tmp_path, TEMPLATE)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "response_template": TEMPLATED}))
    return Asked(Tokenizer.load(tmp_path), config)


async def test_a_model_s_own_response_template_reads_its_answers(tmp_path: Path) -> None:
    ask = _own(tmp_path)
    _, call = await ask()
    own, thinks = ToolFormat.RESPONSE_TEMPLATE, ReasoningFormat.QWEN3
    assert call.answer == AnswerFormat(own, reasoning=thinks)
    _, call = await ask(tools=[WEATHER], chat_template_kwargs={"enable_thinking": True})
    function = Function("weather", ("city", "unit", "note"))
    assert call.answer == AnswerFormat(own, (function,), reasoning=thinks, begun="<think>\n")
    # What a grammar decides is written as the grammar says.
    _, call = await ask(tools=[WEATHER], tool_choice="required")
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.JSON_CALLS
    _, call = await ask(response_format={"type": "json_object"})
    assert call.answer == AnswerFormat(reasoning=thinks)
    _, call = await ask(tools=[WEATHER], response_format={"type": "json_object"})
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.JSON_CALLS


async def test_a_parser_that_is_named_goes_before_the_model_s_own(tmp_path: Path) -> None:
    ask = _own(tmp_path, ModelConfig(tool_call_parser="hermes"))
    _, call = await ask(tools=[WEATHER])
    assert call.answer is not None
    assert call.answer.tools is ToolFormat.HERMES


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]


@pytest.mark.parametrize("parallel", [True, False])
async def test_strict_functions_bring_a_grammar_along(
    tokenizer_of: Callable[[str], Tokenizer], parallel: bool
) -> None:
    asked = {"tools": [STRICT, ADD], "parallel_tool_calls": parallel}
    for parser in get_args(ToolCallParser):
        if parser in ("auto", "none"):
            continue
        config = ModelConfig(tool_call_parser=parser, reasoning_parser="none")
        _, call = await Asked(tokenizer_of(TEMPLATE), config)(**asked)
        if parser in ("pythonic", "qwen3_coder", "glm45"):  # their arguments are no JSON
            assert call.sampling.grammar is None
        else:
            source = json.dumps(_tags(call))
            assert source.count(json.dumps(PARAMETERS)) == 1
            assert source.count('{"type": "object"}') == 1  # of the other function


@pytest.mark.parametrize("name", ["GET_NAME", "NAME", "NAME_IN_JSON", "A_NAME_IN_JSON_NAME"])
async def test_a_function_s_name_stands_in_the_grammar_as_it_is(
    tokenizer_of: Callable[[str], Tokenizer], name: str
) -> None:
    tool = {"type": "function", "function": {"name": name, "strict": True}}
    for parser in get_args(ToolCallParser):
        if parser in ("auto", "none", "pythonic", "qwen3_coder", "glm45"):
            continue
        config = ModelConfig(tool_call_parser=parser, reasoning_parser="none")
        _, call = await Asked(tokenizer_of(TEMPLATE), config)(tools=[tool])
        _, other = await Asked(tokenizer_of(TEMPLATE), config)(
            tools=[{"type": "function", "function": {"name": "weather", "strict": True}}]
        )
        assert call.sampling.grammar is not None
        assert other.sampling.grammar is not None
        expected = other.sampling.grammar.source.replace("weather", name)
        assert call.sampling.grammar.source == expected


def test_settings_are_the_formats_names() -> None:
    made = {ToolFormat.JSON_CALLS, ToolFormat.JSON_ARGUMENTS}  # by requests alone
    found = {ToolFormat.RESPONSE_TEMPLATE}  # in a model's files
    assert set(get_args(ToolCallParser)) == {"auto", *(set(ToolFormat) - made - found)}
    assert set(get_args(ReasoningParser)) == {"auto", *ReasoningFormat}


async def test_parameters_that_are_texts_are_known_where_the_format_does_not_say(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    ask = Asked(tokenizer_of(TEMPLATE), ModelConfig(tool_call_parser="qwen3_coder"))
    _, call = await ask(tools=TOOLS)
    assert call.answer is not None
    assert call.answer.functions == (
        Function("weather", ("city", "unit", "note")),
        Function("add"),
    )


def test_the_formats_of_no_model_are_none() -> None:
    assert ModelFormats() == ModelFormats(ToolFormat.NONE, ReasoningFormat.NONE, False)
