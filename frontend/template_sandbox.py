"""A sandbox for chat templates that bounds time and memory, besides what a template can reach.

A model's own template comes with its download, so it is hostile input. Jinja's sandbox keeps it from the rest of
the process, but one expression (`'a' * 10**10`, `'%999999999d' % 1`, a string that doubles itself, a list that
holds itself twice forty times over) may take all memory, or hold the interpreter for minutes where no clock is
looked at. Here whatever makes something large asks a `Budget` before it does:

- arithmetic, through Jinja's interception of operators; `~`, loops, slices, comparisons and dictionary keys,
  through filters that `_Guards` puts around them in the syntax tree;
- filters and methods, through a check for each that can make more than it was given;
- whatever walks a nested value to its leaves (text, JSON, comparison, hash), by counting the leaves first.

Filters and methods of no use in a prompt that cannot be bounded so are not there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, GeneratorType
from typing import Any, Final, cast

import jinja2
import jinja2.nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tercet.frontend.template_budget import CONTAINERS, TemplateLimitError, current_budget

MAX_SOURCE_CHARS: Final = 1 << 18
"""Of a template; those of models have up to 30,000."""
_ITEM: Final = 64  # units of a list's item
_CALL: Final = 512  # units of a call: what it makes may be an object of Python's
_MAX_WIDTH: Final = 10_000  # of padding, indents, batches, digits
_MAX_BITS: Final = 4096  # of an integer

_DROPPED_FILTERS: Final = (
    "filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
# Names of methods of text, bytes and numbers whose result is not bounded by what they are given.
_DROPPED_METHODS: Final = frozenset(
    {"encode", "expandtabs", "from_bytes", "maketrans", "striptags", "to_bytes", "translate", "unescape"}
)
# They look at items, not into them.
_SHALLOW_FILTERS: Final = frozenset(
    {"batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject",
     "rejectattr", "reverse", "select", "selectattr", "slice"}
)  # fmt: skip
_LINE_ENDS: Final = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_DIGITS = re.compile(r"\d+")


# Operators


def _check_int(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise TemplateLimitError("the chat template makes too large a number")


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        current_budget().text(len(left) + len(right))
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        current_budget().charge(_ITEM * (len(left) + len(right)))
    else:
        _check_int(left)
        _check_int(right)
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    for one, times in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(times, int):
            count = len(one) * max(times, 0)
            current_budget().text(count if isinstance(one, str) else _ITEM * count)
        _check_int(one)
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    _check_int(base)
    _check_int(exponent)
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise TemplateLimitError("the chat template makes too large a number")
    return base**exponent


def _divide_whole(left: Any, right: Any) -> Any:
    _check_int(left)
    return left // right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        return _format_percent(left, right)
    _check_int(left)
    return left % right


def _format_percent(form: str, values: Any) -> str:
    budget = current_budget()
    widths = [number for match in _PERCENT.finditer(form) for number in match.groups() if number]
    for number in widths:
        if number == "*" or len(number) > 5 or int(number) > _MAX_WIDTH:
            raise TemplateLimitError(f"the chat template pads to {number[:20]}; at most {_MAX_WIDTH} may be")
    size = budget.walk(values)
    if isinstance(values, Mapping):  # each place may name the same value
        size *= form.count("%")
    budget.text(len(form) + size + sum(map(int, widths)))
    return str(form % values)


# What the syntax tree is guarded with: filters that a template's source cannot name


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop."""
    budget = current_budget()
    for item in items:
        budget.charge(_ITEM)
        yield item


@jinja2.pass_eval_context
def _concat(eval_ctx: jinja2.nodes.EvalContext, items: list[Any]) -> str:
    """`a ~ b`."""
    budget = current_budget()
    if eval_ctx.autoescape:
        budget.charge(8 * sum(map(budget.walk, items)))
        return jinja2.runtime.markup_join(items)
    texts = [item if isinstance(item, str) else _text(item) for item in items]
    budget.text(sum(map(len, texts)))
    return "".join(texts)


def _sliced(value: Any) -> Any:
    """A slice, once it is there: it is no larger than what it was taken from."""
    if isinstance(value, (list, tuple)):
        current_budget().charge(_ITEM * len(value))
    elif isinstance(value, str):
        current_budget().charge(len(value))
    return value


def _walked(value: Any) -> Any:
    """What is compared or hashed."""
    budget = current_budget()
    if isinstance(value, CONTAINERS):
        budget.walk(value)
    else:
        budget.charge(len(value) // 8 if isinstance(value, str) else 1)
    return value


def _text(value: Any) -> str:
    """What is printed, as `str` makes it."""
    if isinstance(value, str):
        return value
    budget = current_budget()
    if isinstance(value, CONTAINERS):
        budget.walk(value)
        text = str(value)
        budget.text(len(text))
        return text
    return str(value)


_GUARDS: Final[Mapping[str, Callable[..., Any]]] = {
    " counted": _counted,
    " concat": _concat,
    " sliced": _sliced,
    " walked": _walked,
}


class _Guards(NodeTransformer):
    """Puts guards around what Jinja compiles to plain Python."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _guarded(" counted", cast("jinja2.nodes.Expr", node.iter))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(" concat", jinja2.nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice) and node.ctx == "load":
            return _guarded(" sliced", node)
        return node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, jinja2.nodes.Const):
                pair.key = _guarded(" walked", pair.key)
        return node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:  # noqa: N802
        """Comparing with a constant is short, but for looking for one in something long."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        long = [not isinstance(side, jinja2.nodes.Const) for side in sides]
        if all(long) or any(operand.op in ("in", "notin") for operand in node.ops):
            if long[0]:
                node.expr = _guarded(" walked", node.expr)
            for operand, is_long in zip(node.ops, long[1:], strict=True):
                if is_long and not isinstance(operand.expr, (jinja2.nodes.List, jinja2.nodes.Tuple)):
                    operand.expr = _guarded(" walked", operand.expr)
        return node


def _guarded(name: str, node: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# Filters and methods


def _num_lines(text: str) -> int:
    return 1 + sum(map(text.count, _LINE_ENDS))


def _check_width(*widths: Any) -> None:
    for width in widths:
        if isinstance(width, int) and abs(width) > _MAX_WIDTH:
            raise TemplateLimitError(f"the chat template pads to {width:.3g}; at most {_MAX_WIDTH} may be")


def _check_pad(text: Any, width: Any = 80, *_: Any) -> None:
    _check_width(width)


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _check_width(width)
    if isinstance(text, str):
        indent = len(width) if isinstance(width, str) else int(width)
        lines = _num_lines(text)
        current_budget().text(len(text) + lines * max(indent, 0))
        current_budget().charge(lines * _ITEM)


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = _text(text), _text(old), _text(new)
    count = text.count(old)
    current_budget().text(len(text) + count * max(len(new) - len(old), 0))


def _check_join(items: Any, separator: Any = "", attribute: Any = None) -> None:
    count = len(items) if hasattr(items, "__len__") else 0
    current_budget().text(current_budget().walk(items) + len(_text(separator)) * count)


def _check_split(text: str, separator: str | None = None, maxsplit: int = -1) -> None:
    pieces = len(text) // 2 + 1 if separator is None else text.count(separator) + 1
    current_budget().charge(_ITEM * (min(pieces, maxsplit + 1) if maxsplit >= 0 else pieces))


def _check_splitlines(text: str, *_: Any, **__: Any) -> None:
    current_budget().charge(_ITEM * _num_lines(text))


def _check_list(value: Any) -> None:
    if hasattr(value, "__len__"):
        current_budget().charge(_ITEM * len(value))


def _check_batch(items: Any, count: Any, *_: Any, **__: Any) -> None:
    _check_width(count)


def _check_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    _check_int(value)
    if isinstance(precision, int) and abs(precision) > 400:
        raise TemplateLimitError(f"the chat template rounds to {precision:.3g} digits; at most 400 may be")


def _check_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, *_: Any,
                **__: Any) -> None:  # fmt: skip
    if isinstance(indent, str):
        indent = len(indent)
    longest = max([indent or 0, *map(len, separators or ())])
    if longest > 64:
        raise TemplateLimitError(f"the chat template indents JSON by {longest:.3g}; at most 64 may be")


def _check_words(text: Any) -> None:
    """Of what cuts a text into pieces, short ones at worst."""
    if isinstance(text, str):
        current_budget().charge(_ITEM * len(text) // 2)


_FILTER_CHECKS: Final[Mapping[str, Callable[..., None]]] = {
    "batch": _check_batch,
    "center": _check_pad,
    "indent": _check_indent,
    "join": _check_join,
    "list": _check_list,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_batch,
    "title": _check_words,
    "tojson": _check_json,
    "wordcount": _check_words,
}
_METHOD_CHECKS: Final[Mapping[str, Callable[..., None]]] = {
    "center": _check_pad,
    "join": lambda text, items: _check_join(items, text),
    "ljust": _check_pad,
    "replace": _check_replace,
    "rjust": _check_pad,
    "rsplit": _check_split,
    "split": _check_split,
    "splitlines": _check_splitlines,
    "zfill": _check_pad,
}


def _result(value: Any) -> Any:
    """What a filter or call gave: long texts and lists are charged, generators are counted as they run."""
    if isinstance(value, str):
        current_budget().text(len(value))
    elif isinstance(value, (list, tuple)):
        current_budget().charge(_ITEM * len(value))
    elif isinstance(value, GeneratorType):
        return _counted(value)
    else:
        _check_int(value)
    return value


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its checks; `function` may take Jinja's context first."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    deep, check = name not in _SHALLOW_FILTERS, _FILTER_CHECKS.get(name)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.charge(_ITEM)
        given = args[skip:]
        if deep and given and isinstance(given[0], GeneratorType):
            given = (list(given[0]), *given[1:])
            args = (*args[:skip], *given)
        if deep or len(given) > 1 or kwargs:
            for value in (*given[0 if deep else 1 :], *kwargs.values()):
                if isinstance(value, CONTAINERS):
                    budget.walk(value)
        if check is not None:
            check(*given, **kwargs)
        return _result(function(*args, **kwargs))

    return guarded


def _guard_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        for value in args:
            _walked(value)
        return function(*args)

    return guarded


def _format_filter(form: Any, *args: Any, **kwargs: Any) -> str:
    """`'%s' | format(x)`."""
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments together")
    return _format_percent(_text(form), kwargs or args)


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment, items: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    """As Jinja's, adding as `+` does."""
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    for item in items:
        start = _add(start, item)
    return start


class _Namespace(Namespace):
    """Without its contents as text, which a chain of them could double at each link."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """`str.format`, field by field."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if any(len(number) > 5 or int(number) > _MAX_WIDTH for number in _DIGITS.findall(format_spec)):
            raise TemplateLimitError(
                f"the chat template pads to {format_spec:.20}; at most {_MAX_WIDTH} may be"
            )
        text: str = super().format_field(
            _text(value) if isinstance(value, CONTAINERS) else value, format_spec
        )
        current_budget().text(len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _walked(value)
        return super().convert_field(value, conversion)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates; both only `within` a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "//", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_text, **options)
        self.binop_table |= {
            "+": _add,
            "*": _multiply,
            "**": _power,
            "//": _divide_whole,
            "%": _modulo,
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters |= {"format": _format_filter, "sum": _sum}
        self.tests = {
            name: _guard_test(cast("Callable[..., Any]", test)) for name, test in self.tests.items()
        }
        self.guard_filters()

    def guard_filters(self, **more: Callable[..., Any]) -> None:
        """Add filters. The first call also guards those of Jinja."""
        if not more:
            more, self.filters = dict(self.filters), dict(_GUARDS)
        self.filters |= {name: _guard_filter(name, function) for name, function in more.items()}

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        code: str = super()._generate(_Guards().visit(source), *args, **kwargs)
        return code

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Of a macro's or a block's output."""
        budget, num_chars, kept = current_budget(), 0, []
        for piece in pieces:
            num_chars += len(piece)
            if num_chars > budget.max_chars:
                break
            kept.append(piece)
        budget.text(num_chars)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # nearly all there are
            current_budget().text(len(left) + len(right))
            return left + right
        return self.binop_table[operator](left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _DROPPED_METHODS and isinstance(obj, (str, bytes, int, float)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        current_budget().charge(_ITEM)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        budget = current_budget()
        budget.charge(_ITEM)
        if isinstance(argument, CONTAINERS):  # it may be hashed, or named in an error
            budget.walk(argument)
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.charge(_CALL + _ITEM * len(args))
        if not isinstance(obj, (Macro, LoopContext, type)):
            args = _checked_call(obj, args, kwargs)
        return _result(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or value.__name__ not in ("format", "format_map"):
            return None
        vformat = _Formatter(self).vformat

        def format_(*args: Any, **kwargs: Any) -> str:
            return vformat(str(owner), args, kwargs)

        def format_map(mapping: Mapping[str, Any]) -> str:
            return vformat(str(owner), (), mapping)

        return format_ if value.__name__ == "format" else format_map


def _checked_call(obj: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a method or function, a generator among them as a list."""
    budget = current_budget()
    args = tuple(list(value) if isinstance(value, GeneratorType) else value for value in args)
    for value in (*args, *kwargs.values()):
        if isinstance(value, CONTAINERS):
            budget.walk(value)
    owner = getattr(obj, "__self__", None)
    if isinstance(owner, str):
        budget.charge(len(owner))
        if (check := _METHOD_CHECKS.get(obj.__name__)) is not None:
            check(owner, *args, **kwargs)
    elif isinstance(obj, BuiltinMethodType) and isinstance(owner, (list, tuple)):  # index and count
        budget.walk(owner)
    return args
