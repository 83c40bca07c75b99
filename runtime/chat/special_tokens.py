"""Special tokens of a model folder: the declared ones, what stands for an image, and what a prompt must not contain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...graphs.errors import ModelUnreadable, first_line
from .chat_template import ChatTemplate
from .folder_configs import FolderConfigs, section
from .picture_layouts import PictureLayout
from .picture_markers import LAYOUTS, Placeholder

# The names that templates may use, as transformers' `special_tokens_map` has them.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def add_declared_tokens(folder: Path, tokenizer: Tokenizer, configs: FolderConfigs) -> dict[str, str]:
    """Make every token that the configs declare a token of the tokenizer, as transformers does after loading it.

    Some folders declare `<image>` or `<pad>` in tokenizer_config.json only; without this step such a token would be cut
    into pieces. Returns the named ones (`SPECIAL_TOKEN_NAMES`).
    """
    declared = dict(configs.tokenizer)
    if "added_tokens_decoder" not in declared:
        declared |= configs.special_tokens_map  # the older file counts only where the newer table is missing
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _added_tokens(folder, section(declared, "added_tokens_decoder")):
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
    """The text of the image token, in the order in which `LlavaProcessor` looks, then by the model's number."""
    layout = LAYOUTS.get(configs.processor_class or "")
    if layout is not None and layout.image is not None:
        return _named(configs, *layout.image) or None
    found = _named(configs, "image_token")
    if found:
        return found
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    if configs.image_token_id in added:  # an ordinary word at that number is no placeholder
        return added[configs.image_token_id]
    return "<image>" if configs.multimodal and "<image>" in added.values() else None


def find_placeholder(configs: FolderConfigs, image_token: str) -> Placeholder:
    """The picture's markers: the row of `LAYOUTS` for the folder's processor, with the markers named in its configs."""
    layout = LAYOUTS.get(configs.processor_class or "", PictureLayout())
    markers = {marker: _named(configs, *named) for marker, named in layout.markers.items()}
    written = image_token if layout.written is None else _named(configs, *layout.written)
    return Placeholder(written, image_token, layout, markers)


def _named(configs: FolderConfigs, name: str, otherwise: str = "") -> str:
    """The text of a token that the configs name, else `otherwise`."""
    extra = section(configs.tokenizer, "extra_special_tokens")
    named = (configs.tokenizer.get(name), extra.get(name), configs.processor.get(name))
    return next(filter(None, map(_content, named)), otherwise)


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
    if configs.processor_class not in (None, *LAYOUTS):
        return (
            f"the text that {configs.processor_class} writes for a picture is not known; use text-only prompts, or prepare the "
            "prompt's inputs elsewhere"
        )
    placeholder = find_placeholder(configs, image_token)
    names = {marker: name for marker, (name, _) in placeholder.layout.markers.items()}
    nameless = [names[marker] for marker, text in placeholder.markers.items() if not text]
    if nameless:
        return f"its tokenizer_config.json names no {nameless[0]}; copy the tokenizer of the model again"
    return None


def control_tokens(
    tokenizer: Tokenizer,
    special_tokens: Mapping[str, str],
    template: ChatTemplate | None,
    placeholder: Placeholder | None,
) -> dict[int, str]:
    """Ids and texts that only the template and the pictures may write: special tokens, and added tokens that these contain.

    Added tokens are included because some models (DeepSeek's turn markers) do not flag theirs as special. White space is
    ordinary text. `unk_token` stands for unknown words, so it is excluded unless it also has another role.

    Args:
        tokenizer: its table of added tokens is read.
        special_tokens: `bos_token`, `eos_token`, ... to their text.
        template: the chat template, `None` for none.
        placeholder: the text for an image in a prompt, `None` for none.
    """
    literals = "" if template is None else template.literals
    if placeholder is not None:
        literals += "\0" + placeholder.every_marker()
    unknown = {special_tokens.get("unk_token")} - {
        content for name, content in special_tokens.items() if name != "unk_token"
    }
    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if (token.special or token.content in literals) and token.content.strip() and token.content not in unknown
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
