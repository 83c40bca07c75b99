"""The tokenizer, the chat template and the JSON files beside them, from a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...graphs.errors import ModelUnreadable, first_line
from ...graphs.json_files import read_json, require_small
from ...graphs.regular_files import read_regular
from .tokenizer_bounds import require_bounded
from .tokenizer_calls import tokenizer_calls

# Keys of config.json for the image token; the first that is there counts.
IMAGE_TOKEN_KEYS = (
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "img_context_token_id",
    "im_patch_id",
)
LARGEST_TOKENIZER, LARGEST_TEMPLATE = 256 << 20, 1 << 20  # bytes; known ones have at most 40 million and 20 thousand


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
            genai=section(read_json(folder / "genai_config.json"), "model"),
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
        return section(self.model, "text_config") or self.model

    @property
    def processor_class(self) -> str | None:
        return self.processor.get("processor_class") or self.tokenizer.get("processor_class")

    @property
    def image_token_id(self) -> int | None:
        """Id of the token that the model replaces with image features."""
        found = (table.get(name) for table in (self.model, self.genai) for name in IMAGE_TOKEN_KEYS)
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


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
