"""Meaning of a chat's request for the prompt and for the answer: messages, tools and variables for
the chat template; the format of the answer, and the grammar of a call that is required."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec

from memserve.api.answer.format import AnswerFormat, Function, ReasoningFormat, ToolFormat
from memserve.api.answer.known_templates import HARMONY
from memserve.api.answer.parser import reads_all
from memserve.api.answer.reasoning import MARKERS
from memserve.api.errors import invalid
from memserve.api.generate import GenerateCall
from memserve.api.grammar import Grammar
from memserve.api.limits import (
    MAX_BEGUN_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    MAX_TOOL_CHARACTERS,
    MAX_VALUES,
)
from memserve.api.neutral import unsupported
from memserve.api.openai import ChatRequest, Message
from memserve.api.openai_tools import AllowedChoice, NamedChoice, Tool
from memserve.gateway.answer_grammar import (
    behind_reasoning,
    or_calls,
    schema_grammar,
    strict_calls,
)
from memserve.gateway.calls_schema import ANY_ARGUMENTS, calls_schema
from memserve.gateway.conversation import TEMPLATE_STEERING, ArgumentsDecoder
from memserve.gateway.harmony_grammar import Begun, begun_in, constrained
from memserve.gateway.model_formats import ModelFormats
from memserve.gateway.tool_text import in_text
from memserve.models.response_template import ResponseTemplate

# Variables that the request's own fields give the template.
_OWN_VARIABLES: Final = (
    *TEMPLATE_STEERING,
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
)


# Of the processor's time, to find where an answer begins in a prompt; a literal takes microseconds.
ANCHOR_SECONDS: Final = 0.02

# Behind the text of a message to continue: the rendered conversation is cut there. The text itself
# may be a part of what templates put behind a message. No client can know it.
_CUT: Final = f"\uf8ff{secrets.token_hex(16)}"


class ChatPlan(msgspec.Struct, frozen=True):
    """The prompt's parts, and what the answer is read with."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None
    answer: AnswerFormat | None = None
    callable: Sequence[Tool] = ()
    grammar: Grammar | None = None  # of a call that is required, but for harmony
    extended: bool = False
    opens_answer: bool = True  # the template adds what begins an answer
    continued: str | None = None  # the last message's text, which the answer continues
    template: ResponseTemplate | None = None  # the model's own
    strict: bool = False  # calls obey their schemas, also where none is required
    required: bool = False  # some call is

    def completed(self, text: str) -> str:
        """Return the rendered conversation as the prompt. Raises ApiError (400) if the message to
        continue is not in it."""
        if self.continued is None:
            return text
        end = text.find(_CUT)
        if end < 0:
            raise invalid(
                "The chat template changes the last message; it cannot be continued.",
                "continue_final_message",
            )
        return text[:end]

    def applied(self, call: GenerateCall, text: str) -> GenerateCall:
        """Return the call with this plan's answer. `text`: the prompt's. Raises ApiError (400) for
        constraints that do not go together."""
        answer = self.answer or _ALL_CONTENT
        grammar = self.grammar or call.sampling.grammar
        own = answer.tools is ToolFormat.RESPONSE_TEMPLATE
        if self.grammar is None and reads_all(answer) and not own:
            answer, grammar = self._in_harmony(answer, grammar, text)
        elif self.grammar is None and answer.functions:
            single = not answer.parallel
            if grammar is not None:
                grammar, form = or_calls(grammar, answer.tools, self.callable, single)
                answer = msgspec.structs.replace(answer, tools=form)
            elif self.strict:
                grammar = strict_calls(answer.tools, self.callable, single)
        elif grammar is not None and own:
            answer = msgspec.structs.replace(answer, tools=ToolFormat.NONE)
        if reads_all(answer):
            answer = self._begun(answer, text)
        elif answer.reasoning is not ReasoningFormat.NONE:
            answer = self._reasoning(answer, text)
        marked = answer.reasoning is not ReasoningFormat.NONE and not reads_all(answer)
        if grammar is not None and marked:
            begun = answer.reasoning_begun or answer.reasoning is ReasoningFormat.DEEPSEEK_R1
            grammar = behind_reasoning(grammar, answer.reasoning, begun)
        sampling = call.sampling
        if grammar is not sampling.grammar:
            sampling = msgspec.structs.replace(sampling, grammar=grammar)
        return msgspec.structs.replace(
            call,
            sampling=sampling,
            answer=None if answer == _ALL_CONTENT else answer,
            extended=self.extended,
        )

    def _in_harmony(
        self, answer: AnswerFormat, grammar: Grammar | None, text: str
    ) -> tuple[AnswerFormat, Grammar | None]:
        """Return format and grammar of an answer in harmony to this prompt. `grammar`: of its final
        message. Raises ApiError (400) for a prompt behind which there can be no such answer."""
        if grammar is None and not (self.required or self.strict):
            return answer, None
        begun = begun_in(HARMONY.begun(text, ANCHOR_SECONDS))
        if begun is Begun.FINAL and not self.required:
            return msgspec.structs.replace(answer, functions=()), grammar  # no call follows
        if begun in (Begun.FINAL, Begun.OTHER) or self.continued is not None:
            raise invalid(
                "The prompt has begun a message of the answer, behind which neither the call that "
                "'tool_choice' requires nor a constrained answer can stand; in harmony, only a "
                "final message can be continued with a constraint, and without a required call.",
                "tool_choice" if self.continued is None else "continue_final_message",
            )
        return answer, constrained(grammar, self.callable, self.required, begun)

    def _begun(self, answer: AnswerFormat, text: str) -> AnswerFormat:
        """Return the format of an answer to this prompt, which a template reads."""
        own = answer.tools is ToolFormat.RESPONSE_TEMPLATE and self.template is not None
        template = self.template if own and self.template is not None else HARMONY
        begun = template.begun(text, ANCHOR_SECONDS)[-MAX_BEGUN_CHARACTERS:]
        return msgspec.structs.replace(answer, begun=begun)

    def _reasoning(self, answer: AnswerFormat, text: str) -> AnswerFormat:
        """Return the format of an answer to this prompt."""
        begin, end = MARKERS[answer.reasoning]
        said = self.continued
        if said is not None:
            begun = said.rfind(begin) > said.rfind(end)
            if not begun:
                return msgspec.structs.replace(answer, reasoning=ReasoningFormat.NONE)
        else:
            begun = text.rstrip().endswith(begin)
        return msgspec.structs.replace(answer, reasoning_begun=begun)


_ALL_CONTENT = AnswerFormat()


# Of a request and of a message: what is not plain text. A chat has many messages: one look at each.
_beyond_text = attrgetter(
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "continue_final_message",
)
_NONE_OF_THEM: Final = (None,) * 7
_beside_content = attrgetter("tool_calls", "tool_call_id", "reasoning", "reasoning_content")
_NOTHING_BESIDE: Final = (None,) * 4


def is_plain(request: ChatRequest) -> bool:
    """Return whether a request has messages of plain text alone, and nothing else that concerns a
    chat template."""
    if _beyond_text(request) != _NONE_OF_THEM:
        return False
    for message in request.messages:
        if _beside_content(message) != _NOTHING_BESIDE or message.role == "tool":
            return False
    return True


def plan_chat(request: ChatRequest, formats: ModelFormats) -> ChatPlan:
    """Return the plan of a request. Raises ApiError (400) that names the field at fault."""
    decode = ArgumentsDecoder().decode
    messages = [_template_message(message, decode) for message in request.messages]
    opens = request.add_generation_prompt is not False
    if is_plain(request):
        plain = _answer(formats)
        return ChatPlan(
            messages,
            answer=None if plain == _ALL_CONTENT else plain,
            opens_answer=opens,
            template=formats.template,
        )
    tools, allowed, answer, grammar, forced = _tools(request, formats)
    rendered = [_template_tool(tool) for tool in tools]
    if formats.in_text:
        messages, rendered = in_text(messages, rendered), []
    variables = _variables(request)
    continued: str | None = None
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise invalid(
                "'continue_final_message' and 'add_generation_prompt' exclude each other.",
                "continue_final_message",
            )
        opens, continued = False, str(messages[-1]["content"])
        if not continued.strip():
            raise invalid(
                "'continue_final_message' needs a last message with text.",
                "continue_final_message",
            )
        messages = [*messages[:-1], {**messages[-1], "content": f"{continued.rstrip()}{_CUT}"}]
    return ChatPlan(
        messages,
        rendered or None,
        variables,
        answer,
        allowed,
        grammar,
        is_extended(request),
        opens,
        continued,
        formats.template,
        any(tool.function.strict for tool in allowed),
        forced,
    )


def is_extended(request: ChatRequest) -> bool:
    """Return whether a vLLM server that is told token ids alone would lack something."""
    return bool(
        request.tools
        or request.chat_template_kwargs
        or request.documents
        or request.reasoning_effort is not None
        or request.include_reasoning is not None
        or request.continue_final_message
        or any(message.role == "tool" or message.tool_calls for message in request.messages)
    )


def _template_message(message: Message, decode: Callable[[str], object]) -> dict[str, Any]:
    # OpenAI's role "developer" is "system" in chat templates.
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": decode(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:  # templates read either name
        rendered["reasoning_content"] = rendered["reasoning"] = reasoning
    return rendered


def _template_tool(tool: Tool) -> dict[str, Any]:
    """Return a tool as Transformers gives it to templates."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}


def _tools(
    request: ChatRequest, formats: ModelFormats
) -> tuple[Sequence[Tool], Sequence[Tool], AnswerFormat, Grammar | None, bool]:
    """Return the tools to tell the model of, those that it may call, the answer's format and
    grammar, and whether a call is required."""
    tools, choice = request.tools or (), request.tool_choice
    answer = msgspec.structs.replace(
        _answer(formats), include_reasoning=request.include_reasoning is not False
    )
    if not tools:
        return (), (), answer, None, False
    _check_tools(tools)
    if choice == "none":
        return (), (), answer, None, False
    allowed, forced = _allowed(request, tools)
    form = formats.tools if formats.template is None else ToolFormat.RESPONSE_TEMPLATE
    grammar: Grammar | None = None
    single = request.parallel_tool_calls is False
    named = isinstance(choice, NamedChoice)
    in_harmony = form is ToolFormat.OPENAI  # whose grammar depends on the prompt
    if named and not in_harmony:
        form = ToolFormat.JSON_ARGUMENTS
        grammar = schema_grammar(allowed[0].function.parameters or ANY_ARGUMENTS)
    elif forced and not in_harmony:
        form = ToolFormat.JSON_CALLS
        grammar = schema_grammar(calls_schema(allowed, single))
    functions = tuple([_function(tool, form) for tool in allowed])
    answer = msgspec.structs.replace(
        answer, tools=form, functions=functions, parallel=not single, named=named
    )
    return tools, allowed, answer, grammar, forced


def _answer(formats: ModelFormats) -> AnswerFormat:
    """Return the format of answers to chats without tools."""
    tools = ToolFormat.NONE if formats.template is None else ToolFormat.RESPONSE_TEMPLATE
    return AnswerFormat(tools, reasoning=formats.reasoning)


def _allowed(request: ChatRequest, tools: Sequence[Tool]) -> tuple[Sequence[Tool], bool]:
    """Return the tools that may be called, and whether one has to be."""
    choice = request.tool_choice
    if isinstance(choice, NamedChoice):
        names, forced = {choice.function.name}, True
    elif isinstance(choice, AllowedChoice):
        names = {each.function.name for each in choice.allowed_tools.tools}
        forced = choice.allowed_tools.mode == "required"
    else:
        return tools, choice == "required"
    allowed = [tool for tool in tools if tool.function.name in names]
    if unknown := names - {tool.function.name for tool in allowed}:
        raise invalid(f"'tool_choice' names '{min(unknown)}', which is no tool.", "tool_choice")
    return allowed, forced


# Formats that may not tell texts from numbers.
_WITHOUT_QUOTES: Final = (
    ToolFormat.QWEN3_CODER,
    ToolFormat.GLM45,
    ToolFormat.RESPONSE_TEMPLATE,
)


def _function(tool: Tool, form: ToolFormat) -> Function:
    if form not in _WITHOUT_QUOTES:
        return Function(tool.function.name)
    properties = (tool.function.parameters or {}).get("properties")
    texts = [
        name
        for name, schema in (properties.items() if isinstance(properties, dict) else ())
        if isinstance(schema, dict) and _is_text(schema)
    ]
    return Function(tool.function.name, tuple(texts[:MAX_VALUES]))


def _is_text(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    if isinstance(kind, list):
        return "string" in kind
    if kind is None and isinstance(values := schema.get("enum"), list):
        return all(isinstance(value, str) for value in values)
    return kind == "string"


def _check_tools(tools: Sequence[Tool]) -> None:
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("Two tools have the same name.", "tools")
    if len(msgspec.json.encode(tools)) > MAX_TOOL_CHARACTERS:
        raise invalid(f"'tools' has more than {MAX_TOOL_CHARACTERS} characters.", "tools")


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Return the template's variables. Raises ApiError (400) for names that are not the client's
    to give."""
    given = request.chat_template_kwargs or {}
    for name in _OWN_VARIABLES:
        if name in given:
            raise unsupported(f"chat_template_kwargs.{name}")
    if given and len(msgspec.json.encode(given)) > MAX_TEMPLATE_CHARACTERS:
        raise invalid(
            f"'chat_template_kwargs' has more than {MAX_TEMPLATE_CHARACTERS} characters.",
            "chat_template_kwargs",
        )
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:  # as in vLLM
        variables["reasoning_effort"] = request.reasoning_effort
        variables["enable_thinking"] = request.reasoning_effort != "none"
    if request.documents:
        variables["documents"] = request.documents
    return variables | given
