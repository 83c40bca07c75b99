"""Messages of a conversation, as callers give them and as chat templates read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# How a message carries the prompt: a list of parts (vision-language templates), or one string (text-only templates).
Content = Literal["parts", "string"]


# Roles in a conversation. Not every template supports a system message.
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `shows`: whether the image belongs to it."""

    role: Role
    text: str
    shows: bool = False


@dataclass(frozen=True)
class Placeholder:
    """What stands for an image: `written` in the text of a template; for the tokenizer `before`, image tokens, `after`."""

    written: str
    before: str = ""
    after: str = ""


def message(role: str, content: str | list[dict[str, str]]) -> dict[str, Any]:
    """A message as chat templates read it."""
    return {"role": role, "content": content}


def in_front(turn: Turn, written: str | None) -> str:
    """A turn as one string, the image's placeholder in front."""
    return f"{written}\n{turn.text}" if turn.shows else turn.text


def parts(prompt: str, with_image: bool, **more: str) -> list[dict[str, str]]:
    """A message's content as vision-language templates read it: the image first, then the text."""
    return [*([{"type": "image"}] if with_image else []), {"type": "text", "text": prompt, **more}]
