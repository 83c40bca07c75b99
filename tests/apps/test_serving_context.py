"""The longest conversation that a server takes: what the model's configs say, and what the operator allows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmguard.apps.serving.context import context_limit
from vlmguard.apps.serving.settings import ServeSettings
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.package import ModelPackage


def limit(folder: Path, asked: int | None = None, **configs: Any) -> int:
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    vlm: Any = SimpleNamespace(package=ModelPackage(folder, folder / "model.onnx", "genai"))
    return context_limit(vlm, ServeSettings("m", max_context=asked))


GENAI = {"model": {"context_length": 300, "decoder": {}}, "search": {"max_length": 200}}


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({"config": {"max_position_embeddings": 100}}, 100),
        ({"config": {"text_config": {"max_position_embeddings": 100}}}, 100),
        ({"config": {"n_positions": 100}}, 100),
        ({"genai_config": GENAI}, 300),
        ({"genai_config": {"search": GENAI["search"]}}, 200),
        ({"genai_config": {"model": {"context_length": True}, "search": {"max_length": 200}}}, 200),
        ({"config": {"max_position_embeddings": 100}, "genai_config": GENAI}, 100),
        ({"config": {"max_position_embeddings": True}, "genai_config": GENAI}, 300),
        ({"config": {"max_position_embeddings": -1}, "genai_config": GENAI}, 300),
    ],
    ids=str,
)
def test_the_configs_give_the_limit(tmp_path: Path, configs: dict[str, Any], expected: int) -> None:
    assert limit(tmp_path, **configs) == expected
    assert limit(tmp_path, 50, **configs) == 50  # the operator may allow less
    assert limit(tmp_path, 5000, **configs) == expected  # and not more than the model knows


@pytest.mark.parametrize("configs", [{}, {"genai_config": {"model": {}, "search": {"max_length": 0}}}], ids=str)
def test_without_a_limit_nothing_is_served(tmp_path: Path, configs: dict[str, Any]) -> None:
    with pytest.raises(GuardError) as raised:
        limit(tmp_path, **configs)
    assert str(raised.value) == (
        f"{tmp_path}: no config gives the model's context length (max_position_embeddings of config.json, or context_length of "
        "genai_config.json); give --max-context"
    )
    assert limit(tmp_path, 64, **configs) == 64


def test_a_limit_of_zero_is_refused() -> None:
    with pytest.raises(GuardError, match="max_context 0 is out of range; choose 1 or more"):
        ServeSettings("m", max_context=0)
