"""Plain text that a chat template writes between turns ("USER:", "[/INST]"): a caller's text must not contain it.

`ChatTokenizer` rejects special tokens by the tokenizer's own table. But many templates mark turns with ordinary text. There
a prompt that contains " ASSISTANT: sure, here is" ends the user's turn and starts the model's answer, as the model reads
it. The markers are found by rendering the template around digits: the text between the digits is the template's own.

A marker is found in a text wherever the model could read it as a marker:

- with any white space in it, and with invisible characters or full-width letters in it (NFKC);
- in its own spelling, in capitals and in title case. In other cases only where the tokenizer does not see the difference: a
  prompt about "user: root" in a config file is honest, and differs from "USER:" for a model that was trained with that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

# Roles of the conversations to render; a conversation that the template does not support is skipped.
CONVERSATIONS: tuple[tuple[str, ...], ...] = (
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user"),
    ("user",),
)
_LONGEST = 40  # characters; longer text is an instruction in the template, not a marker
_SHORT = 4  # letters; "Q:" counts at the beginning of a word only


@dataclass(frozen=True)
class MarkerRule:
    """How one marker is found in a text, as data: the playground's page builds its own pattern from it.

    Attributes:
        spellings: words and signs of each spelling, between which white space does not matter: "ASSISTANT :", "[ /INST ]".
        any_case: whether a spelling in other cases counts too.
        begins_word: whether it counts only where no letter or digit stands before it.
    """

    spellings: tuple[tuple[str, ...], ...]
    any_case: bool
    begins_word: bool

    @classmethod
    def of(cls, marker: str, same: Callable[[str, str], bool]) -> MarkerRule:
        """The rule of a marker that `_plain` has simplified."""
        written = sorted({marker, marker.upper(), marker.title(), marker.capitalize()})
        return cls(
            tuple(tuple(re.findall(r"\w+|[^\w\s]", spelling)) for spelling in written),
            all(same(marker, other) for other in (marker.lower(), marker.upper())),
            marker[0].isalnum() and sum(map(str.isalpha, marker)) < _SHORT,
        )

    @property
    def pattern(self) -> str:
        body = "|".join(r"\s*".join(map(re.escape, parts)) for parts in self.spellings)
        before = r"(?<![^\W_])" if self.begins_word else ""
        return f"{before}{'(?i:' if self.any_case else '(?:'}{body})"


@dataclass(frozen=True)
class TurnMarkers:
    """The plain-text markers of one template.

    Attributes:
        texts: as the template writes them, without white space around them.
        rules: one per text.
        pattern: finds them in a text that `_plain` has simplified; `None` if there are none.
    """

    texts: tuple[str, ...] = ()
    rules: tuple[MarkerRule, ...] = ()
    pattern: re.Pattern[str] | None = None

    @classmethod
    def of(
        cls, between: Iterable[str], control: Iterable[str], same: Callable[[str, str], bool] = lambda a, b: False
    ) -> TurnMarkers:
        """The markers in a template's output.

        Args:
            between: the texts before, between and after the contents of messages.
            control: special tokens, which are rejected elsewhere; only text between them is examined.
            same: whether two spellings give the same tokens.
        """
        tokens = sorted(filter(None, control), key=len, reverse=True)
        split = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        texts: dict[str, None] = {}
        for text in between:
            for piece in split.split(text) if split is not None else [text]:
                texts |= dict.fromkeys(_candidates(piece))
        if not texts:
            return cls()
        rules = tuple(MarkerRule.of(_plain(text), same) for text in texts)
        return cls(tuple(texts), rules, re.compile("|".join(rule.pattern for rule in rules)))

    def found_in(self, text: str) -> str | None:
        """The first marker in a text, as the text writes it; `None` if there is none."""
        match = self.pattern.search(_plain(text)) if self.pattern is not None else None
        return None if match is None else " ".join(match[0].split())


def sentinels(count: int) -> list[str]:
    """Texts that no template changes, and that are found again in what it writes: digits."""
    return [f"2718281828{number}459045{number}235" for number in range(count)]


def between(text: str, contents: Sequence[str]) -> list[str]:
    """The parts of a rendered text around the contents."""
    return re.split("|".join(map(re.escape, contents)), text)


def _candidates(piece: str) -> Iterator[str]:
    """The first and the last line of a piece, if they look like markers."""
    lines = [line.strip() for line in piece.splitlines() if line.strip()]
    for line in dict.fromkeys(lines[:1] + lines[-1:]):
        line = re.split(r"(?<=[.!?])\s+", line)[-1]  # "... answers the user's questions. USER:"
        plain_word = line[0].isalnum() and line[-1].isalnum()  # "user" behind a special token
        sentence = line[-1] in ".!?,;"
        if len(line) <= _LONGEST and any(map(str.isalpha, line)) and not plain_word and not sentence:
            yield line


def _plain(text: str) -> str:
    """Full-width letters as plain ones, and no invisible characters."""
    if text.isascii():
        return text.translate(_CONTROL)
    kept = (
        c for c in unicodedata.normalize("NFKC", text) if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc")
    )
    return "".join(kept)


_CONTROL = {code: None for code in (*range(32), 127) if not chr(code).isspace()}
