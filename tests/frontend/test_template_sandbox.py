"""Hostile chat templates: each ends soon, in bounded memory, with an error that says what it did."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tercet.errors import ConfigError
from tercet.frontend.chat_template import ChatTemplateError, render_chat
from tercet.frontend.template_sandbox import MAX_SOURCE_CHARS

CHAT = [{"role": "user", "content": "hello"}]
MEMORY_BYTES = 1 << 30
TIME_S = 10 * 5  # the promise, with slack

NAMES = "{% set ns = namespace(a='x', l=[1], m=[1], t=(1,), d={'a': 1}, prev=none) %}"
BIG = NAMES + "{% set big = 'x' * 30000000 %}"
# Lists, tuples and dicts of 60 levels that hold themselves twice at each: small, but 2 ** 60 leaves to a walk.
SHARED = NAMES + (
    "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}"
    "{% set ns.t = (ns.t, ns.t) %}{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}"
)

TOO_LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "{{ ('{:>999999999}' | attr('format'))(1) }}",
    "{{ ('{0}' * 1000000).format('x' * 1000000) }}",
    "{{ (10**1000) ** (10**1000) }}",
    NAMES + "{% set ns.a = 3 %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "{{ ('f' * 30000000) | int(base=16) }}",
    "{{ 1.5 | round(10**9, 'floor') }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ ['a'] | map('center', 10**9) | list }}",
    "{% filter center(10**9) %}x{% endfilter %}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ ('a\n' * 100000) | indent('x' * 100000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "{{ range(100000) | join('x' * 1000000) }}",
    "{{ ('x' * 1000000).join((['a'] * 100000) | map('upper')) }}",
    "{{ ([{'a': 'x' * 1000000}] * 100000) | join(attribute='a') }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ ([1] * 100000) | tojson(separators=('x' * 1000000, ':')) }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ [1] | batch(10**10, 'x') | list }}",
    "{{ ([[1]] * 400000) | sum(start=[]) }}",
    "{{ ('ab ' * 10000000).split() }}",
    "{{ ('ab\n' * 10000000).splitlines() }}",
    "{{ ('ab\n' * 10000000) | list }}",
    "{{ ('a-' * 15000000) | title }}",
    "{{ strftime_now('%A' * 1000000) }}",
    NAMES + "{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    NAMES + "{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    NAMES + "{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set ns.l = ns.l + [big ~ i] %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set ns.prev = namespace(p=ns.prev, s=big[i:]) %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set ns.prev = namespace(p=ns.prev, s=big.upper()) %}{% endfor %}",
    "{% block a %}{{ 'x' * 30000000 }}{% endblock %}" + "{{ self.a() }}" * 2000,
    "{% set l = ['\U0010ffff' * 1000000] * 20 %}{% macro f() %}" + "{{ l }}" * 1000 + "{% endmacro %}{{ f() }}",
    *(
        SHARED + "{{ " + expression + " }}"
        for expression in (
            "ns.l", "'a' ~ ns.l", "ns.l | tojson", "ns.d", "ns.d.items()", "ns.l == ns.m", "ns.l in [ns.m]",
            "ns.l is eq(ns.m)", "[ns.l] | select('eq', ns.m) | list", "{ns.t: 1}", "{}[ns.t]", "{}[ns.l].x",
            "{}.get(ns.t)", "[ns.t] | unique | list", "'%s' % ns.l", "'{}'.format(ns.l)",
            "'{!r}'.format(ns.l)", "ns.l | join", "[ns.l].index(ns.m)", "[ns.l, ns.m] | sort", "ns.l | upper",
            "dict.fromkeys([ns.t])", "raise_exception(ns.l)", "messages | attr(ns.l)",
        )
    ),
]  # fmt: skip

TOO_LONG = [
    "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% set r = range(100000) %}{% set z %}{% for a in r %}{% for b in r %}xxxx{% endfor %}{% endfor %}{% endset %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    BIG + "{{ 'y' in big }}" * 10000,
]  # fmt: skip

CANNOT_BE_COMPILED = [
    "x" * (MAX_SOURCE_CHARS + 1),
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 1" + "+1" * 20000 + " }}",
    "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "{{ " + "9" * 5000 + " }}",
    "{{ 'a' | wordwrap(1) }}",
]


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    """A little more address space than there is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("template", TOO_LARGE + TOO_LONG, ids=lambda template: template[-60:])
def test_hostile_template_is_stopped(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"makes too|is over|pads to|took longer|at most|too long"):
        render_chat(template, CHAT)
    assert time.monotonic() - started < TIME_S
    assert render_chat("{{ messages[0].content + '!' }}", CHAT) == "hello!"  # the next one is not concerned


@pytest.mark.parametrize("template", CANNOT_BE_COMPILED, ids=range(len(CANNOT_BE_COMPILED)))
def test_template_that_cannot_be_compiled_is_an_error_of_the_argument(template: str) -> None:
    with pytest.raises(ConfigError, match="chat_template"):
        render_chat(template, CHAT)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("'a' * 3 + 'b' ~ 1 ~ none", "aaab1None"),
        ("'%05d|%-4s|' % (7, 'x')", "00007|x   |"),
        ("'{:>5}|{a!r}|{b[0]}'.format('x', a='y', b=[1])", "    x|'y'|1"),
        ("'a,b,c'.split(',', 1) | join('-')", "a-b,c"),
        ("[3, 1, 2] | sort | map('string') | join('+')", "1+2+3"),
        ("[{'v': 1}, {'v': 2}] | sum(attribute='v')", "3"),
        ("'a\\nb' | indent(2)", "a\n  b"),
        ("{'a': [1, {'b': '<'}]} | tojson(indent=1)", '{\n "a": [\n  1,\n  {\n   "b": "<"\n  }\n ]\n}'),
        ("2 ** 10 // 3 % 7", "5"),
        ("[1, 2, 3][1:] == [2, 3] and 'a' in 'abc' and (1, 2) not in {}.items()", "True"),
        ("'Hello World'.replace('o', '0').center(13, '*')", "*Hell0 W0rld*"),
        ("range(5) | batch(2) | list", "[[0, 1], [2, 3], [4]]"),
    ],
)
def test_expressions_give_what_jinja_gives(expression: str, text: str) -> None:
    assert render_chat("{{ " + expression + " }}", CHAT) == text


def test_loops_keep_their_length_and_neighbours() -> None:
    template = (
        "{% for a in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}"
        "{{ loop.previtem }}{% endfor %}{% for a in nope %}{% else %}none{% endfor %}"
        "{% for a in [[1, [2]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}"
    )
    assert render_chat(template, CHAT) == "1/3,2/3,13/3.2none12"
