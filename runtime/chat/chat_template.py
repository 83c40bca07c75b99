"""Chat templates, which are untrusted programs: rendered in a confined process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...graphs.errors import ModelUnreadable
from ..confined import TEMPLATES, ConfinedFailure, LimitReached
from .tokenizer_calls import tokenizer_calls
from .turn_markers import CONVERSATIONS, TurnMarkers, between, sentinels
from .turns import Content, message, parts

# Digits: no template changes them by `upper`, `title` or `trim`.
_PROBE, _CANARY = "31415926535897932", "27182818284590452"


class TemplateTooCostly(ModelUnreadable):
    """A chat template takes too long, or too much memory: no other conversation is tried with it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template with the special tokens it may write.

    Templates are untrusted programs. They are compiled and rendered in a confined process (`confined`), in jinja2's immutable
    sandbox, and see plain strings, lists, dicts and None only.
    """

    folder: Path
    source: str
    literals: str
    special_tokens: Mapping[str, str]

    @classmethod
    def compile(cls, folder: Path, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Raises ModelUnreadable if it is not a template."""
        try:
            reply, _ = TEMPLATES.run("compile", {}, source.encode("utf-8", "surrogatepass"))
        except ConfinedFailure as error:
            raise ModelUnreadable(
                f"{folder}: its chat template is malformed ({error}); copy it from the model again"
            ) from None
        return cls(folder, source, "\0".join(reply["literals"]), special_tokens)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """A conversation and the opening of the answer.

        Raises:
            ModelUnreadable: the template raises, or takes too long or too much memory.
        """
        values = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self.special_tokens,
        }
        try:
            _, text = TEMPLATES.run("render", {"values": values}, self.source.encode("utf-8", "surrogatepass"))
        except ConfinedFailure as error:
            refusal = TemplateTooCostly if isinstance(error, LimitReached) else ModelUnreadable
            raise refusal(
                f"{self.folder}: its chat template fails ({error}); use the chat template that belongs to this model"
            ) from None
        return text.decode("utf-8", "surrogatepass")


def turn_markers(
    folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None, content: Content, control: Iterable[str]
) -> TurnMarkers:
    """The plain text that a template writes between turns, found by rendering conversations of digits.

    Args:
        folder: the model, for error messages.
        tokenizer: compares spellings of a marker.
        template: the chat template; `None` for none.
        content: the form in which it takes messages.
        control: special tokens, which are rejected elsewhere.
    """

    def same(one: str, other: str) -> bool:
        with tokenizer_calls(folder):
            return len({tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (one, other)}) == 1

    written: list[str] = []
    for roles in CONVERSATIONS if template is not None else ():
        assert template is not None
        contents = sentinels(len(roles))
        texts = [parts(text) if content == "parts" else text for text in contents]
        try:
            rendered = template.render([message(role, text) for role, text in zip(roles, texts, strict=True)])
        except TemplateTooCostly:
            raise
        except ModelUnreadable:  # an unsupported role or order
            continue
        written += between(rendered, contents)
    return TurnMarkers.of(written, control, same)


def content_of(folder: Path, template: ChatTemplate, order: tuple[Content, ...]) -> Content:
    """The form in which the template takes a message: the first of `order` whose text it renders.

    The template is rendered with each form. The output must contain a probe text and must not contain a canary (an extra key
    of the part): a template that prints `[{'type': 'text', ...}]` treats the list as a string.

    Raises:
        ModelUnreadable: it renders neither form.
    """
    reason = "it leaves the prompt out"
    for content in order:
        try:
            probe = parts(_PROBE, canary=_CANARY) if content == "parts" else _PROBE
            text = template.render([message("user", probe)])
        except TemplateTooCostly:
            raise
        except ModelUnreadable as error:
            reason = str(error).removeprefix(f"{folder}: ").split("; ")[0]
            continue
        if _PROBE in text and _CANARY not in text:
            return content
    raise ModelUnreadable(
        f"{folder}: its chat template prints no prompt ({reason}); use the chat template that belongs to this model"
    )
