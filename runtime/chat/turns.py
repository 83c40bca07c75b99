"""Messages of a conversation, as callers give them and as chat templates read them."""

from __future__ import annotations

from collections.abc import Sequence
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
        pictures: number of its pictures.
        pieces: its texts, and `None` for each of its pictures, in their order; empty: the pictures in front of the text. No two
            texts follow one another.
    """

    role: Role
    text: str
    pictures: int = 0
    pieces: tuple[str | None, ...] = ()

    @classmethod
    def of_pieces(cls, role: Role, pieces: Sequence[str | None]) -> Turn:
        """A message of texts and pictures (`None`) in any order; texts that follow one another become one, line by line."""
        merged: list[str | None] = []
        for piece in pieces:
            if piece is not None and merged and merged[-1] is not None:
                merged[-1] += f"\n{piece}"
            else:
                merged.append(piece)
        text = "\n".join(piece for piece in pieces if piece is not None)
        pictures = sum(piece is None for piece in pieces)
        in_front = merged[:pictures] == [None] * pictures
        return cls(role, text, pictures, () if in_front else tuple(merged))

    @property
    def in_order(self) -> tuple[str | None, ...]:
        """Its texts and pictures, as `pieces`, where pictures are in front too."""
        return self.pieces or (*(None for _ in range(self.pictures)), self.text)

    @property
    def text_only(self) -> Turn:
        """The same words without the pictures."""
        return Turn(self.role, self.text)


def message(role: str, content: str | list[dict[str, str]]) -> dict[str, Any]:
    """A message as chat templates read it."""
    return {"role": role, "content": content}


def lines(turn: Turn, written: str | None) -> str:
    """A turn as one string: its texts, and a placeholder for each of its pictures, each on a line."""
    return "\n".join(str(written) if piece is None else piece for piece in turn.in_order)


def parts(*pieces: str | None, **more: str) -> list[dict[str, str]]:
    """A message's content as vision-language templates read it: texts, and `None` for pictures, in their order."""
    return [{"type": "image"} if piece is None else {"type": "text", "text": piece, **more} for piece in pieces]
