"""Tokenizers that panic, or that make a text far longer than it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_vlm_paths import SOURCE

from vlmguard.graphs.errors import ModelUnreadable
from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.chat.tokenizer_calls import tokenizer_calls


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}


def template(copies: int) -> dict[str, Any]:
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": pair[:1] * copies,
            "pair": pair,
            "special_tokens": {},
        }
    }


def changed(tmp_path: Path, change: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("onnx"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelUnreadable) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sequence(*[replace({"String": "a"}, "aa")] * 30), "more than 64 times as long"),
        (sequence(*[replace({"String": "a"}, "a" * 9)] * 2), "more than 64 times as long"),
        (sequence(replace({"String": ""}, "x" * 64)), "more than 64 times as long"),
        (sequence(replace({"Regex": "a"}, "x" * 64)), "more than 64 times as long"),
        (sequence({"type": "Prepend", "prepend": "x" * 4097}), "4096 characters longer"),
        (sequence(*[{"type": "Lowercase"}] * 300), "it has 303 parts, expected at most 256"),
        (template(100_000), "more than 64 times as long"),
    ],
)
def test_a_tokenizer_that_makes_texts_far_longer_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = changed(tmp_path, change)
    line = refusal(lambda: ChatTokenizer.open(folder))
    assert line.startswith(f"{folder / 'tokenizer.json'}: is not a tokenizer that can be read (it ") and reason in line


@pytest.mark.parametrize(
    "change",
    [
        sequence({"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581"), {"type": "Lowercase"}),
        sequence(*[replace({"String": "a"}, "aa")] * 6),
        template(1),
    ],
)
def test_what_known_tokenizers_do_is_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    assert ChatTokenizer.open(changed(tmp_path, change)).encode("hello")


def test_a_tokenizer_that_panics_at_a_text_is_refused_in_one_line(tmp_path: Path) -> None:
    """Oniguruma gives up after so many tries, and the Rust code panics: that is no Exception in Python."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    folder = changed(tmp_path, {"pre_tokenizer": split})
    chat = ChatTokenizer.open(folder)
    assert chat.encode("hello")
    line = refusal(lambda: chat.encode("a" * 60 + "!"))
    assert line.startswith(f"{folder}: its tokenizer fails (Onig") and line.endswith("); copy it from the model again")


def test_what_ends_the_program_is_not_taken_for_the_tokenizers_failure() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_calls(Path("m")):
        raise KeyboardInterrupt
