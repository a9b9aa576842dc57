"""Chats rendered as transformers renders them, and no further than a client may go."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tercet.errors import ConfigError, ValidationError
from tercet.frontend import chat_template
from tercet.frontend.chat_template import ChatTemplateError, compile_chat_template, render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# As in the default model's file.
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

CHATML_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {%- if not loop.last %}{{ '\\n' }}{% endif %}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(calls=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' and loop.previtem is defined and loop.previtem.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role }}
    {%- if message.content %}{{ '\\n' ~ message.content | trim }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.calls = ns.calls + 1 %}
        {{- '\\n<tool_call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson(indent=2)) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{%- if enable_thinking is not defined %}{% set enable_thinking = 'unset' %}{% endif %}
{{- '(' ~ ns.calls ~ ' calls, thinking ' ~ enable_thinking ~ ')' }}
"""

LLAMA3 = """
{{- bos_token }}
{% if not date_string is defined %}
    {% set date_string = strftime_now('%Y') %}
{% endif %}
{% for message in messages %}
    {%- if loop.index0 == 12 %}{% break %}{% endif %}
    {{- '<|header|>' + message['role'] + '<|end_header|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}{{ '[' + part['text'] + ']' }}{% endfor %}
    {%- endif %}
    {% generation %}{{- '<|eot|>' }}{% endgeneration %}
{% endfor %}
{% if documents %}{{ documents | map(attribute='title') | join(', ') }}{% endif %}
{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}
{{ date_string }}
"""

ALTERNATING = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant, got <' ~ m.role ~ '>') }}{% endif %}\
{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}\
{% endfor %}"""

PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
)

TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml_tools": CHATML_TOOLS,
    "llama3": LLAMA3,
    "alternating": ALTERNATING,
}

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "  What is <b>1 & 1</b>?\n"},
    {"role": "assistant", "content": 'It\'s "2" — naïve 你好'},
    {"role": "user", "content": "Go on  "},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "get", "arguments": {"city": "Köln <3", "n": [1]}}}
        ],
    },
    {"role": "tool", "content": "12°"},
    {"role": "tool", "content": "skipped"},
    {"role": "assistant", "content": "It is 12°."},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get", "parameters": {"city": {"type": "string"}}}}
]
DOCUMENTS = [{"title": "One", "text": "1"}, {"title": "Two", "text": "2"}]


def theirs(template: str, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**kwargs.pop("chat_template_kwargs", {}), **SPECIAL, **kwargs}
    chats = [[dict(message) for message in messages]]
    result: Any = render_jinja_template(chats, chat_template=template, **variables)  # its annotation is wrong
    text: str = result[0][0]
    return text


def ours(template: str, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    kwargs.setdefault("add_generation_prompt", False)
    return render_chat(template, messages, special_tokens=SPECIAL, **kwargs)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_reads_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    options = {"add_generation_prompt": add_generation_prompt}
    assert ours(TEMPLATES[name], CHAT, **options) == theirs(TEMPLATES[name], CHAT, **options)


@pytest.mark.parametrize("name", ["chatml_tools", "llama3"])
def test_tools_documents_and_variables_read_as_in_transformers(name: str) -> None:
    chat = CALLS if name == "chatml_tools" else CHAT
    options: dict[str, Any] = {
        "tools": TOOLS,
        "documents": DOCUMENTS,
        "add_generation_prompt": True,
        "chat_template_kwargs": {"enable_thinking": False, "date_string": "today"},
    }
    text = ours(TEMPLATES[name], chat, **options)
    assert text == theirs(TEMPLATES[name], chat, **options)
    assert ("thinking False" if name == "chatml_tools" else "today") in text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("start", ["The answer", "trailing space ", "  both  ", "a\n"])
def test_final_message_is_continued_as_in_transformers(name: str, start: str) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": start}]
    text = ours(TEMPLATES[name], chat, continue_final_message=True)
    assert text == theirs(TEMPLATES[name], chat, continue_final_message=True)
    assert text.rstrip().endswith(start.strip())
    assert chat[-1]["content"] == start  # the caller's messages stay as they were


def test_final_message_of_parts_is_continued() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [CHAT[0], {"role": "assistant", "content": parts}]
    text = ours(LLAMA3, chat, continue_final_message=True)
    assert text == theirs(LLAMA3, chat, continue_final_message=True)
    assert text.endswith("[one][two")


@pytest.mark.parametrize(
    ("template", "content", "shown"),
    [
        (SMOLLM2, "plain", "plain"),
        (SMOLLM2, [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"], "a\nb\nc"),
        (SMOLLM2, [{"type": "refusal", "refusal": "no"}], "no"),
        (LLAMA3, "plain", "plain"),
        (LLAMA3, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "[a][b]"),
        (PARTS_ONLY, "plain", "<plain>"),
        (PARTS_ONLY, [{"type": "text", "text": "a"}, {"text": "b"}], "<a><b>"),
    ],
)
def test_content_takes_the_form_that_the_template_reads(template: str, content: object, shown: str) -> None:
    assert shown in ours(template, [{"role": "user", "content": content}])


def test_parts_are_found_behind_a_variable_and_a_macro() -> None:
    variable = (
        "{% for m in messages %}{% set c = m['content'] %}"
        "{% for p in c %}<{{ p.text }}>{% endfor %}{% endfor %}"
    )
    macro = (
        "{% macro show(content) %}{% for p in content %}<{{ p.text }}>{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}"
    )
    for template in (variable, macro):
        assert ours(template, [{"role": "user", "content": "x"}]) == "<x>"


def test_json_text_of_tool_call_arguments_is_parsed() -> None:
    as_text = json.loads(json.dumps(CALLS))
    function = as_text[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert ours(CHATML_TOOLS, as_text) == ours(CHATML_TOOLS, CALLS)


def test_reasoning_goes_by_any_of_its_names() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert ours(template, [{"role": "assistant", "content": "", name: "hm"}]) == "hm"


# What is refused, and how


def test_template_refusing_a_chat_is_an_error_of_the_request() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate user/assistant, got <assistant>"):
        ours(ALTERNATING, CHAT[1:])


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
             "chat_template", "bos_token"],
)  # fmt: skip
def test_clients_cannot_set_the_renderers_arguments(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"chat_template_kwargs\.{name}: is set by the renderer"):
        ours(SMOLLM2, CHAT, chat_template_kwargs={name: True})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages: is empty"),
        ("hi", "messages: must be a list"),
        (["hi"], r"messages\[0\]: must be an object"),
        ([{"content": "hi"}], r"messages\[0\]\.role: must be a string .*; it is missing"),
        ([{"role": "", "content": "hi"}], r"messages\[0\]\.role: must be a string .*; got ''"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]\.role: must be a string .*; got \['user'\]"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\]\.content: is missing; give text, such as \"Hello\""),
        ([{"role": "user", "content": None, "name": "me"}], r"messages\[0\]\.content: is null; give text"),
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\]\.content: is missing; give text"),
        ([{"role": "tool", "tool_call_id": "1"}], r"messages\[0\]\.content: is missing; give text"),
        ([{"role": "user", "content": {"text": "x"}}], r"messages\[0\]\.content: must be a string or a list"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"content\[0\]\.type: is \['text'\], but"),
        ([{"role": "user", "content": [{"type": "refusal"}]}], r"content\[0\]\.refusal: must be a string"),
        ([CHAT[0], {"role": "user", "content": 5}], r"messages\[1\]\.content: must be a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
         r"messages\[0\]\.content\[0\]\.type: is 'image_url', but this model takes text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text: must be"),
        ([{"role": "user", "content": [7]}], r"messages\[0\]\.content\[0\]: must be an object"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]: must be made of JSON types"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: is not valid JSON"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"messages\[0\]\.tool_calls\[0\]: must be an object"),
    ],
)  # fmt: skip
def test_malformed_messages_are_named(messages: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ours(SMOLLM2, messages)


def test_template_that_needs_text_where_there_is_none_names_the_message() -> None:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for message in (called, {**called, "content": None}):
        with pytest.raises(
            ChatTemplateError, match=r"messages\[1\]\.content: this model's chat template cannot"
        ):
            ours("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", [CHAT[0], message])
    assert "user" in ours(SMOLLM2, [CHAT[0], {**called, "content": ""}])


def test_deeply_nested_message_is_refused() -> None:
    nested: Any = "x"
    for _ in range(200):
        nested = [nested]
    with pytest.raises(ValidationError, match="nested deeper"):
        ours(SMOLLM2, [{"role": "user", "content": "x", "extra": nested}])


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", ["x", [5], {"a": 1}])
def test_malformed_tools_and_documents_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        ours(SMOLLM2, CHAT, **{name: value})


def test_continuing_and_prompting_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="continue_final_message: cannot go with"):
        ours(SMOLLM2, CHAT, add_generation_prompt=True, continue_final_message=True)


def test_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(ValidationError, match="leaves out the last message"):
        ours("{{ messages[0].content }}", CHAT, continue_final_message=True)
    with pytest.raises(ValidationError, match="no text to continue"):
        ours(CHATML_TOOLS, CALLS[:2], continue_final_message=True)


def test_invalid_template_names_its_line() -> None:
    with pytest.raises(ConfigError, match="chat_template: line 2"):
        compile_chat_template("\n{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ self._TemplateReference__context.environment.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ no_such_variable.attribute }}",
        "{{ 1 / 0 }}",
        "{% include 'other' %}",
    ],
)
def test_templates_reach_nothing_outside_the_sandbox(template: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template failed"):
        ours(template, CHAT)


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert len(ours(template, [{"role": "user", "content": "x" * 100}] * 10)) == 1000
    with pytest.raises(ChatTemplateError, match="over 1000 characters"):
        ours(template, [{"role": "user", "content": "x" * 100}] * 11)


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.05)
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="longer than"):
        ours(template, CHAT)
    assert ours("fine", CHAT) == "fine"
