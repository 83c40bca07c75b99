"""Hypothesis strategies: a valid package, and one file of it damaged.

    damaged_files()    a `Case`: which file of which package, what was done to it, its bytes; and what is asked then

What is damaged, and why somebody else could have written it:

    model        a decoder's graph, by `hostile.mutations`              from a hub
    directions   the safetensors beside it                              from a colleague
    manifest     guard.json of a guarded folder                         from whoever moved it
    wish         guard.toml                                             from a colleague
    companion    tokenizer, configs and chat template of a VLM          from a hub
    picture      one that is asked about                                from a user
    prompts      labelled prompts                                       from a data set

Some cases are not damaged but made to explode (`hostile.explosions`): small files that ask for any amount of time or memory.
"""

from __future__ import annotations

import copy
import io
import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from hand_graphs import decoder, directions, merged
from hostile.explosions import EXPLOSIONS
from hostile.mutations import ODD_NAMES, damaged, mutated
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm_paths import EVALUATION, SOURCE

TARGETS = ("model", "directions", "manifest", "wish", "companion", "picture", "prompts")
_WEIGHED = ("model",) * 12 + TARGETS + ("companion", "picture")
MODES = ("project", "restore", "steer")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, float("nan"), 2**63, 10**400, "", [], {}, [[]], *ODD_NAMES, "x" * 100_000, [0] * 1000, "{{ 1 }}",
    "<image>", {"content": None}, {"__type": "AddedToken"},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One damaged file.

    Attributes:
        target: of `TARGETS`.
        base: which of the packages, or pictures, or files; a number.
        name: of the file that was damaged.
        mode: what the model is guarded with.
        done: what was done to it.
        content: what it holds now; empty where it is damaged only when it has been made (`seed`).
        seed: of damage to a file that the run itself makes.
    """

    target: str
    base: int
    name: str
    mode: str
    done: tuple[str, ...]
    content: bytes
    seed: int

    def __repr__(self) -> str:
        return f"{self.target} {self.name} (base {self.base}, {self.mode}, seed {self.seed}): {', '.join(self.done)}"


@cache
def decoders() -> tuple[onnx.ModelProto, ...]:
    """A plain decoder, a fused one, and one whose layers lie in the branches of an If."""
    made = (decoder(layers=2), decoder("skip_norm_bias", layers=2), merged(layers=2))
    return tuple(ir.to_proto(model) for model in made)


@cache
def some_directions() -> bytes:
    from vlmguard.graphs.directions import directions_bytes

    return directions_bytes(directions((0, 1)))


def _wish(mode: str) -> bytes:
    from vlmguard.exporter.calibration.guard_config import to_toml
    from vlmguard.graphs.spec import GuardSpec

    return to_toml(GuardSpec(mode=mode), "directions.safetensors", directions((0, 1))).encode()


@st.composite
def damaged_files(draw: st.DrawFn) -> Case:
    """A case of any target."""
    target = draw(st.sampled_from(_WEIGHED))
    mode, seed = draw(st.sampled_from(MODES)), draw(st.integers(0, 2**32))
    pick = draw(st.randoms(use_true_random=False))
    if target in EXPLOSIONS and pick.random() < 0.15:
        name, kind = pick.choice(sorted(EXPLOSIONS[target]))
        return Case(target, 0, name, mode, (f"explode: {kind}",), EXPLOSIONS[target][name, kind](), seed)
    if target == "model":
        base = draw(st.integers(0, len(decoders()) - 1))
        content, done = mutated(decoders()[base], pick)
        return Case(target, base, "model.onnx", mode, done, content, seed)
    if target == "directions":
        return Case(target, 0, "directions.safetensors", mode, ("bytes",), damaged(some_directions(), pick), seed)
    if target == "manifest":  # which the run makes
        return Case(target, 0, "guard.json", mode, ("bytes",), b"", seed)
    if target == "wish":
        return Case(target, 0, "guard.toml", mode, ("bytes",), damaged(_wish(mode), pick), seed)
    if target == "companion":
        name = draw(st.sampled_from(COMPANIONS))
        content, done = _companion((SOURCE / name).read_bytes(), name, pick)
        return Case(target, 0, name, mode, done, content, seed)
    if target == "picture":
        kind = draw(st.sampled_from(PICTURES))
        return Case(target, 0, f"picture.{kind.lower()}", mode, ("bytes",), damaged(_picture(kind), pick), seed)
    rows = [row for row in EVALUATION.read_bytes().splitlines(keepends=True) if b'"image": null' in row]
    rows = rows[:: draw(st.integers(20, 60))]
    if draw(st.booleans()):
        at = pick.randrange(len(rows))
        rows[at], done = _json(rows[at], pick)
        return Case(target, 0, "prompts.jsonl", mode, done, b"".join(rows), seed)
    return Case(target, 0, "prompts.jsonl", mode, ("bytes",), damaged(b"".join(rows), pick), seed)


def _companion(content: bytes, name: str, pick: random.Random) -> tuple[bytes, tuple[str, ...]]:
    if name.endswith(".json") and pick.random() < 0.7:
        return _json(content, pick)
    return damaged(content, pick), ("bytes",)


def _json(content: bytes, pick: random.Random) -> tuple[bytes, tuple[str, ...]]:
    """Values and keys of a JSON document changed, in a few places."""
    document = json.loads(content)
    done = []
    for _ in range(pick.choice((1, 1, 2, 4))):
        holder, key = _place(document, pick)
        if holder is None:
            break
        kind = pick.choice(("value", "value", "delete", "key", "deep"))
        if kind == "value":
            holder[key] = copy.deepcopy(pick.choice(ODD_VALUES))  # the next change may be in it
        elif kind == "delete":
            del holder[key]
        elif kind == "key" and isinstance(holder, dict):
            holder[pick.choice(ODD_NAMES)] = holder.pop(key)
        else:
            kind = "deep"
            for _ in range(pick.choice((5, 200))):
                holder[key] = [holder[key]]
        done.append(kind)
    return json.dumps(document).encode("utf-8", "surrogatepass") + b"\n", tuple(done)


def _place(document: Any, pick: random.Random) -> tuple[Any, Any]:
    """Some place in it, deep or not: what holds it and its key there."""
    holder, key = None, None
    here = document
    while isinstance(here, (dict, list)) and here and (holder is None or pick.random() < 0.7):
        holder, key = here, pick.choice(list(here)) if isinstance(here, dict) else pick.randrange(len(here))
        here = holder[key]
    return holder, key


@cache
def _picture(kind: str) -> bytes:
    made = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(made, kind)
    return made.getvalue()
