"""Writes `facts.json`: the page's facts about the model.

Chat template, special tokens, image processor and thresholds are read by the code of `GuardedVLM`. A model whose inputs the
page would prepare differently is rejected: no answer is better than a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...graphs.errors import GuardError
from ...graphs.modes import guard_mode
from ...graphs.plan import GuardPlan
from ...graphs.roles import EMBEDS, MASK, POSITIONS, input_roles
from ...runtime.chat.chat import ChatTokenizer
from ...runtime.chat.folder_configs import FolderConfigs, find_template
from ...runtime.chat.picture_layouts import PictureTokens
from ...runtime.chat.turns import Turn
from ...runtime.images.prepared_picture import Preprocessor
from .picture_facts import image_facts, layout_facts, require_page_pictures, sample_cuts
from .sides import Sides

# Inputs that the page feeds to a decoder, besides the cache.
_FED = (EMBEDS, MASK, POSITIONS, "use_cache_branch", "num_logits_to_keep")
# A character that occurs in no text. The page's tokenizer lacks the WordLevel model; a WordPiece model without word parts is
# equivalent.
_NO_SECOND_PART = "\0"


def require_page_model(sides: Sides) -> None:
    """The page prepares prompts and pictures for this model as `GuardedVLM` does.

    Raises:
        GuardError: it does not.
    """
    package, root = sides.package, sides.package.root
    if package.layout != "onnx-community":
        raise GuardError(
            f"{root}: is laid out as {package.layout}; the page runs folders of the onnx-community layout alone"
        )
    if sides.plan.paired:
        raise GuardError(
            f"{root}: its guard reads pairs of rows, and the page runs one prompt a call; export with --supervisor input"
        )
    if package.vision_encoder is None or package.embed_tokens is None:
        raise GuardError(
            f"{root}: has no vision encoder or no embed_tokens graph; the page runs vision-language models alone"
        )
    require_page_pictures(package, package.vision_encoder)
    roles = input_roles(sides.base.graph)
    names = [value.name or "" for value in sides.base.graph.inputs]
    unknown = [name for name in names if name not in _FED and name not in roles.pasts]
    if unknown or EMBEDS not in names:
        asked = repr(unknown[0]) if unknown else "no inputs_embeds"
        raise GuardError(
            f"{package.decoder}: takes {asked}; the page runs decoders that take {', '.join(_FED)} and a cache"
        )


def model_facts(sides: Sides, chat: ChatTokenizer, images: Preprocessor) -> dict[str, Any]:
    """Facts about the model that do not depend on a prompt."""
    plan, package = sides.plan, sides.package
    return {
        "name": package.root.name,
        "decoder": package.decoder.name,
        "base": "source" if sides.from_source else "stripped",
        "guard": guard_facts(plan),
        "chat": chat_facts(chat),
        "image": image_facts(images),
        "longestSequence": package.longest_sequence,
        "kvHeads": package.kv_heads,
        "headSize": package.head_size,
    }


def guard_facts(plan: GuardPlan) -> dict[str, Any]:
    gated = guard_mode(plan.mode).has_threshold
    return {
        "mode": plan.mode,
        "layers": list(plan.layers),
        "decoderLayers": plan.decoder_layers,
        "thresholds": [guard.threshold for guard in plan.guards] if gated else None,
        "decided": plan.gate,
        "positions": plan.positions,
    }


def chat_facts(chat: ChatTokenizer) -> dict[str, Any]:
    """As `ChatTokenizer` found them.

    Raises:
        GuardError: images cannot be put into this model's prompts.
    """
    if chat.image_refusal is not None or chat.placeholder is None:
        raise GuardError(f"{chat.folder}: {chat.image_refusal}")
    return {
        "template": find_template(chat.folder, FolderConfigs.read(chat.folder)),
        "content": chat.content,
        "specialTokens": dict(chat.special_tokens),
        "controlTokens": {str(number): text for number, text in chat.control_tokens.items()},
        "turnMarkers": [
            {"spellings": rule.spellings, "anyCase": rule.any_case, "beginsWord": rule.begins_word}
            for rule in chat.markers.rules
        ],
        "multimodal": chat.multimodal,
        "eosIds": sorted(chat.eos_ids),
        "imageToken": chat.placeholder.image,
        "imageTokenId": chat.image_token_id,
        "written": chat.placeholder.written,
        "layout": layout_facts(chat.placeholder),
    }


def tokenizer_json(chat: ChatTokenizer) -> bytes:
    """The tokenizer with every token declared in the configs, in the format of the page's tokenizer."""
    content = json.loads(chat.tokenizer.to_str())
    model = content["model"]
    if model.get("type") == "WordLevel":
        longest = max(map(len, model["vocab"]), default=0)
        model |= {
            "type": "WordPiece",
            "continuing_subword_prefix": _NO_SECOND_PART,
            "max_input_chars_per_word": longest + 1,  # a longer one is unknown either way
        }
    return json.dumps(content, ensure_ascii=False).encode()


def token_checks(chat: ChatTokenizer, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Prompts and their ids, without a picture and with one of each kind of text around its tokens.

    If the page's tokenizer gives other ids, the page shows an error and runs nothing.
    """
    assert chat.placeholder is not None  # or `chat_facts` refused it
    pictures = [None, *sample_cuts(chat.placeholder)]
    return [
        {
            "prompt": prompt,
            "picture": None if picture is None else {"count": picture.count, "grid": picture.grid},
            "ids": _ids(chat, prompt, picture),
        }
        for prompt in prompts
        for picture in pictures
    ]


def _ids(chat: ChatTokenizer, prompt: str, picture: PictureTokens | None) -> list[int]:
    pictures = [] if picture is None else [picture]
    return chat.encode_turns([Turn("user", prompt, len(pictures))], pictures)
