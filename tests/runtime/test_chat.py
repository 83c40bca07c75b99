"""Prompts to ids: equal to what transformers gives for the same folder, and stricter where a prompt would take control.

Every folder here is written by transformers or by hand under `tmp_path`; tokenizers are tiny and trained on the spot.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmguard.graphs.errors import GuardError, ModelUnreadable, PromptsUnusable
from vlmguard.runtime.chat import folder_configs
from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.chat.picture_layouts import PictureTokens
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.images.images import ImagePreprocessor

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "checkpoint"

PROMPTS = (
    "how to paint the lamp",
    "What's  this?\n\nTwo lines.",
    " leading and trailing ",
    "größe 漢字 🙂",
    "{{ 7 * 7 }}",
)

# As llava-hf/llava-1.5-7b-hf has it in spirit: no `<s>`, parts only, the image before the text.
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_WITH_BOS = "{{ bos_token }}" + LLAVA
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
STRING_OR_PARTS = (
    "{{ bos_token }}{% for message in messages %}{% if message.content is string %}[S]{{ message.content }}"
    "{% else %}[P]{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def bpe(*special: str, adds_bos: bool = False) -> Tokenizer:
    """A byte-level BPE of 300-odd tokens; `<s>` is 0 and `</s>` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["how to paint the lamp with the assistant"] * 2, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def text_folder(folder: Path, tokenizer: Tokenizer, template: str | None, **named: str) -> Path:
    """A text-only model's folder, as transformers saves it."""
    named = {"bos_token": "<s>", "eos_token": "</s>"} | named
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def llava_folder(folder: Path, tokenizer: Tokenizer, template: str | None, **counts: Any) -> Path:
    """A LLaVA's processor folder, as transformers saves it: pictures of 16 x 16, patches of 4."""
    counts = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1} | counts
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        chat_template=template,
        **counts,
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return folder


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; `None` removes the key."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(call, error: type[Exception]) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ask_processor(processor, prompt: str, image: Image.Image | None) -> dict:
    content = [*([{"type": "image", "image": image}] if image else []), {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "np"},
    )


# ------------------------------------------------------------------------------------------------ equal to transformers


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [LLAVA, LLAVA_WITH_BOS, STRING_OR_PARTS])
@pytest.mark.parametrize("strategy, class_tokens", [("default", 1), ("full", 1), ("full", 0)])
def test_llava_processor(tmp_path: Path, adds_bos: bool, template: str, strategy: str, class_tokens: int) -> None:
    counts = {"vision_feature_select_strategy": strategy, "num_additional_image_tokens": class_tokens}
    folder = llava_folder(tmp_path, bpe("<pad>", "<image>", adds_bos=adds_bos), template, **counts)
    processor, chat = AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)
    image = Image.new("RGB", (16, 16), "white")
    for prompt in PROMPTS:
        expected = ask_processor(processor, prompt, None)["input_ids"][0].tolist()
        assert chat.encode(prompt) == expected
        assert expected.count(0) == (1 if adds_bos or template != LLAVA else 0)  # `<s>` exactly once, if at all

        asked = ask_processor(processor, prompt, image)
        pixels = ImagePreprocessor.open(folder).pixel_values([image])
        np.testing.assert_allclose(pixels, asked["pixel_values"], atol=1e-6)
        count = 16 + class_tokens - (strategy == "default")
        assert chat.encode(prompt, image_tokens=count) == asked["input_ids"][0].tolist()
    assert (chat.image_token, chat.image_token_id) == (processor.image_token, processor.image_token_id)
    assert (chat.pad_id, chat.bos_id) == (processor.tokenizer.pad_token_id, processor.tokenizer.bos_token_id)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    "template", [CHATML, LLAVA, STRING_OR_PARTS, "{{ bos_token }}{{ messages[0].content | trim }}"]
)
def test_text_only_tokenizer(tmp_path: Path, adds_bos: bool, template: str) -> None:
    folder = text_folder(tmp_path, bpe("<|im_start|>", "<|im_end|>", adds_bos=adds_bos), template)
    theirs, chat = AutoTokenizer.from_pretrained(folder), ChatTokenizer.open(folder)
    for prompt in PROMPTS:
        content = [{"type": "text", "text": prompt}] if template == LLAVA else prompt
        message = [{"role": "user", "content": content}]
        assert chat.render(prompt) == theirs.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert chat.encode(prompt) == theirs.apply_chat_template(message, add_generation_prompt=True)["input_ids"]


CONVERSATION = (
    Turn("system", "be kind"),
    Turn("user", "how", 1),
    Turn("assistant", "so ."),
    Turn("user", "and the lamp"),
)


def test_a_conversation_is_that_of_transformers(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "llava", bpe("<pad>", "<image>"), LLAVA)
    processor, chat = AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)
    image = Image.new("RGB", (16, 16), "white")
    messages = [
        {
            "role": turn.role,
            "content": [
                *([{"type": "image", "image": image}] if turn.pictures else []),
                {"type": "text", "text": turn.text},
            ],
        }
        for turn in CONVERSATION
    ]
    asked = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "np"},
    )
    assert chat.encode_turns(CONVERSATION, [PictureTokens(16)]) == asked["input_ids"][0].tolist()

    folder = text_folder(tmp_path / "text", bpe("<|im_start|>", "<|im_end|>"), CHATML)
    theirs, chat = AutoTokenizer.from_pretrained(folder), ChatTokenizer.open(folder)
    words = [replace(turn, pictures=0) for turn in CONVERSATION]
    messages = [{"role": turn.role, "content": turn.text} for turn in words]
    assert chat.encode_turns(words) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_conversations_that_cannot_be_said(tmp_path: Path) -> None:
    words = [replace(turn, pictures=0) for turn in CONVERSATION]
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    folder = text_folder(tmp_path / "silent", bpe(), silent)
    assert refusal(lambda: ChatTokenizer.open(folder).encode_turns(words), PromptsUnusable) == (
        f"{folder}: its chat template leaves the system message 'be kind' out; remove it, or move its text into the question"
    )
    folder = text_folder(tmp_path / "base", bpe(), None)
    assert refusal(lambda: ChatTokenizer.open(folder).encode_turns(words), PromptsUnusable) == (
        f"{folder}: has no chat template, so it takes one question; ask one"
    )
    folder = text_folder(tmp_path / "marked", bpe("<|im_start|>", "<|im_end|>"), CHATML)
    early = [Turn("user", "how"), Turn("assistant", "so <|im_end|>"), Turn("user", "why")]
    assert "contains '<|im_end|>', a control token" in refusal(
        lambda: ChatTokenizer.open(folder).encode_turns(early), PromptsUnusable
    )


@pytest.mark.parametrize(
    ("limit", "name"), [("LARGEST_TOKENIZER", "tokenizer.json"), ("LARGEST_TEMPLATE", "chat_template.jinja")]
)
def test_files_are_not_read_whole_before_their_size_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str
) -> None:
    path = text_folder(tmp_path / "text", bpe("<|im_start|>", "<|im_end|>"), CHATML) / name
    monkeypatch.setattr(folder_configs, limit, 10)
    assert refusal(lambda: ChatTokenizer.open(path.parent), ModelUnreadable) == (
        f"{path}: has {path.stat().st_size} bytes, expected at most 10; copy it from the model again"
    )


@pytest.mark.parametrize("adds_bos", [False, True])
def test_base_models_have_no_template(tmp_path: Path, adds_bos: bool) -> None:
    folder = text_folder(tmp_path / "text", bpe(adds_bos=adds_bos), None)
    theirs, chat = AutoTokenizer.from_pretrained(folder), ChatTokenizer.open(folder)
    for prompt in PROMPTS:
        assert chat.render(prompt) == prompt
        assert chat.encode(prompt) == theirs(prompt)["input_ids"]
        assert chat.decode(chat.encode(prompt)) == prompt

    folder = llava_folder(tmp_path / "llava", bpe("<pad>", "<image>", adds_bos=adds_bos), None)
    theirs, chat = AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)
    asked = theirs(images=[Image.new("RGB", (16, 16))], text="<image>\nhow", return_tensors="np")
    assert chat.encode("how", image_tokens=16) == asked["input_ids"][0].tolist()


def test_word_level_with_a_normalizer(tmp_path: Path) -> None:
    words = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "how", "to", "user", "assistant", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = llava_folder(tmp_path, tokenizer, LLAVA_WITH_BOS)
    edit(folder / "tokenizer_config.json", unk_token="<unk>")
    processor, chat = AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)
    expected = ask_processor(processor, "How to zzz", None)["input_ids"][0].tolist()
    assert chat.encode("How to zzz") == expected
    assert expected == [0, 7, 9, 5, 6, 2, 8, 9]  # the unknown word is `<unk>`, and that is no control token
    assert chat.decode(expected) == AutoTokenizer.from_pretrained(folder).decode(expected, skip_special_tokens=True)
    assert chat.decode(np.array(expected), skip_special=False) == "<s> user : how to <unk> assistant :"


def test_the_tiny_vlm_of_the_examples() -> None:
    if not (CHECKPOINT / "tokenizer.json").is_file():
        pytest.skip("examples/tiny_vlm/checkpoint is not here")
    processor, chat = AutoProcessor.from_pretrained(CHECKPOINT), ChatTokenizer.open(CHECKPOINT)
    preprocessor = ImagePreprocessor.open(CHECKPOINT)
    for image in (None, preprocessor.blank_image(), Image.effect_noise((40, 23), 90)):
        asked = ask_processor(processor, "how to paint the lamp", image)
        count = 0
        if image is not None:
            pixels = preprocessor.pixel_values([image])
            np.testing.assert_allclose(pixels, asked["pixel_values"], atol=1e-6)
            count = asked["input_ids"][0].tolist().count(chat.image_token_id)
        assert chat.encode("how to paint the lamp", image_tokens=count) == asked["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens_decoder": {"2": {"content": "<image>", "special": True}}},
        {"added_tokens_decoder": {"2": {"content": "<image>", "special": False, "lstrip": True}}},
        {"extra_special_tokens": ["<image>"], "pad_token": "[PAD]"},
        {"additional_special_tokens": ["<image>", "the"]},
        {"eos_token": "<plain>", "bos_token": "<lamp>"},
        {"image_token": "<image>", "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True}},
    ],
)
def test_tokens_that_only_the_config_declares(tmp_path: Path, changes: dict) -> None:
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("<plain>", rstrip=True)])
    folder = text_folder(tmp_path, tokenizer, None)
    edit(folder / "tokenizer_config.json", **changes)
    theirs, chat = AutoTokenizer.from_pretrained(folder), ChatTokenizer.open(folder)
    text = "the lamp <image> <image>x <mask> [PAD] the <plain> <lamp>"
    assert chat.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    ids = list(range(theirs.backend_tokenizer.get_vocab_size()))
    assert chat.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_older_special_tokens_map(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, bpe("<end>"), "{{ messages[0].content }}{{ eos_token }}")
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>", "lstrip": False}}))
    theirs, chat = AutoTokenizer.from_pretrained(folder), ChatTokenizer.open(folder)
    assert chat.render("how") == "how<end>"
    assert chat.encode("how") == theirs.apply_chat_template([{"role": "user", "content": "how"}])["input_ids"]
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"1": {"content": "</s>", "special": True}})
    assert AutoTokenizer.from_pretrained(folder).eos_token is None  # the newer table rules the older file out
    assert ChatTokenizer.open(folder).render("how") == "how"


def test_truncation_and_padding_left_by_training_are_off(tmp_path: Path) -> None:
    tokenizer = bpe("<pad>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_id=2, pad_token="<pad>")
    folder = text_folder(tmp_path, tokenizer, None)
    assert '"max_length": 4' in (folder / "tokenizer.json").read_text()
    prompt = "how to paint the lamp with the assistant"
    assert ChatTokenizer.open(folder).encode(prompt) == AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]


@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_text_is_encoded_as_transformers_does(prompt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not any(_SHARED):
        folder = llava_folder(tmp_path_factory.mktemp("llava"), bpe("<pad>", "<image>", adds_bos=True), LLAVA)
        _SHARED.extend([AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)])
    processor, chat = _SHARED
    assert chat.encode(prompt) == ask_processor(processor, prompt, None)["input_ids"][0].tolist()


_SHARED: list = []


# ------------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.first %}{{ m.content }}{% continue %}{% endif %}never{% endfor %}",
        "{% set ns = namespace(seen=0) %}{% set ns.seen = ns.seen + 1 %}{{ ns.seen }}{{ messages[0]['content'] }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% if tools is none and not documents and pad_token is undefined %}{{ messages[0].content }}{% endif %}",
        "  {% if true %}\n  {{ messages[0].content }}\n  {% endif %}\n",
        "{{ messages[0].content }}{{ dict(a=1).a }}{{ strftime_now('%Y') }}",
        "{{ messages[0].content[:4] | title }}{{ messages[0].content }}",
    ],
)
def test_the_dialect_of_templates(tmp_path: Path, template: str) -> None:
    folder = text_folder(tmp_path, bpe(), template)
    message = [{"role": "user", "content": '<b>it\'s & "größe"</b>'}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        message, tokenize=False, add_generation_prompt=True
    )
    assert ChatTokenizer.open(folder).render(message[0]["content"]) == theirs


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """In transformers' order; a processor's own template comes before the tokenizer's."""

    def shown() -> str:
        return ChatTokenizer.open(folder).render("x")

    folder = text_folder(tmp_path / "text", bpe(), None)
    edit(folder / "tokenizer_config.json", chat_template="config {{ messages[0].content }}")
    assert shown() == "config x"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "list {{ messages[0].content }}"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert shown() == "list x"
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert shown() == "file x"
    edit(folder / "chat_template.json", chat_template="legacy {{ messages[0].content }}")
    assert shown() == "file x"
    edit(folder / "processor_config.json", processor_class="LlavaProcessor")
    assert shown() == "legacy x"
    edit(folder / "processor_config.json", chat_template={"default": "processor {{ messages[0].content }}"})
    assert shown() == "processor x"


@pytest.mark.parametrize(
    "template, multimodal, content",
    [
        (LLAVA, True, "parts"),
        (LLAVA, False, "parts"),  # whatever the folder is: a string would be dropped without a word
        (CHATML, False, "string"),
        (CHATML, True, "string"),  # a list would raise
        ("{{ messages[0].content }}", True, "string"),  # a list would be printed as Python
        ("{{ messages[0].content | tojson }}", True, "string"),  # or as JSON
        ("{{ messages[0].content | upper }}", True, "string"),
        (STRING_OR_PARTS, True, "parts"),
        (STRING_OR_PARTS, False, "string"),
    ],
)
def test_what_a_template_wants_in_a_message(tmp_path: Path, template: str, multimodal: bool, content: str) -> None:
    folder = text_folder(tmp_path, bpe("<image>"), template)
    if multimodal:
        edit(folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    assert ChatTokenizer.open(folder).content == content


def test_a_template_of_strings_gets_the_image_in_front(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, bpe("<pad>", "<image>"), "USER: {{ messages[0].content.strip() }} ASSISTANT:")
    assert ChatTokenizer.open(folder).render("how", 1) == "USER: <image>\nhow ASSISTANT:"


# ------------------------------------------------------------------------------------------------------- numbers of ids


@pytest.mark.parametrize(
    "files, eos, pad",
    [
        ({}, {1}, 1),
        ({"config.json": {"eos_token_id": 7, "vocab_size": 300}}, {7}, 7),
        ({"config.json": {"text_config": {"eos_token_id": 7, "pad_token_id": -1}}}, {7}, 7),
        ({"genai_config.json": {"model": {"eos_token_id": [7, 8], "pad_token_id": 9}}}, {7, 8}, 9),
        ({"generation_config.json": {"eos_token_id": [5, 6], "pad_token_id": 0}}, {5, 6}, 0),
        ({"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 7}}, {5}, 5),
        ({"tokenizer_config.json": {"pad_token": "<new>"}, "config.json": {"vocab_size": 280}}, {1}, 1),
    ],
)
def test_where_generation_stops(tmp_path: Path, files: dict, eos: set[int], pad: int) -> None:
    folder = text_folder(tmp_path, bpe(), None)
    for name, changes in files.items():
        edit(folder / name, **changes)
    chat = ChatTokenizer.open(folder)
    assert (chat.bos_id, chat.eos_ids, chat.pad_id) == (0, frozenset(eos), pad)


def test_where_the_image_token_is_found(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, bpe("<image>", "<picture>"), None)
    assert ChatTokenizer.open(folder).image_token is None
    edit(folder / "config.json", image_token_index=3)
    assert ChatTokenizer.open(folder).image_token == "<picture>"
    edit(folder / "config.json", image_token_index=40)  # an ordinary piece
    assert ChatTokenizer.open(folder).image_token is None
    edit(folder / "config.json", image_token_index=None, vision_config={})
    assert ChatTokenizer.open(folder).image_token == "<image>"
    edit(folder / "processor_config.json", image_token="<picture>")
    assert ChatTokenizer.open(folder).image_token == "<picture>"
    edit(folder / "tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})
    assert ChatTokenizer.open(folder).image_token == "<image>"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("text", ["<image>", "</s>", "<s>", "<|im_end|>", "<turn>", "<IMAGE>"])
def test_a_prompt_cannot_take_control(tmp_path: Path, text: str) -> None:
    """transformers makes each of these one token. `<turn>` is not flagged special, but the template writes it."""
    tokenizer = bpe("<pad>", "<image>", "<|im_end|>")
    tokenizer.add_tokens(["<turn>", "<think>"])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=True)])
    tokenizer.normalizer = normalizers.Lowercase()
    folder = llava_folder(tmp_path, tokenizer, "<turn>" + LLAVA)
    chat = ChatTokenizer.open(folder)
    if text == "<IMAGE>":
        assert chat.image_token_id in chat.tokenizer.encode(text).ids
    for images in (0, 16):
        line = refusal(lambda images=images: chat.encode(f"ignore {text} that", image_tokens=images), PromptsUnusable)
        assert line == (
            f"the prompt 'ignore {text} that' contains {text.lower()!r}, a control token of {folder}; "
            "remove it from the prompt"
        )
    assert chat.encode("a <think>ing </S> man; 1 < 2")


def test_other_prompts_that_are_refused(tmp_path: Path) -> None:
    chat = ChatTokenizer.open(text_folder(tmp_path, bpe(), None))
    assert (
        refusal(lambda: chat.encode(""), PromptsUnusable)
        == f"{tmp_path}: the prompt '' gives no tokens; write a prompt"
    )
    assert refusal(lambda: chat.encode("a\ud800"), PromptsUnusable) == (
        "the prompt 'a\\ud800' holds a lone surrogate; write it in plain UTF-8"
    )


def test_images_that_are_refused(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text", bpe(), None)
    chat = ChatTokenizer.open(folder)
    assert refusal(lambda: chat.encode("how", image_tokens=4), GuardError) == (
        f"{folder}: has no image token, so it takes text only; use the folder of a vision-language model"
    )

    folder = llava_folder(tmp_path / "llava", bpe("<pad>", "<image>"), LLAVA)
    edit(folder / "config.json", image_token_index=32000)
    chat = ChatTokenizer.open(folder)
    assert chat.encode("how")
    assert refusal(lambda: chat.encode("how", image_tokens=4), GuardError) == (
        f"{folder}: the image token '<image>' is 3 in the tokenizer and 32000 in the model's config; "
        "copy the tokenizer of the model again"
    )
    edit(folder / "config.json", image_token_index=3)
    edit(folder / "processor_config.json", processor_class="BlipProcessor")
    chat = ChatTokenizer.open(folder)
    assert refusal(lambda: chat.encode("how", image_tokens=4), GuardError) == (
        f"{folder}: the text that BlipProcessor writes for a picture is not known; use text-only prompts, or prepare the "
        "prompt's inputs elsewhere"
    )

    folder = llava_folder(tmp_path / "other", bpe("<pad>", "<image>"), LLAVA.replace("<image>", "<img>"))
    chat = ChatTokenizer.open(folder)
    assert refusal(lambda: chat.encode("how", image_tokens=4), GuardError) == (
        f"{folder}: its chat template writes the image token '<image>' 0 times for 1 images; "
        "use the chat template that belongs to this model"
    )
    (folder / "chat_template.jinja").write_text("<image>" + LLAVA)
    chat = ChatTokenizer.open(folder)
    assert "writes the image token '<image>' 1 times for 0 images" in refusal(lambda: chat.encode("how"), GuardError)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def line() -> str:
        return refusal(lambda: ChatTokenizer.open(tmp_path), ModelUnreadable)

    assert line() == f"{tmp_path}: has no tokenizer.json; copy the tokenizer of the model into this folder"
    (tmp_path / "tokenizer.json").write_text("404: not found")
    assert re.fullmatch(
        re.escape(f"{tmp_path}/tokenizer.json: is not a tokenizer that can be read (")
        + ".+"
        + re.escape("); copy it from the model again"),
        line(),
    )
    text_folder(tmp_path, bpe(), None)
    (tmp_path / "config.json").write_text("[1]")
    assert line() == f"{tmp_path}/config.json: holds a list, expected an object; copy it from the model again"
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    assert line().startswith(f"{tmp_path}/config.json: cannot be read ('utf-8' codec can't decode byte 0xff")
    (tmp_path / "config.json").unlink()
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={"x": {}})
    assert line() == (
        f"added_tokens_decoder in {tmp_path}/tokenizer_config.json is malformed (invalid literal for int() with "
        "base 10: 'x'); copy the tokenizer of the model again"
    )
    edit(
        tmp_path / "tokenizer_config.json", added_tokens_decoder=None, chat_template=[{"name": "rag", "template": "x"}]
    )
    assert line() == f"{tmp_path}: has chat templates rag, none named default; name one of them default"
    edit(tmp_path / "tokenizer_config.json", chat_template={"default": 3})
    assert line() == f"{tmp_path}: its chat template is of type int, not text; copy it from the model again"


def test_a_tokenizer_that_panics_is_refused(tmp_path: Path) -> None:
    """tokenizers panics on it, which Python sees as a BaseException."""
    tokenizer = json.loads(bpe().to_str()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": None}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(lambda: ChatTokenizer.open(tmp_path), ModelUnreadable)
    assert line.startswith(f"{tmp_path}/tokenizer.json: is not a tokenizer that can be read (")


@pytest.mark.parametrize(
    "template, line",
    [
        ("{% for %}", "its chat template is malformed (Expected an expression, got 'end of statement block', line 1); "
                      "copy it from the model again"),
        ("{{ raise_exception('system role needed') }}",
         "its chat template prints no prompt (its chat template fails (system role needed)); "
         "use the chat template that belongs to this model"),
        ("hello", "its chat template prints no prompt (it leaves the prompt out); "
                  "use the chat template that belongs to this model"),
        ("{{ messages.append(1) }}",
         "its chat template prints no prompt (its chat template fails (access to attribute 'append' of 'list' object "
         "is unsafe)); use the chat template that belongs to this model"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}",
         "its chat template prints no prompt (its chat template fails (access to attribute '__class__' of 'str' object "
         "is unsafe)); use the chat template that belongs to this model"),
    ],
)  # fmt: skip
def test_templates_that_are_refused(tmp_path: Path, template: str, line: str) -> None:
    folder = text_folder(tmp_path, bpe(), template)
    assert refusal(lambda: ChatTokenizer.open(folder), ModelUnreadable) == f"{folder}: {line}"


def test_a_template_that_fails_on_one_prompt(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if 'boom' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    chat = ChatTokenizer.open(text_folder(tmp_path, bpe(), template))
    assert chat.encode("fine")
    assert refusal(lambda: chat.encode("boom"), ModelUnreadable) == (
        f"{tmp_path}: its chat template fails (no); use the chat template that belongs to this model"
    )


def test_no_torch_in_an_apps_path() -> None:
    code = (
        "import sys, vlmguard.runtime.chat.chat, vlmguard.runtime.images.images;"
        "print(*sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
