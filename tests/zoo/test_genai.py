"""A guarded genai folder takes the place of the unguarded one: onnxruntime-genai opens it as it is, and generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_directions import random_directions, write_directions
from zoo.model import ZooModel

from vlmguard import GuardSpec, export, verify
from vlmguard.graphs.plan import SUPERVISOR_INPUT
from vlmguard.graphs.reference import NO_SUPERVISOR

og = pytest.importorskip("onnxruntime_genai")

PROMPT = [5, 17, 40, 123, 77]
TOKENS = 8
# Graphs without an embedding or a head of their own are parts of a pipeline, which genai does not generate with alone.
GENERATING = (
    "llama-genai-qdq-int4",
    "llama-tied-genai-fp32",
    "llama-tied-genai-int4",
    "phi3-genai-fp32",
    "phi3-genai-int4",
    "qwen3-5-genai-fp32",
)
IN_EVERY_RUN = ("llama-tied-genai-int4", "qwen3-5-genai-fp32", "llama-genai-embeds-int4")
OPENING = ("llama-genai-hidden-fp32", "llama-genai-headless-fp32", "llama-genai-embeds-int4", "qwen2-5-vl-genai-fp32")


def each(*names: str) -> list[Any]:
    """Graphs as parameters; `make long` has all."""
    return [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.zoo) for name in names]


def generated(folder: Path, supervisor: np.ndarray | None = None) -> tuple[list[int], np.ndarray]:
    """Greedy tokens after the prompt, and the logits of the prompt's last token.

    Args:
        supervisor: the coordinates that a supervised graph takes; they must live as long as the generator.
    """
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + TOKENS, min_length=len(PROMPT) + TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    if supervisor is not None:
        generator.set_model_input(SUPERVISOR_INPUT, supervisor)
    generator.append_tokens(np.array([PROMPT], np.int32))
    logits = np.array(generator.get_logits()).reshape(-1)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT) :], logits


def guarded_folder(model: ZooModel, tmp_path: Path, **spec: Any) -> Path:
    directions = random_directions(model.width, [1, model.layers - 1])
    path = write_directions(tmp_path / "directions.safetensors", directions)
    wish = GuardSpec(**spec)
    return export(model.folder, tmp_path / "guarded", spec=wish, directions=path, allow_no_effect=True).out


def require_untouched(folder: Path, source: Path) -> None:
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    named = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    assert (folder / named).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", each(*GENERATING))
def test_genai_generates_from_a_guarded_folder(zoo: Callable[[str], ZooModel], name: str, tmp_path: Path) -> None:
    model = zoo(name)
    out = guarded_folder(model, tmp_path, mode="project")
    require_untouched(out, model.folder)
    tokens, logits = generated(out)
    unguarded_tokens, unguarded_logits = generated(model.folder)
    assert len(tokens) == len(unguarded_tokens) == TOKENS
    assert np.isfinite(logits).all()
    assert np.abs(logits - unguarded_logits).max() > 0.01  # the guard is in what genai runs
    assert verify(out, model.folder).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", each("llama-genai-qdq-int4", "llama-tied-genai-fp32", "llama-tied-genai-int4"))
def test_genai_generates_the_same_behind_a_closed_gate(
    zoo: Callable[[str], ZooModel], name: str, tmp_path: Path
) -> None:
    model = zoo(name)
    out = guarded_folder(model, tmp_path, mode="restore", tau=1e6)
    tokens, logits = generated(out)
    unguarded_tokens, unguarded_logits = generated(model.folder)
    assert tokens == unguarded_tokens
    np.testing.assert_array_equal(logits, unguarded_logits)


@pytest.mark.slow
def test_genai_feeds_a_supervisor(zoo: Callable[[str], ZooModel], tmp_path: Path) -> None:
    """As `integrations/genai/answer.py` does; without it nothing runs, so that no guard is silently off."""
    model = zoo(IN_EVERY_RUN[0])
    out = guarded_folder(model, tmp_path, mode="supervise", tau=0.0)
    with pytest.raises(Exception, match=f"Missing Input: {SUPERVISOR_INPUT}"):
        generated(out)
    unguarded_tokens, unguarded_logits = generated(model.folder)
    assert generated(out, np.full((1, 2, 2), NO_SUPERVISOR, np.float32))[0] == unguarded_tokens
    assert np.abs(generated(out, np.full((1, 2, 2), 5, np.float32))[1] - unguarded_logits).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", each(*OPENING))
def test_parts_of_a_pipeline_keep_their_folder(zoo: Callable[[str], ZooModel], name: str, tmp_path: Path) -> None:
    model = zoo(name)
    out = guarded_folder(model, tmp_path, mode="project")
    require_untouched(out, model.folder)
    assert verify(out, model.folder).ok
