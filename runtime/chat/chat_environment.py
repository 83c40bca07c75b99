"""The dialect of jinja that chat templates are written in: that of transformers' `apply_chat_template`, with bounds.

The sandbox keeps a template from our objects, not from going on for ever. So loops and calls are counted (`Work`), and what
multiplies is bounded. Real templates go through some hundred turns, one for each message, part and tool. Filters, formats and
constants that the compiler folds can still ask for any amount of time and memory: templates are compiled and rendered in a
confined process (`confined`), and `compiled` is what runs there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...graphs.clock import wall_clock

MOST_TURNS = 100_000
MOST_REPEATED = 1_000_000  # characters or items of a product
LONGEST_TEXT = 16 << 20  # characters of a rendered conversation: some million tokens
WORK = "vlmguard_work"  # a name in the context's globals, which no template can set
_BOUNDED = "vlmguard_bounded"


@dataclass(frozen=True)
class Compiled:
    """A template and every text that stands in it."""

    template: Template
    literals: tuple[str, ...]

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises whatever the template raises; TemplateError for a text that is too long."""
        text = self.template.render({WORK: Work()}, **values)
        if len(text) > LONGEST_TEXT:
            raise TemplateError(f"it writes {len(text)} characters, more than {LONGEST_TEXT}")
        return text


@lru_cache(maxsize=8)
def compiled(source: str) -> Compiled:
    """Raises TemplateError or RecursionError for what is not a template."""
    environment = ChatEnvironment()
    tree = environment.parse(source)
    written = [node.data for node in tree.find_all(nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return Compiled(environment.bounded(tree), (*written, *constants))


class Work:
    """Counter of loop iterations and calls of one rendering."""

    def __init__(self) -> None:
        self.turns = 0

    def turn(self, turns: int = 1) -> None:
        """Raises TemplateError beyond the bound."""
        self.turns += turns
        if self.turns > MOST_TURNS:
            raise TemplateError(f"more than {MOST_TURNS} turns of loops and calls")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Templates are made by `bounded`, and rendered with `{WORK: Work()}`."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        self.filters["tojson"] = _tojson
        self.filters[_BOUNDED] = _bounded
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: wall_clock().astimezone().strftime(pattern)

    def bounded(self, tree: nodes.Template) -> Template:
        """The template of a syntax tree, whose loops are changed to be counted."""
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _BOUNDED, [], [], None, None, lineno=loop.lineno)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        work = __context.parent[WORK]
        work.turn()
        if isinstance(__obj, LoopContext):  # a recursive loop goes down a level
            args = tuple(_counted(work, items) for items in args)
        made = super().call(__context, __obj, *args, **kwargs)
        if isinstance(made, range):  # which a filter may go through without a loop
            work.turn(len(made))
        return made

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result; a result above the size limit is an error.

        Args:
            context, operator, left, right: as for jinja's method.
        """
        if _size(operator, left, right) > MOST_REPEATED:
            raise TemplateError(f"{operator} makes more than {MOST_REPEATED} of something")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """Size of the result: items of a sequence, digits of a number."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
    if operator == "*":
        many, sequence = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(many, int) and isinstance(sequence, (str, list, tuple)):
            return many * len(sequence)
    return 0


@pass_context
def _bounded(context: Context, items: Iterable[Any]) -> Iterator[Any] | list[Any]:
    return _counted(context.parent[WORK], items)


def _counted(work: Work, items: Iterable[Any]) -> Iterator[Any] | list[Any]:
    if not isinstance(items, Sized):
        return _turns(work, items)
    work.turn(len(items))  # all at once: `loop.length` and `loop.last` need the length
    return list(items)


def _turns(work: Work, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        work.turn()
        yield item


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own filter escapes for HTML, which would put `\\u003c` into prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; here it just prints them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
