"""Decodes tokens to text as they arrive: text once returned is final, and characters are always complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the answer, without white space around it.

    Args:
        decode: all tokens of an answer -> its text. A token alone has no text: byte-level tokenizers split characters, and
            others put spaces where two words meet.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._said = ""

    def add(self, token: int) -> str:
        """The text that the token adds; empty while a character is incomplete, or while white space may be the end."""
        self._tokens.append(token)
        text = self._decode(self._tokens).strip()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._beyond(text)

    def end(self) -> str:
        """The remaining text: bytes of an incomplete character."""
        return self._beyond(self._decode(self._tokens).strip()) if self._tokens else ""

    def _beyond(self, text: str) -> str:
        new, self._said = text[len(self._said) :], text
        return new
