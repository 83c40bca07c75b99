"""Tokens to text as they come: text that was returned is never taken back, and no character comes in halves.

A token alone has no text: byte-level tokenizers split characters, and others put a space where two words meet. So the last few
tokens, the window, are decoded once without and once with the new one; the difference is what it adds. The work for an answer
is in proportion to its length.

`tokenizers.decoders.DecodeStream` works alike and is not used here: with byte-fallback tokens (`<0xE2>`) it returns the text of
a run of bytes before the run has ended. One byte later the run may be no UTF-8, then each of its bytes is decoded to a
replacement character, the returned text included, and the stream raises "Invalid prefix encountered".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product

from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the first bytes of a character, at the end of a text
_HEX = "0123456789ABCDEFabcdef"


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the answer, without white space around it.

    Args:
        tokenizer: of the model.
        decode: all tokens of an answer -> its text, without special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, decode: Callable[[Sequence[int]], str]) -> None:
        self._tokenizer, self._decode = tokenizer, decode
        self._bytes = _byte_tokens(tokenizer)
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._tokens: list[int] = []
        # From the last tokens that added text on. Their text, which is returned already, is the beginning of the window's.
        self._window: list[int] = []
        self._returned = ""
        self._newest = 0  # where the tokens behind those begin
        self._in_bytes = False
        self._pieces: list[str] = []
        self._space = ""  # white space behind it, which may turn out to be the answer's end

    def add(self, token: int) -> str:
        """The text that the token adds; empty while a character is incomplete, or while white space may be the end."""
        self._tokens.append(token)
        self._window.append(token)
        if self._is_among_bytes(token):
            return ""
        text = self._decode(self._window)
        whole = text.removesuffix(_INCOMPLETE)
        # Where a decoder changes text that is returned already, nothing more is returned before the end.
        if len(whole) <= len(self._returned) or not whole.startswith(self._returned):
            return ""
        piece, self._returned = whole[len(self._returned) :], whole
        if whole == text:
            del self._window[: self._newest]
            self._newest, self._returned = len(self._window), self._decode(self._window)
        return self._stripped(piece)

    def end(self) -> str:
        """The remaining text: bytes of an incomplete character, or a run of bytes."""
        text = self._decode(self._tokens).strip() if self._tokens else ""
        said = "".join(self._pieces)
        return text[len(said) :] if text.startswith(said) else ""

    def _is_among_bytes(self, token: int) -> bool:
        """Whether the text ends in byte-fallback tokens. Tokens that are not decoded do not end a run of them."""
        if not self._bytes:
            return False
        if token not in self._special and self._tokenizer.id_to_token(token) is not None:
            self._in_bytes = token in self._bytes
        return self._in_bytes

    def _stripped(self, piece: str) -> str:
        """A piece without the white space before an answer, and behind what may be its end."""
        piece = self._space + piece if self._pieces else piece.lstrip()
        shown = piece.rstrip()
        self._space = piece[len(shown) :]
        if shown:
            self._pieces.append(shown)
        return shown


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for one byte each (`<0x0A>`), where the decoder joins them to characters."""
    decoder = tokenizer.decoder
    if decoder is None or "ByteFallback" not in _types(json.loads(decoder.__getstate__())):
        return frozenset()
    known = (tokenizer.token_to_id(f"<0x{high}{low}>") for high, low in product(_HEX, _HEX))
    return frozenset(number for number in known if number is not None)


def _types(decoder: dict) -> set[str]:
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", ())))
