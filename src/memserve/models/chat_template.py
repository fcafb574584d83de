"""Chat templates: render messages as the text that the model continues.

Templates come with models, so they are untrusted code. They run in Jinja's immutable sandbox,
with the few helpers that Transformers offers (source: transformers.utils.chat_template_utils),
and see only request data and the special tokens' text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memserve.errors import ModelError, RequestError

# For models without a template of their own. Line breaks separate all parts, so that an answer
# sent back in the next turn's messages continues the same token prefix.
DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ {'user': 'User', 'assistant': 'Assistant'}[message['role']] | default('System') }}:
{{ message['content'] }}

{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{% endif -%}
"""
# A model without a template was not taught where an answer ends: with this one it would write the
# other side's messages, too, up to the end of its context. With the empty line before it, if there
# is one, the longer stop string counts: the answer is what the next turn's messages have.
DEFAULT_CHAT_STOPS = tuple(
    f"{breaks}{role}:" for role in ("User", "Assistant", "System") for breaks in ("\n\n", "\n")
)
DEFAULT_CHAT_TOKENS = 256


class ChatTemplate:
    """A compiled template. Raises ModelError if the source is not a valid template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as text.

        `tools`: in OpenAI's format. `variables`: further variables of the template. Raises
        RequestError if the template refuses the messages, for example roles that do not
        alternate.
        """
        try:
            return self._template.render(
                {"documents": None, **(variables or {})},
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **self._special_tokens,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # A template is a program over the client's input: it may fail with any of these.
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


class _GenerationBlocks(Extension):
    """The tag `{% generation %}`, which marks answers for training: renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters; models were not trained on such text.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
