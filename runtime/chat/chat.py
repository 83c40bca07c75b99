"""Prompts to token ids, from the files of a model folder: one question, or a conversation, through the model's chat template.

Needs `tokenizers` and `jinja2` only, and gives the ids that transformers 5 gives:

1. `ChatTokenizer.open`    tokenizer, special tokens, chat template and image token of a folder (Hugging Face,
                           onnx-community or onnxruntime-genai layout)
2. `ChatTokenizer.render_turns`  turns -> text, as `apply_chat_template(..., add_generation_prompt=True)`
3. `ChatTokenizer.encode_turns`  turns -> ids, each picture's placeholder replaced by its text (`picture_markers`)

`render` and `encode` are the same for one question.

Where transformers has two answers, the folder decides, because the two differ in a token that models are sensitive to:

- A model with a processor (vision-language): `processor.apply_chat_template`. It adds the tokenizer's own special
  tokens unless the rendered text begins with `bos_token`; LLaVA 1.5 depends on it, its template writes no `<s>`.
- A text-only model: `tokenizer.apply_chat_template`. It never adds any: the template wrote all of them.
- No chat template: the prompt is the text, and the tokenizer adds its special tokens.

One thing is stricter than in transformers. There, a prompt that contains `<image>`, `</s>`, `<|im_end|>` or the template's own
"ASSISTANT:" can end the user's turn, or claim an image. Here such a prompt is rejected (`control_tokens`, `turn_markers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from ...graphs.errors import GuardError, PromptsUnusable
from .chat_template import ChatTemplate, content_of, turn_markers
from .folder_configs import FolderConfigs, find_template, open_tokenizer
from .picture_layouts import PictureTokens
from .picture_markers import Placeholder
from .special_tokens import (
    add_declared_tokens,
    boundary_ids,
    control_tokens,
    find_image_token,
    find_placeholder,
    image_refusal,
)
from .tokenizer_calls import tokenizer_calls
from .turn_markers import TurnMarkers
from .turns import Content, Turn, lines, message, parts


@dataclass(frozen=True)
class ChatTokenizer:
    """The tokenizer of a model folder, ready for single-turn prompts. Made by `open`.

    Attributes:
        folder: its folder; error messages start with it.
        tokenizer: without truncation and padding, with every special token that the configs declare.
        template: compiled chat template, `None` for base models.
        content: the form in which the template takes a message.
        special_tokens: `bos_token`, `eos_token`, ... to their text.
        control_tokens: token id to text; a prompt must contain none of them.
        markers: plain text that the template writes between turns; a prompt must contain none of it.
        multimodal: whether transformers would make a processor of this folder.
        pad_id: for padding; any valid id does, because the attention mask hides it.
        bos_id: `None` if the model has none.
        eos_ids: generation stops at any of them; empty if the folder names none.
        image_token: the placeholder's text, `None` if the folder names none.
        image_token_id: its id in the tokenizer, `None` if the tokenizer does not have it.
        placeholder: what stands for an image in a prompt, `None` if the folder names no image token.
        image_refusal: why image prompts cannot be made from this folder, `None` if they can.
    """

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    content: Content
    special_tokens: Mapping[str, str]
    control_tokens: Mapping[int, str]
    markers: TurnMarkers
    multimodal: bool
    pad_id: int
    bos_id: int | None
    eos_ids: frozenset[int]
    image_token: str | None
    image_token_id: int | None
    placeholder: Placeholder | None
    image_refusal: str | None

    @classmethod
    def open(cls, folder: Path | str) -> ChatTokenizer:
        """Read the folder's tokenizer, configs and chat template; everything is checked here, before the first prompt.

        Raises:
            ModelUnreadable: no tokenizer.json, or a file that cannot be read, or a template that prints no prompt.
        """
        folder = Path(folder)
        configs = FolderConfigs.read(folder)
        tokenizer = open_tokenizer(folder)
        with tokenizer_calls(folder):
            special_tokens = add_declared_tokens(folder, tokenizer, configs)
        source = find_template(folder, configs)
        template = None if source is None else ChatTemplate.compile(folder, source, special_tokens)
        content: Content = "string"
        if template is not None:
            content = content_of(folder, template, ("parts", "string") if configs.multimodal else ("string", "parts"))
        image_token = find_image_token(tokenizer, configs)
        image_token_id = None if image_token is None else tokenizer.token_to_id(image_token)
        placeholder = None if image_token is None else find_placeholder(configs, image_token)
        control = control_tokens(tokenizer, special_tokens, template, placeholder)
        bos_id, eos_ids, pad_id = boundary_ids(tokenizer, configs, special_tokens)
        return cls(
            folder=folder,
            tokenizer=tokenizer,
            template=template,
            content=content,
            special_tokens=special_tokens,
            control_tokens=control,
            markers=turn_markers(folder, tokenizer, template, content, control.values()),
            multimodal=configs.multimodal,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_ids=eos_ids,
            image_token=image_token,
            image_token_id=image_token_id,
            placeholder=placeholder,
            image_refusal=image_refusal(configs, image_token, image_token_id),
        )

    def render(self, prompt: str, pictures: int = 0) -> str:
        """The text of one question; see `render_turns`."""
        return self.render_turns([Turn("user", prompt, pictures)])

    def render_turns(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation, up to where the model answers; a placeholder for each picture, not yet replaced.

        The template gets each turn's texts and pictures in their order. Without a chat template a question itself is the text,
        and a picture is a line of it, as LLaVA was trained: `<image>`, a newline, the prompt. The same where a template of a
        vision-language model takes strings only.

        Raises:
            PromptsUnusable: a turn contains a control token or a turn marker, or the folder's template cannot write this
                conversation.
            GuardError: the folder cannot do images, or its template fails or writes another number of images.
        """
        pictures = sum(turn.pictures for turn in turns)
        for turn in turns:
            for between in (
                ("\n", " ", "") if turn.pieces else ("",)
            ):  # a template may write its texts behind one another
                self._refuse_control_tokens(between.join(piece for piece in turn.in_order if piece is not None))
        if pictures and self.image_refusal is not None:
            raise GuardError(f"{self.folder}: {self.image_refusal}")
        written = self.placeholder.written if self.placeholder is not None else None
        text = self._written(turns, written)
        times = text.count(written) if written else 0
        if times != pictures:
            raise GuardError(
                f"{self.folder}: its chat template writes the image token {written!r} {times} times for "
                f"{pictures} images; use the chat template that belongs to this model"
            )
        if len(turns) > 1 or turns[0].pieces:
            self._require_said(turns, text)
        return text

    def _written(self, turns: Sequence[Turn], written: str | None) -> str:
        """Render a conversation with the template, or with the rule for folders without one."""
        if self.template is None and len(turns) != 1:
            raise PromptsUnusable(f"{self.folder}: has no chat template, so it takes one question; ask one")
        if self.template is None and self._pictures_first:
            return self._behind_pictures((written or "") * turns[0].pictures, turns[0].text)
        if self.template is None:
            return lines(turns[0], written)
        if self._pictures_first:
            turns = [replace(turn, pieces=()) for turn in turns]
        if self.content == "parts":
            text = self.template.render([message(turn.role, parts(*turn.in_order)) for turn in turns])
        else:
            text = self.template.render([message(turn.role, lines(turn, written)) for turn in turns])
        if not self._pictures_first:
            return text
        pictures, last, words = text.rpartition(written or "\0")
        return self._behind_pictures(pictures + last, words)

    @property
    def _pictures_first(self) -> bool:
        """Whether the prompt is the pictures, `bos_token`, the words and a line break (PaliGemma)."""
        return self.placeholder is not None and self.placeholder.layout.before_text

    def _behind_pictures(self, pictures: str, words: str) -> str:
        return f"{pictures}{self.special_tokens.get('bos_token', '')}{words}\n"

    def encode(self, prompt: str, image_tokens: int = 0) -> list[int]:
        """Token ids of one question, with one picture of so many image tokens, or none; see `encode_turns`."""
        pictures = [PictureTokens(image_tokens)] if image_tokens else []
        return self.encode_turns([Turn("user", prompt, len(pictures))], pictures)

    def encode_turns(self, turns: Sequence[Turn], pictures: Sequence[PictureTokens] = ()) -> list[int]:
        """Token ids of a conversation.

        Args:
            turns: the conversation; the model answers the last turn.
            pictures: the image tokens of each picture, in the order of the turns; at least one each.

        Raises:
            PromptsUnusable: as `render_turns`; or they give no tokens, or are not text that UTF-8 can hold.
            GuardError: as `render_turns`.
        """
        assert sum(turn.pictures for turn in turns) == len(pictures), (turns, pictures)
        assert all(picture.count > 0 for picture in pictures), pictures
        text = self.render_turns(turns)
        add_special_tokens = self._adds_special_tokens(text)
        if pictures:
            assert self.placeholder is not None  # render refused otherwise
            text = self.placeholder.filled(text, list(pictures))
        with tokenizer_calls(self.folder):
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise PromptsUnusable(f"{self.folder}: the prompt {turns[-1].text!r} gives no tokens; write a prompt")
        found, expected = (
            sum(number == self.image_token_id for number in ids),
            sum(picture.count for picture in pictures),
        )
        if found != expected:
            raise GuardError(
                f"{self.folder}: {expected} image tokens {self.image_token!r} became {found} after tokenization; "
                "use the tokenizer that belongs to this model"
            )
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; `skip_special` omits special tokens such as `</s>`."""
        with tokenizer_calls(self.folder):
            return self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special)

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether tokenizer.json's own special tokens come on top; the rule is in the module's docstring."""
        if self._pictures_first:
            return False
        if self.template is None:
            return True
        bos = self.special_tokens.get("bos_token")
        return self.multimodal and not (bos is not None and text.startswith(bos))

    def _require_said(self, turns: Sequence[Turn], text: str) -> None:
        """Some templates leave out what they do not expect, a system message first of all: the caller must get an error."""
        for turn in turns:
            left_out = [piece for piece in turn.in_order if piece is not None and piece.strip() not in text]
            if left_out:
                raise PromptsUnusable(
                    f"{self.folder}: its chat template leaves the {turn.role} message {_shortened(left_out[0])!r} out; "
                    "remove it, or move its text into the question"
                )

    def _refuse_control_tokens(self, prompt: str) -> None:
        """Both spellings: the literal text, and whatever the tokenizer normalises into a control token."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise PromptsUnusable(f"the prompt {prompt!r} holds a lone surrogate; write it in plain UTF-8") from None
        found = [text for text in self.control_tokens.values() if text in prompt]
        if not found:
            with tokenizer_calls(self.folder):
                ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
            found = [self.control_tokens[number] for number in ids if number in self.control_tokens]
        if found:
            raise PromptsUnusable(
                f"the prompt {_shortened(prompt)!r} contains {found[0]!r}, a control token of {self.folder}; "
                "remove it from the prompt"
            )
        marker = self.markers.found_in(prompt)
        if marker is not None:
            raise PromptsUnusable(
                f"the prompt {_shortened(prompt)!r} contains {marker!r}, which the chat template of {self.folder} writes "
                "between turns; write it in another way"
            )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
