"""Prompts to token ids, from the files of a model folder: one question, or a conversation, through the model's chat template.

Needs `tokenizers` and `jinja2` only, and gives the ids that transformers 5 gives:

1. `ChatTokenizer.open`    tokenizer, special tokens, chat template and image token of a folder (Hugging Face,
                           onnx-community or onnxruntime-genai layout)
2. `ChatTokenizer.render_turns`  turns -> text, as `apply_chat_template(..., add_generation_prompt=True)`
3. `ChatTokenizer.encode_turns`  turns -> ids, the image placeholder expanded as `LlavaProcessor` does

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from ...graphs.errors import GuardError, ModelUnreadable, PromptsUnusable, first_line
from ...graphs.json_files import read_json, require_small
from ...graphs.regular_files import read_regular
from ..confined import TEMPLATES, ConfinedFailure, LimitReached
from .tokenizer_bounds import require_bounded
from .tokenizer_calls import tokenizer_calls
from .turn_markers import CONVERSATIONS, TurnMarkers, between, sentinels

# The names that templates may use, as transformers' `special_tokens_map` has them.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Processors whose image placeholder becomes plain copies of one token. Others write rows, tiles or markers around them
# (Idefics3, Gemma3, Pixtral, ...), and plain copies would be a prompt that the model never saw.
PLAIN_PLACEHOLDER_PROCESSORS = ("LlavaProcessor", "Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
# Processors whose templates write one marker for an image, which becomes the image tokens between two markers and white
# space: the names of both markers in tokenizer_config.json, and the white space.
MARKED_PLACEHOLDER_PROCESSORS = {"Gemma3Processor": ("boi_token", "eoi_token", "\n\n")}

# How a message carries the prompt: a list of parts (vision-language templates), or one string (text-only templates).
Content = Literal["parts", "string"]

LARGEST_TOKENIZER, LARGEST_TEMPLATE = 256 << 20, 1 << 20  # bytes; known ones have at most 40 million and 20 thousand

# Who speaks in a conversation. Not every template knows a system message.
Role = Literal["system", "user", "assistant"]

# Digits: no template changes them by `upper`, `title` or `trim`.
_PROBE, _CANARY = "31415926535897932", "27182818284590452"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `shows` says whether the image belongs to it."""

    role: Role
    text: str
    shows: bool = False


@dataclass(frozen=True)
class Placeholder:
    """What stands for an image: `written` in the text of a template; for the tokenizer `before`, image tokens, `after`."""

    written: str
    before: str = ""
    after: str = ""


# -------------------------------------------------------------------------------------------- the tokenizer of a folder


@dataclass(frozen=True)
class ChatTokenizer:
    """The tokenizer of a model folder, ready for single-turn prompts. Made by `open`.

    Attributes:
        folder: where it came from; error messages begin with it.
        tokenizer: without truncation and padding, with every special token that the configs declare.
        template: compiled chat template, `None` for base models.
        content: what the template wants in a message.
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
        control = control_tokens(tokenizer, special_tokens, template, image_token)
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
            placeholder=None if image_token is None else find_placeholder(configs, image_token),
            image_refusal=image_refusal(configs, image_token, image_token_id),
        )

    def render(self, prompt: str, with_image: bool = False) -> str:
        """The text of one question; see `render_turns`."""
        return self.render_turns([Turn("user", prompt, with_image)])

    def render_turns(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation, up to where the model answers; image placeholders once each, not yet expanded.

        Without a chat template a question itself is the text, and an image goes in front of it, as LLaVA was trained:
        `<image>`, a newline, the prompt. The same where a template of a vision-language model takes strings only.

        Raises:
            PromptsUnusable: a turn contains a control token or a turn marker, or the folder's template cannot write this
                conversation.
            GuardError: the folder cannot do images, or its template fails or writes another number of images.
        """
        images = sum(turn.shows for turn in turns)
        for turn in turns:
            self._refuse_control_tokens(turn.text)
        if images and self.image_refusal is not None:
            raise GuardError(f"{self.folder}: {self.image_refusal}")
        written = self.placeholder.written if self.placeholder is not None else None
        if self.template is None:
            if len(turns) != 1:
                raise PromptsUnusable(f"{self.folder}: has no chat template, so it takes one question; ask one")
            return _in_front(turns[0], written)
        if self.content == "parts":
            text = self.template.render([message(turn.role, parts(turn.text, turn.shows)) for turn in turns])
        else:
            text = self.template.render([message(turn.role, _in_front(turn, written)) for turn in turns])
        times = text.count(written) if written else 0
        if times != images:
            raise GuardError(
                f"{self.folder}: its chat template writes the image token {written!r} {times} times for "
                f"{images} images; use the chat template that belongs to this model"
            )
        if len(turns) > 1:
            self._require_said(turns, text)
        return text

    def encode(self, prompt: str, image_tokens: int = 0) -> list[int]:
        """Token ids of one question; see `encode_turns`."""
        return self.encode_turns([Turn("user", prompt, image_tokens > 0)], image_tokens)

    def encode_turns(self, turns: Sequence[Turn], image_tokens: int = 0) -> list[int]:
        """Token ids of a conversation.

        Args:
            turns: what was said; the last of them is answered. One of them shows the image, if there is one.
            image_tokens: how many tokens the image takes (`images.image_token_count`); 0 is a text-only prompt.

        Raises:
            PromptsUnusable: as `render_turns`; or they give no tokens, or are not text that UTF-8 can hold.
            GuardError: as `render_turns`.
        """
        assert image_tokens >= 0 and sum(turn.shows for turn in turns) == (image_tokens > 0), image_tokens
        text = self.render_turns(turns)
        add_special_tokens = self._adds_special_tokens(text)
        if image_tokens:
            assert self.image_token is not None and self.placeholder is not None  # render refused otherwise
            image = self.placeholder.before + self.image_token * image_tokens + self.placeholder.after
            text = text.replace(self.placeholder.written, image)
        with tokenizer_calls(self.folder):
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise PromptsUnusable(f"{self.folder}: the prompt {turns[-1].text!r} gives no tokens; write a prompt")
        found = sum(number == self.image_token_id for number in ids)
        if found != image_tokens:
            raise GuardError(
                f"{self.folder}: {image_tokens} image tokens {self.image_token!r} became {found} after tokenization; "
                "use the tokenizer that belongs to this model"
            )
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; special tokens (`</s>`, ...) are left out unless asked for."""
        with tokenizer_calls(self.folder):
            return self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special)

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether tokenizer.json's own special tokens come on top; the rule is in the module's docstring."""
        if self.template is None:
            return True
        bos = self.special_tokens.get("bos_token")
        return self.multimodal and not (bos is not None and text.startswith(bos))

    def _require_said(self, turns: Sequence[Turn], text: str) -> None:
        """Some templates leave out what they do not expect, a system message first of all: whoever wrote it must know."""
        for turn in turns:
            if turn.text.strip() not in text:
                raise PromptsUnusable(
                    f"{self.folder}: its chat template leaves the {turn.role} message {_shortened(turn.text)!r} out; "
                    "leave it out, or say it in the question"
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


def message(role: str, content: str | list[dict[str, str]]) -> dict[str, Any]:
    """A message as chat templates read it."""
    return {"role": role, "content": content}


def _in_front(turn: Turn, written: str | None) -> str:
    """A turn as one string, the image's placeholder in front."""
    return f"{written}\n{turn.text}" if turn.shows else turn.text


def parts(prompt: str, with_image: bool, **more: str) -> list[dict[str, str]]:
    """A message's content as vision-language templates read it: the image first, then the text."""
    return [*([{"type": "image"}] if with_image else []), {"type": "text", "text": prompt, **more}]


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# -------------------------------------------------------------------------------------------------- files of the folder


@dataclass(frozen=True)
class FolderConfigs:
    """The JSON files beside a tokenizer; an empty dict where the folder has none."""

    tokenizer: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    processor: Mapping[str, Any]
    model: Mapping[str, Any]
    generation: Mapping[str, Any]
    genai: Mapping[str, Any]
    multimodal: bool

    @classmethod
    def read(cls, folder: Path) -> FolderConfigs:
        """Raises ModelUnreadable for a file that is there and cannot be read."""
        tokenizer = read_json(folder / "tokenizer_config.json")
        processor = read_json(folder / "processor_config.json")
        model = read_json(folder / "config.json")
        return cls(
            tokenizer=tokenizer,
            special_tokens_map=read_json(folder / "special_tokens_map.json"),
            processor=processor,
            model=model,
            generation=read_json(folder / "generation_config.json"),
            genai=_table(read_json(folder / "genai_config.json"), "model"),
            # The files by which transformers' AutoProcessor finds a processor.
            multimodal=bool(
                processor
                or (folder / "preprocessor_config.json").is_file()
                or tokenizer.get("processor_class")
                or "vision_config" in model
            ),
        )

    @property
    def text_model(self) -> Mapping[str, Any]:
        """The language model's part of config.json."""
        return _table(self.model, "text_config") or self.model

    @property
    def processor_class(self) -> str | None:
        return self.processor.get("processor_class") or self.tokenizer.get("processor_class")

    @property
    def image_token_id(self) -> int | None:
        """What the model replaces by image features, by number; `image_token_index` is the older name."""
        names = ("image_token_id", "image_token_index")
        found = (table.get(name) for table in (self.model, self.genai) for name in names)
        return next((number for number in found if isinstance(number, int)), None)


def open_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, with the truncation and padding that a training run may have left in it switched off.

    Raises:
        ModelUnreadable: there is none, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelUnreadable(f"{folder}: has no tokenizer.json; copy the tokenizer of the model into this folder")
    require_small(path, LARGEST_TOKENIZER)
    with tokenizer_calls(path, "is not a tokenizer that can be read"):
        tokenizer = Tokenizer.from_file(str(path))
        require_bounded(tokenizer)
    tokenizer.no_truncation()  # a prompt cut short is another prompt
    tokenizer.no_padding()
    return tokenizer


def find_template(folder: Path, configs: FolderConfigs) -> str | None:
    """The chat template's source, `None` if the folder has none; the order is that of transformers.

    Raises:
        ModelUnreadable: a template is there but cannot be read, or there are several and none is the default.
    """
    file = folder / "chat_template.jinja"
    legacy = read_json(folder / "chat_template.json").get("chat_template")
    require_small(file, LARGEST_TEMPLATE)
    try:
        jinja = read_regular(file, LARGEST_TEMPLATE).decode() if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{file}: cannot be read ({first_line(error)}); copy it from the model again") from None
    of_processor = (configs.processor.get("chat_template"), legacy)
    of_tokenizer = (jinja, configs.tokenizer.get("chat_template"))
    order = (*of_processor, *of_tokenizer) if configs.multimodal else (*of_tokenizer, *of_processor)
    found = next((template for template in order if template), None)
    return None if found is None else _default_template(folder, found)


def _default_template(folder: Path, template: Any) -> str:
    """One template of `"..."`, `[{"name": ..., "template": ...}]` or `{name: template}`."""
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(sorted(template)) or "without names"
        raise ModelUnreadable(f"{folder}: has chat templates {names}, none named default; name one of them default")
    if isinstance(template, dict):
        template = template["default"]
    if isinstance(template, str) and len(template) > LARGEST_TEMPLATE:  # in a JSON file, which may be larger
        raise ModelUnreadable(
            f"{folder}: its chat template has {len(template)} characters, expected at most {LARGEST_TEMPLATE}; copy it from "
            "the model again"
        )
    if not isinstance(template, str):
        kind = type(template).__name__
        raise ModelUnreadable(f"{folder}: its chat template is of type {kind}, not text; copy it from the model again")
    return template


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------------- special tokens


def add_declared_tokens(folder: Path, tokenizer: Tokenizer, configs: FolderConfigs) -> dict[str, str]:
    """Make every token that the configs declare a token of the tokenizer, as transformers does after loading it.

    Some folders declare `<image>` or `<pad>` in tokenizer_config.json only; without this step such a token would be cut
    into pieces. Returns the named ones (`SPECIAL_TOKEN_NAMES`).
    """
    declared = dict(configs.tokenizer)
    if "added_tokens_decoder" not in declared:
        declared |= configs.special_tokens_map  # the older file counts only where the newer table is missing
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _added_tokens(folder, _table(declared, "added_tokens_decoder")):
        if repr(token) not in known:
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _declared_special(declared):
        known_token = added.get(token.content, token)
        if known_token is token or not known_token.special:  # an `eos_token` that was added as plain text, for one
            known_token.special = True
            tokenizer.add_special_tokens([known_token])
            added[token.content] = known_token
    named = {name: _content(declared.get(name)) for name in SPECIAL_TOKEN_NAMES}
    return {name: content for name, content in named.items() if content}


def _added_tokens(folder: Path, decoder: Mapping[str, Any]) -> list[AddedToken]:
    """`{"32000": {"content": "<image>", "special": true, ...}}`, by number."""
    try:
        return [AddedToken(**entry) for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))]
    except (TypeError, ValueError) as error:
        reason = f"added_tokens_decoder in {folder / 'tokenizer_config.json'} is malformed ({first_line(error)})"
        raise ModelUnreadable(f"{reason}; copy the tokenizer of the model again") from None


def _declared_special(declared: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The special tokens in a tokenizer_config.json: the named ones, the model's own, the extra ones."""
    own = [key for key in declared if key.endswith("_token") and key not in SPECIAL_TOKEN_NAMES]
    values = [declared.get(key) for key in (*SPECIAL_TOKEN_NAMES, *own)]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = declared.get(key)
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    for value in values:
        flags = {flag: value[flag] for flag in _TOKEN_FLAGS & value.keys()} if isinstance(value, dict) else {}
        if content := _content(value):
            yield AddedToken(content, special=True, **({"normalized": False} | flags))


_TOKEN_FLAGS = frozenset({"lstrip", "rstrip", "single_word", "normalized"})


def _content(token: Any) -> str | None:
    """`"<s>"`, or `{"__type": "AddedToken", "content": "<s>", ...}`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def find_image_token(tokenizer: Tokenizer, configs: FolderConfigs) -> str | None:
    """The text of the image placeholder, in the order in which `LlavaProcessor` looks, then by the model's number."""
    extra = _table(configs.tokenizer, "extra_special_tokens")
    named = (configs.tokenizer.get("image_token"), extra.get("image_token"), configs.processor.get("image_token"))
    found = next(filter(None, map(_content, named)), None)
    if found is not None:
        return found
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    if configs.image_token_id in added:  # an ordinary word at that number is no placeholder
        return added[configs.image_token_id]
    return "<image>" if configs.multimodal and "<image>" in added.values() else None


def find_placeholder(configs: FolderConfigs, image_token: str) -> Placeholder:
    """The image token itself, or the markers of `MARKED_PLACEHOLDER_PROCESSORS`, as far as the folder names them."""
    marked = MARKED_PLACEHOLDER_PROCESSORS.get(configs.processor_class or "")
    if marked is None:
        return Placeholder(image_token)
    start, end, space = marked
    extra = _table(configs.tokenizer, "extra_special_tokens")
    before, after = (_content(configs.tokenizer.get(name) or extra.get(name)) or "" for name in (start, end))
    return Placeholder(before, space + before, after + space)


def image_refusal(configs: FolderConfigs, image_token: str | None, image_token_id: int | None) -> str | None:
    """Why image prompts cannot be made, in words; `None` if they can."""
    if image_token is None:
        return "has no image token, so it takes text only; use the folder of a vision-language model"
    if image_token_id is None:
        return f"its tokenizer has no token for the image token {image_token!r}; copy the tokenizer of the model again"
    if configs.image_token_id not in (None, image_token_id):
        return (
            f"the image token {image_token!r} is {image_token_id} in the tokenizer and {configs.image_token_id} in the "
            "model's config; copy the tokenizer of the model again"
        )
    known = (*PLAIN_PLACEHOLDER_PROCESSORS, *MARKED_PLACEHOLDER_PROCESSORS)
    if configs.processor_class not in (None, *known):
        return (
            f"image prompts of {configs.processor_class} are not supported, only of {', '.join(known)}; "
            "use text-only prompts"
        )
    if not find_placeholder(configs, image_token).written:
        return "its tokenizer_config.json names no boi_token; copy the tokenizer of the model again"
    return None


def control_tokens(
    tokenizer: Tokenizer, special_tokens: Mapping[str, str], template: ChatTemplate | None, image_token: str | None
) -> dict[int, str]:
    """Ids and texts that only the template may write: special tokens, and added tokens that the template contains.

    The second kind is there because some models (DeepSeek's turn markers) do not flag theirs as special. White space is
    ordinary text. `unk_token` is what any unknown word becomes, so it controls nothing, unless it is also another one.
    """
    literals = "" if template is None else template.literals
    unknown = {special_tokens.get("unk_token")} - {
        content for name, content in special_tokens.items() if name != "unk_token"
    }
    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if (token.special or token.content == image_token or token.content in literals)
        and token.content.strip()
        and token.content not in unknown
    }


def boundary_ids(
    tokenizer: Tokenizer, configs: FolderConfigs, special_tokens: Mapping[str, str]
) -> tuple[int | None, frozenset[int], int]:
    """`(bos_id, eos_ids, pad_id)`.

    eos: generation_config.json first (it may list several, and is what `generate` obeys), then onnxruntime-genai's
    file, the model's config, the tokenizer. bos and pad: the tokenizer first, then the same files.
    """
    files = (configs.generation, configs.genai, configs.model, configs.text_model)

    def of_tokenizer(name: str) -> list[int]:
        return _numbers(tokenizer.token_to_id(special_tokens.get(name, "")))

    def of_files(name: str) -> list[int]:
        return next(filter(None, (_numbers(table.get(name)) for table in files)), [])

    eos = of_files("eos_token_id") or of_tokenizer("eos_token")
    bos = of_tokenizer("bos_token") or of_files("bos_token_id")
    sizes = _numbers([configs.text_model.get("vocab_size"), configs.genai.get("vocab_size")])
    # A pad token that the tokenizer made up lies outside the model's embedding table, and a lookup there would fail.
    vocabulary = sizes[0] if sizes else tokenizer.get_vocab_size()
    pads = (number for number in of_tokenizer("pad_token") + of_files("pad_token_id") + eos if number < vocabulary)
    return (bos[0] if bos else None), frozenset(eos), next(pads, 0)


def _numbers(value: Any) -> list[int]:
    """Token ids of `2`, `[2, 32007]` or `None`; older configs write -1 for none."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and number >= 0]


# ------------------------------------------------------------------------------------------------------- chat templates


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
    """The plain text that a template writes between turns, from conversations of digits."""

    def same(one: str, other: str) -> bool:
        with tokenizer_calls(folder):
            return len({tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (one, other)}) == 1

    written: list[str] = []
    for roles in CONVERSATIONS if template is not None else ():
        assert template is not None
        contents = sentinels(len(roles))
        texts = [parts(text, False) if content == "parts" else text for text in contents]
        try:
            rendered = template.render([message(role, text) for role, text in zip(roles, texts, strict=True)])
        except TemplateTooCostly:
            raise
        except ModelUnreadable:  # a role or an order that it does not know
            continue
        written += between(rendered, contents)
    return TurnMarkers.of(written, control, same)


def content_of(folder: Path, template: ChatTemplate, order: tuple[Content, ...]) -> Content:
    """What the template wants in a message: the first of `order` that it prints as text.

    Tried, not guessed from the source: a probe must come out, and a canary beside it (an extra key of the part) must
    not, because a template that prints `[{'type': 'text', ...}]` has taken the list for a string.

    Raises:
        ModelUnreadable: it prints neither.
    """
    reason = "it leaves the prompt out"
    for content in order:
        try:
            probe = parts(_PROBE, False, canary=_CANARY) if content == "parts" else _PROBE
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
