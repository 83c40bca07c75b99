"""Parses the JSON of `/v1/chat/completions` into a request to the model. Unknown fields are rejected.

A request cannot change the guard: it contains text, images and a sampling; the knobs of a guarded graph
(`runtime/knobs.py`) keep their exported defaults.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...runtime.chat.turns import Role, Turn
from ...runtime.generation import Request, Sampling
from .http_errors import ApiError
from .parameters import MESSAGE_NEUTRAL, NOTES, without_neutral
from .pictures import image_bytes
from .settings import ServeSettings

# No tokenizer packs more characters into a token, on average over a text; longer ones are refused before they are tokenized.
_CHARACTERS_PER_TOKEN = 32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # ignored: the model's own processor prepares the picture


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Part = Annotated[_Text | _Image, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_as_parts), Field(min_length=1)]


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Body(_Strict):
    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion.

    Attributes:
        request: text and images.
        sampling: how the answer's tokens are chosen.
        asked_length: whether the request sets the length of the answer.
        streams: whether the answer is streamed.
        tells_usage: whether a stream ends with the token counts.
    """

    request: Request
    sampling: Sampling
    asked_length: bool
    streams: bool
    tells_usage: bool


def read_chat_request(content: Mapping[str, Any], settings: ServeSettings, sees: bool) -> ChatRequest:
    """A request's body, understood.

    Args:
        sees: whether the model takes images.

    Raises:
        ApiError: 404 for another model, 413 for too large an image, else 400, with the field that it is about.
    """
    body = _validated(content)
    if body.model != settings.name:
        raise ApiError(
            404,
            f"the model {body.model[:80]!r} does not exist; this server has {settings.name!r}",
            code="model_not_found",
            param="model",
        )
    if body.stream_options is not None and not body.stream:
        raise _refusal("stream_options requires stream: true; leave it out", "stream_options")
    options = body.stream_options or _StreamOptions()
    sampling, asked = _sampling(body, settings)
    return ChatRequest(_request(body, settings, sees), sampling, asked, bool(body.stream), options.include_usage)


def _validated(content: Mapping[str, Any]) -> _Body:
    known = {name: value for name, value in without_neutral(content).items() if name not in NOTES}
    messages = known.get("messages")
    if isinstance(messages, list):
        known["messages"] = [
            without_neutral(one, MESSAGE_NEUTRAL, f"messages[{number}].") if isinstance(one, dict) else one
            for number, one in enumerate(messages)
        ]
    try:
        return _Body.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise _refusal(
                f"unknown argument {param!r}; leave it out (no argument of a request changes the guard)", param
            ) from None
        raise _refusal(f"{param}: {first['msg']}", param) from None


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url.url`: as a caller would write it, without the kinds of parts that pydantic names."""
    path, previous = "", ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (previous == "part" and step in ("text", "image_url")):
            path += f".{step}" if path else step
        previous = "part" if isinstance(step, int) and path.endswith(f".content[{step}]") else ""
    return path


def _sampling(body: _Body, settings: ServeSettings) -> tuple[Sampling, bool]:
    lengths = {name: getattr(body, name) for name in ("max_completion_tokens", "max_tokens")}
    asked = {name: length for name, length in lengths.items() if length is not None}
    if len(set(asked.values())) > 1:
        raise _refusal("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    for name, length in asked.items():
        if length > settings.max_tokens:
            raise _refusal(f"{name} {length} is more than this server's {settings.max_tokens}; ask for less", name)
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    temperature = 0.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    longest = next(iter(asked.values()), settings.max_tokens)
    return Sampling(longest, temperature, top_p, seed), bool(asked)


def _request(body: _Body, settings: ServeSettings, sees: bool) -> Request:
    turns, images = [], []
    for number, message in enumerate(body.messages):
        pieces: list[str | None] = []
        before = len(images)
        for place, part in enumerate(message.content):
            pieces.append(part.text if isinstance(part, _Text) else None)
            if isinstance(part, _Image):
                param = f"messages[{number}].content[{place}].image_url"
                if message.role != "user":
                    raise _refusal(f"images belong to the user's messages, this is the {message.role}'s", param)
                if not sees:
                    raise _refusal(f"the model {settings.name!r} takes text only; leave the image out", param)
                if len(images) == settings.max_images:
                    raise _refusal(
                        f"this server takes {settings.max_images} images per conversation; leave the others out", param
                    )
                images.append(image_bytes(part.image_url.url, settings.max_image, f"{param}.url"))
        role: Role = "system" if message.role == "developer" else message.role
        turns.append(Turn.of_pieces(role, pieces))
        if not turns[-1].text.strip() and len(images) == before:
            raise _refusal(f"messages[{number}] is empty; write something", f"messages[{number}].content")
    if turns[-1].role != "user":
        raise _refusal(
            "the last message is not the user's, and no answer is continued; end with a question",
            f"messages[{len(turns) - 1}].role",
        )
    if sum(len(turn.text) for turn in turns) > _CHARACTERS_PER_TOKEN * settings.max_prompt_tokens:
        raise too_long(settings.max_prompt_tokens)
    history = tuple(turns[:-1])
    return Request(turns[-1].text, images or None, history, turns[-1].pieces)


def too_long(longest: int) -> ApiError:
    """The refusal of a conversation of more tokens than that."""
    return _refusal(
        f"the conversation is longer than {longest} tokens, its images included; shorten it",
        "messages",
        "context_length_exceeded",
    )


def _refusal(message: str, param: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)
