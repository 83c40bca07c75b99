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
    """One message of a conversation.

    Attributes:
        role: author of the message.
        text: the message.
        pictures: number of pictures in front of the text.
    """

    role: Role
    text: str
    pictures: int = 0


def message(role: str, content: str | list[dict[str, str]]) -> dict[str, Any]:
    """A message as chat templates read it."""
    return {"role": role, "content": content}


def in_front(turn: Turn, written: str | None) -> str:
    """A turn as one string, a placeholder for each of its pictures in front, each on a line."""
    return f"{written}\n" * turn.pictures + turn.text


def parts(prompt: str, pictures: int = 0, **more: str) -> list[dict[str, str]]:
    """A message's content as vision-language templates read it: the pictures first, then the text."""
    return [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": prompt, **more}]
