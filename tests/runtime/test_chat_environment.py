"""Chat templates are programs of strangers: what they may do, and how long they may go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError

from vlmguard.graphs.errors import ModelUnreadable
from vlmguard.runtime.chat.chat_environment import MOST_REPEATED, MOST_TURNS, WORK, ChatEnvironment, Work
from vlmguard.runtime.chat.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]
TOO_MANY = f"more than {MOST_TURNS} turns of loops and calls"


def rendered(source: str, **values: object) -> str:
    environment = ChatEnvironment()
    return environment.bounded(environment.parse(source)).render({WORK: Work()}, **values)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for a in items %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}{% endfor %}", "1/2,2/2"),
        ("{% for a in items|reverse %}{{ a }}{% else %}none{% endfor %}", "yx"),
        ("{% for a in [] %}{{ a }}{% else %}none{% endfor %}", "none"),
        ("{% for a, b in {'k': 1}.items() %}{{ a }}{{ b }}{% endfor %}", "k1"),
        ("{% for a in items if a != 'x' %}{{ loop.index }}{{ a }}{% endfor %}", "1y"),
        ("{% for a in tree recursive %}{{ a.n }}{{ loop(a.of) }}{% endfor %}", "123"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{% for a in items %}{{ m(a) }}{% endfor %}", "<x><y>"),
        ("{{ 3 * 4 }} {{ 'ab' * 2 }} {{ 2 ** 10 }}", "12 abab 1024"),
        ("{% set ns = namespace(n=0) %}{% for a in range(5) %}{% set ns.n = ns.n + a %}{% endfor %}{{ ns.n }}", "10"),
    ],
)
def test_bounds_change_nothing_for_templates_within_them(source: str, expected: str) -> None:
    tree = [{"n": 1, "of": [{"n": 2, "of": []}]}, {"n": 3, "of": []}]
    assert rendered(source, items=["x", "y"], tree=tree) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ range(9999)|sum }}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
        "{% for a in range(9999)|map('string') %}{% for b in range(9999)|map('string') %}{% endfor %}{% endfor %}",
        "{% set vlmguard_work = 0 %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    ],
)
def test_what_goes_on_for_ever_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError, match=TOO_MANY):
        rendered(source)


@pytest.mark.parametrize("source", ["{{ 'x' * 10 ** 9 }}", "{{ 10 ** 9 * ['x'] }}", "{{ 9 ** (9 ** 9) }}"])
def test_what_multiplies_is_bounded(source: str) -> None:
    with pytest.raises(TemplateError, match=f"makes more than {MOST_REPEATED} of something"):
        rendered(source)


def test_a_model_with_such_a_template_is_refused_in_one_line(tmp_path: Path) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate.compile(tmp_path, source, {})
    with pytest.raises(ModelUnreadable) as told:
        template.render(HELLO)
    assert str(told.value) == (
        f"{tmp_path}: its chat template fails ({TOO_MANY}); use the chat template that belongs to this model"
    )


def test_each_rendering_has_its_own_bound(tmp_path: Path) -> None:
    template = ChatTemplate.compile(tmp_path, "{% for a in range(60000) %}{% endfor %}{{ messages[0].content }}", {})
    with pytest.raises(ModelUnreadable):  # the loop and the range that it goes through
        template.render(HELLO)
    template = ChatTemplate.compile(tmp_path, "{% for a in range(40000) %}{% endfor %}{{ messages[0].content }}", {})
    assert [template.render(HELLO) for _ in range(3)] == ["hello"] * 3
