"""Chats to text: a model's Jinja chat template, rendered in a sandbox.

Renders as transformers does (same Jinja settings and globals, and its filters but those that
`template_sandbox` leaves out), so that a template written for it gives the same text. Templates come with a
download or from whoever runs the engine, messages from clients: what a client sends is data for the template
and cannot stand in for the renderer's own arguments. Output, memory and time are limited.

Does not know tokens: the text is to be encoded without special tokens added.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from tercet.errors import ConfigError, ValidationError
from tercet.frontend.chat_messages import ContentForm, Message, normalize_messages, plain_data
from tercet.frontend.template_budget import Budget, TemplateLimitError, within
from tercet.frontend.template_sandbox import MAX_SOURCE_CHARS, BoundedSandbox
from tercet.frontend.validation import shown

MAX_RENDERED_CHARS = 32 << 20
MAX_RENDER_S = 10.0
_MAX_TIME_FORM_CHARS = 1000

# What the renderer itself gives to a template, or takes from its caller.
RENDERER_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "special_tokens",
        "tokenize",
        "tools",
    }
)
# Put at the end of the message that is to be continued, to find that place again in the rendered text.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(ValidationError):
    """The template refused the conversation (`raise_exception`), or failed on it."""


class _Refusal(jinja2.TemplateError):
    """A template called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote. Rendering just sees a scope."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_TIME_FORM_CHARS:
        raise TemplateLimitError("the chat template gives too long a form to strftime_now")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: Jinja's own filter would escape < > & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _make_environment() -> BoundedSandbox:
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.guard_filters(tojson=_tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _make_environment()


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """A chat template that is ready to run, and the form in which it takes a message's content."""

    template: jinja2.Template
    content_form: ContentForm


@functools.lru_cache(maxsize=64)
def compile_chat_template(source: str) -> CompiledTemplate:
    """Compile a template; kept for the next chat.

    Raises:
        ConfigError: the source is not a valid template.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise ConfigError("chat_template", f"has {len(source)} characters; at most {MAX_SOURCE_CHARS} may be")
    try:
        with within(Budget(MAX_RENDERED_CHARS, MAX_RENDER_S)):  # constant expressions are computed now
            form = _content_form(_ENVIRONMENT.parse(source))
            return CompiledTemplate(_ENVIRONMENT.from_string(source), form)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError("chat_template", f"line {error.lineno}: {error.message}") from None
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError) as error:
        problem = (
            f"cannot be compiled: {type(error).__name__}: {error!s:.200}"  # too deep, too large a number
        )
        raise ConfigError("chat_template", problem) from None


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    special_tokens: Mapping[str, str | list[str]] | None = None,
) -> str:
    """Render a conversation.

    Args:
        template: Jinja source; from the operator, never from a client.
        messages: objects with role and content; content is text or a list of text parts as OpenAI has them.
        tools: JSON schemas of the functions that the model may call.
        documents: objects with title and text, for retrieval.
        add_generation_prompt: end with the beginning of an answer.
        continue_final_message: end inside the last message, for the model to go on with it.
        chat_template_kwargs: further variables of the template.
        special_tokens: variables bos_token, eos_token and so on.

    Raises:
        ChatTemplateError: the template refuses the conversation, fails, takes over 10 s or gives over 32 Mi
            characters.
        ValidationError: an argument is malformed, not of JSON types, or names one of the renderer's own.
        ConfigError: the template is not valid Jinja.
    """
    if add_generation_prompt and continue_final_message:
        raise ValidationError(
            "continue_final_message", "cannot go with add_generation_prompt; set one of them to false"
        )
    special = dict(special_tokens or {})
    kwargs = _checked_kwargs(chat_template_kwargs or {}, special)
    compiled = compile_chat_template(template)
    chat = normalize_messages(messages, compiled.content_form)
    final_text = _tag_final_message(chat) if continue_final_message else ""
    variables = {
        **special,
        **kwargs,
        "messages": chat,
        "tools": _plain_list(tools, "tools"),
        "documents": _plain_list(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text = _run(compiled.template, variables)
    return _cut_at_tag(text, final_text) if continue_final_message else text


def _run(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    budget = Budget(MAX_RENDERED_CHARS, MAX_RENDER_S)
    num_chars = 0
    try:
        with within(budget):
            for piece in template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise TemplateLimitError(f"the chat is over {MAX_RENDERED_CHARS} characters long")
                budget.charge(1)
                pieces.append(piece)
    except TemplateLimitError as error:
        raise ChatTemplateError("messages", str(error)) from None
    except _Refusal as refusal:
        raise ChatTemplateError(
            "messages", f"refused by the chat template: {refusal.message!s:.2000}"
        ) from None
    except Exception as error:  # whatever a template does wrong is an error of this request
        raise _failure(error, variables["messages"]) from None
    return "".join(pieces)


def _failure(error: Exception, chat: Sequence[Mapping[str, Any]]) -> ChatTemplateError:
    """The usual cause by its name: text that the template takes for granted where a message has none."""
    for index, message in enumerate(chat):
        if message.get("content") is None:
            problem = 'this model\'s chat template cannot do without it; give text, "" where there is none'
            return ChatTemplateError(f"messages[{index}].content", f"{problem} ({error})")
    return ChatTemplateError("messages", f"the chat template failed: {type(error).__name__}: {error!s:.2000}")


def _checked_kwargs(kwargs: Mapping[str, Any], special_tokens: Mapping[str, object]) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise ValidationError("chat_template_kwargs", f"must be an object; got {shown(kwargs)}")
    for name in kwargs:
        if name in RENDERER_ARGUMENTS or name in special_tokens:
            raise ValidationError(f"chat_template_kwargs.{name}", "is set by the renderer; leave it out")
    plain: dict[str, Any] = plain_data(kwargs, "chat_template_kwargs")
    return plain


def _plain_list(items: Sequence[Mapping[str, Any]] | None, field: str) -> list[dict[str, Any]] | None:
    if items is None:
        return None
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise ValidationError(field, f"must be a list of objects; got {shown(items)}")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ValidationError(f"{field}[{index}]", f"must be an object; got {shown(item)}")
    return [plain_data(item, field) for item in items]


# Continuing the final message


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; returns that text as it was."""
    message = chat[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_TAG
        return content
    if isinstance(content, list) and content:
        text: str = content[-1]["text"]
        content[-1]["text"] = text + _CONTINUE_TAG
        return text
    raise ValidationError("continue_final_message", "the last message has no text to continue")


def _cut_at_tag(text: str, final_text: str) -> str:
    tag = _CONTINUE_TAG.rstrip()
    if tag not in text or final_text.strip() not in text:
        raise ValidationError(
            "continue_final_message",
            "the chat template leaves out the last message, which cannot be continued",
        )
    place = text.rindex(tag)
    if text.startswith(_CONTINUE_TAG, place):
        return text[:place]
    return text[:place].rstrip()  # the template trims messages, so the space before the tag goes as well


# How a template reads a message's content


def _content_form(tree: jinja2.nodes.Template) -> ContentForm:
    """A template that loops over the content takes parts; if it also asks `is string`, either."""
    aliases = {"content"}
    for assignment in tree.find_all(jinja2.nodes.Assign):
        target = assignment.target
        if isinstance(target, jinja2.nodes.Name) and _is_content(assignment.node, aliases):
            aliases.add(target.name)
    loops = any(_is_content(loop.iter, aliases) for loop in tree.find_all(jinja2.nodes.For))
    if not loops:
        return "string"
    asks = any(test.name == "string" for test in tree.find_all(jinja2.nodes.Test))
    return "either" if asks else "parts"


def _is_content(node: jinja2.nodes.Node | None, aliases: set[str]) -> bool:
    match node:
        case jinja2.nodes.Filter():
            return _is_content(node.node, aliases)
        case jinja2.nodes.Name():
            return node.name in aliases
        case jinja2.nodes.Getattr():
            return node.attr == "content"
        case jinja2.nodes.Getitem():
            return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
        case _:
            return False
