"""Small files that ask for any amount of time or memory, by what the fuzzer damages."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from exploding_graphs import doubling_functions, function_chain, many_lookups, recursive_function, woven
from hostile.templates import EXPLODING, SAID
from PIL import Image
from tiny_vlm_paths import SOURCE


def _tokenizer(**change: Any) -> bytes:
    return json.dumps(json.loads((SOURCE / "tokenizer.json").read_bytes()) | change).encode()


def _doubling_tokenizer() -> bytes:
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    return _tokenizer(normalizer={"type": "Sequence", "normalizers": [double] * 40})


def _wide_tokenizer() -> bytes:
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": single * 100_000, "pair": pair, "special_tokens": {}}
    return _tokenizer(post_processor=post)


def many_scans(scans: int) -> bytes:
    """A progressive JPEG of a megapixel whose last scan is there again and again."""
    made = io.BytesIO()
    Image.effect_noise((1000, 1000), 60).convert("RGB").save(made, "JPEG", progressive=True, quality=20)
    content = made.getvalue()
    last, end = content.rindex(b"\xff\xda"), len(content) - 2
    return content[:end] + content[last:end] * scans + content[end:]


def _bomb(kind: str) -> bytes:
    made = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(made, kind)
    return made.getvalue()


def _row(image: str) -> bytes:
    return json.dumps({"prompt": "x", "label": "harmless", "setting": "image", "image": image}).encode() + b"\n"


# target -> (file, kind) -> its content
EXPLOSIONS: dict[str, dict[tuple[str, str], Callable[[], bytes]]] = {
    "model": {
        ("model.onnx", "functions"): lambda: doubling_functions(40).SerializeToString(),
        ("model.onnx", "recursion"): lambda: recursive_function().SerializeToString(),
        ("model.onnx", "deep functions"): lambda: function_chain(300).SerializeToString(),
        ("model.onnx", "width"): lambda: woven(6, 40).SerializeToString(),
        ("model.onnx", "sources"): lambda: many_lookups(1500).SerializeToString(),
    },
    "companion": {
        **{
            ("chat_template.jinja", kind): (lambda source=source: (source + SAID).encode())
            for kind, source in EXPLODING.items()
        },
        ("tokenizer.json", "normalizers"): _doubling_tokenizer,
        ("tokenizer.json", "template"): _wide_tokenizer,
        ("config.json", "nesting"): lambda: b'{"a": ' + b"[" * 500_000,
    },
    "wish": {
        ("guard.toml", "dotted key"): lambda: b"a." * 50_000 + b"a = 1",
        ("guard.toml", "lists"): lambda: b"x = " + b"[" * 100_000,
    },
    "picture": {
        ("picture.jpeg", "scans"): lambda: many_scans(500),
        ("picture.png", "pixels"): lambda: _bomb("PNG"),
        ("picture.tiff", "pixels"): lambda: _bomb("TIFF"),
    },
    "prompts": {
        ("prompts.jsonl", "a picture elsewhere"): lambda: _row("/etc/passwd"),
        ("prompts.jsonl", "a device"): lambda: _row("/dev/zero"),
        ("prompts.jsonl", "nesting"): lambda: b"[" * 500_000,
    },
}
