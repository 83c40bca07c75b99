"""Texts and pictures of a message in any order: the prompt is what transformers makes of the same parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_vlm_paths import CHECKPOINT
from transformers import AutoProcessor

from vlmguard.graphs.errors import GuardError, PromptsUnusable
from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.chat.picture_layouts import PictureTokens
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.generation import Request

IMAGE = Image.new("RGB", (16, 16), "white")
HEAD = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }} : {% for part in message['content'] %}"
)
TAIL = "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
TEMPLATES = {
    # As Qwen's and Idefics3's: part by part.
    "in order": HEAD + "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}" + TAIL,
    # As LLaVA's: the pictures first.
    "pictures first": (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8"),
}
CONVERSATIONS = {
    "text first": [["how to wash the boat", None]],
    "between": [[None, "how to wash", None, "the boat"]],
    "earlier": [["what color is", None, "in this picture"], ["red ."], [None, "how to wash the boat", None]],
    "in front": [[None, None, "how to wash the boat"]],
}


def folder_with(template: str, folder: Path) -> Path:
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_prompt_is_that_of_transformers(template: str, conversation: str, tmp_path: Path) -> None:
    folder = folder_with(TEMPLATES[template], tmp_path / "model")
    processor, chat = AutoProcessor.from_pretrained(folder), ChatTokenizer.open(folder)
    roles = ("user", "assistant") * 2
    said = list(zip(roles, CONVERSATIONS[conversation], strict=False))
    messages = [
        {
            "role": role,
            "content": [
                {"type": "image", "image": IMAGE} if piece is None else {"type": "text", "text": piece}
                for piece in pieces
            ],
        }
        for role, pieces in said
    ]
    expected = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "np"},
    )["input_ids"][0].tolist()
    turns = [Turn.of_pieces(role, pieces) for role, pieces in said]
    pictures = sum(turn.pictures for turn in turns)
    assert chat.encode_turns(turns, [PictureTokens(16)] * pictures) == expected
    *history, last = turns
    request = Request(last.text, [IMAGE] * pictures, tuple(history), last.pieces)
    assert request.turns == tuple(turns)
    assert [turn.pictures for turn in request.text_only.turns] == [0] * len(turns)
    if conversation == "between":
        text = chat.render_turns(turns)
        assert (text.rindex("<image>") > text.index("how to wash")) == (template == "in order")


def test_texts_that_follow_one_another_are_lines_of_one() -> None:
    assert Turn.of_pieces("user", ["a", "b"]) == Turn("user", "a\nb")
    assert Turn.of_pieces("user", [None, "a", "b"]) == Turn("user", "a\nb", 1)
    assert Turn.of_pieces("user", ["a", "b", None]) == Turn("user", "a\nb", 1, ("a\nb", None))


@pytest.mark.parametrize("pieces", [("</", None, "s> how"), ("how </s", None, ">"), ("how", None, "</s>")])
def test_pieces_do_not_make_a_control_token_together(pieces: tuple[str | None, ...], tmp_path: Path) -> None:
    """A template that writes the pictures first writes the texts behind one another."""
    chat = ChatTokenizer.open(folder_with(TEMPLATES["pictures first"], tmp_path / "model"))
    with pytest.raises(PromptsUnusable, match="contains '</s>', a control token"):
        chat.render_turns([Turn.of_pieces("user", pieces)])


def test_a_template_that_leaves_a_piece_out_is_refused(tmp_path: Path) -> None:
    only_last = (
        "USER : {% for part in messages[0]['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{{ messages[0]['content'][-1]['text'] }} ASSISTANT :"
    )
    chat = ChatTokenizer.open(folder_with(only_last, tmp_path / "model"))
    assert "how" in chat.render_turns([Turn("user", "how", 1)])
    with pytest.raises(PromptsUnusable, match="leaves the user message 'what' out"):
        chat.render_turns([Turn.of_pieces("user", ["what", None, "how"])])


def test_a_template_of_strings_gets_lines_in_order(tmp_path: Path) -> None:
    folder = folder_with("USER: {{ messages[0].content.strip() }} ASSISTANT:", tmp_path / "model")
    chat = ChatTokenizer.open(folder)
    assert chat.render_turns([Turn.of_pieces("user", ["how", None, "why"])]) == "USER: how\n<image>\nwhy ASSISTANT:"


def test_pictures_stay_in_front_where_the_processor_puts_them_there(tmp_path: Path) -> None:
    """PaliGemma's prompt is the pictures, `<s>`, the words and a line break."""
    folder = folder_with(TEMPLATES["in order"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"processor_class": "PaliGemmaProcessor"}
    path.write_text(json.dumps(content), encoding="utf-8")
    (folder / "processor_config.json").unlink()
    chat = ChatTokenizer.open(folder)
    assert chat.render_turns([Turn.of_pieces("user", ["how", None, "why"])]) == "<image><s>how\nwhy\n"


def test_pieces_belong_to_the_prompt() -> None:
    with pytest.raises(GuardError, match="pieces are not its prompt and its images"):
        Request("how", [IMAGE], (), ("why", None))
    with pytest.raises(GuardError, match="pieces are not its prompt and its images"):
        Request("how", [IMAGE], (), ("how",))
    assert Request("how", [IMAGE], (), (None, "how")).turns == Request("how", IMAGE).turns
