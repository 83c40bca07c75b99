"""Unsupported parameters of `/v1/chat/completions`, and their neutral values.

Clients send many of them by default. A neutral value is accepted and any other value is rejected: a caller who requests two
answers or a tool must not silently receive something else. docs/serving.md has this table as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .http_errors import ApiError

# parameter -> values that ask for what is done anyway; `null` always does
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Notes of the caller's own, which no answer depends on.
NOTES = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key"})
# Of messages: what an answer of this API carries when it is sent back.
MESSAGE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}


def without_neutral(
    given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, at: str = ""
) -> dict[str, Any]:
    """A request or message without its unsupported parameters.

    Args:
        given: the request or message.
        neutral: unsupported parameters and their neutral values.
        at: prefix of the parameter's name in errors.

    Raises:
        ApiError: 400 for a value that is not neutral.
    """
    left = {}
    for name, value in given.items():
        if name not in neutral:
            left[name] = value
        elif value is not None and not any(
            value == same and type(value) is type(same) for same in _numbers(neutral[name])
        ):
            taken = ", ".join(map(repr, (*neutral[name], None))).replace("None", "null")
            raise ApiError(
                400,
                f"this server cannot do {name!r} as requested; leave it out (it takes {taken})",
                code="unsupported_parameter",
                param=at + name,
            )
    return left


def _numbers(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Also accept 1.0 for 1, because JSON does not distinguish them; but not `true`."""
    return (*values, *(float(value) for value in values if type(value) is int))
