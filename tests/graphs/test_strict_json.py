"""JSON that every reader takes: no NaN, no infinity, no key twice."""

from __future__ import annotations

import json
import math

import pytest

from vlmguard.graphs.strict_json import from_strict_json, to_strict_json


def test_numbers_that_are_not_finite_become_null_wherever_they_stand() -> None:
    content = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan}, "e": "NaN", "f": True}
    text = to_strict_json(content)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [None, [1.5, None]], "c": {"d": None}, "e": "NaN", "f": True
    }  # fmt: skip
    assert from_strict_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ("[Infinity]", "Infinity is not a number in JSON"),
        ("[-Infinity]", "-Infinity is not a number in JSON"),
        ("[1e999]", "1e999 is too large for a number"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' is given twice"),
    ],
)
def test_what_json_does_not_allow_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        from_strict_json(text)
    assert str(raised.value) == reason
