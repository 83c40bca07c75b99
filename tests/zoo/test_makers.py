"""Every model of the zoo runs, says what torch says, and has the residual stream where its maker says it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from zoo.makers import MAKERS, ZooModel
from zoo.table import SELDOM, parameter

pytest.importorskip("onnxruntime")

from zoo.oracle import run_graph, stream_values

Zoo = Callable[[str], ZooModel]
every_model = pytest.mark.parametrize("name", [parameter(name, SELDOM) for name in MAKERS])


def worst_difference(model: ZooModel, feeds: dict[str, np.ndarray], logits: np.ndarray) -> float:
    """Between the graph's logits and torch's, over the positions that hold a token."""
    expected, counted = model.logits(feeds), model.counted(feeds)
    assert logits.shape == expected.shape
    assert counted.any()
    return float(np.abs(logits.astype(np.float32) - expected)[counted].max())


@every_model
def test_a_model_is_called_by_its_name_in_the_table(zoo: Zoo, name: str) -> None:
    assert zoo(name).name == name


@every_model
@pytest.mark.parametrize("optimized", [False, True], ids=["as-written", "optimized"])
def test_prefill_says_what_torch_says(zoo: Zoo, name: str, optimized: bool) -> None:
    model = zoo(name)
    for batch, sequence, pad in [(1, 6, 0), (2, 7, 0), (3, 7, 2), (1, 7, 3), (1, 1, 0)]:
        feeds = model.make_feeds(batch, sequence, pad)
        logits = run_graph(model.path, feeds, optimized)["logits"]
        assert np.isfinite(logits[model.counted(feeds)]).all()
        assert worst_difference(model, feeds, logits) < model.tolerance, (batch, sequence, pad)


@every_model
def test_a_step_on_the_cache_says_what_torch_says(zoo: Zoo, name: str) -> None:
    model = zoo(name)
    if not model.cache:
        pytest.skip("exported without a cache")
    for batch, sequence, pad, more in [(2, 6, 0, 1), (1, 6, 0, 3), (3, 7, 2, 1)]:
        if pad and model.padding == "right":
            continue
        feeds = model.make_feeds(batch, sequence, pad)
        following = model.next_feeds(feeds, run_graph(model.path, feeds), more)
        logits = run_graph(model.path, following)["logits"]
        assert worst_difference(model, following, logits) < model.tolerance, (batch, sequence, pad, more)


@every_model
def test_every_layer_is_a_value_of_the_graph(zoo: Zoo, name: str, tmp_path: Path) -> None:
    model = zoo(name)
    found = stream_values(model, tmp_path)
    # genai's last SkipSimplifiedLayerNormalization has no output 3: only the norm of the last sum leaves it.
    hidden = 1 if "genai" in name else 0
    assert [bool(values) for values in found] == [True] * (model.layers - hidden) + [False] * hidden
    for values in found[: model.layers - hidden]:
        assert next(iter(values.values())) == model.stream_dtype


@every_model
def test_feeds_are_exactly_the_inputs_of_the_graph(zoo: Zoo, name: str) -> None:
    model = zoo(name)
    feeds = model.make_feeds(batch=3, sequence=5, pad=2)
    assert {key: array.dtype for key, array in feeds.items()} == dict(model.inputs)
    assert model.counted(feeds).sum(axis=1).tolist() == [3, 4, 5]


def test_group_query_attention_cannot_be_padded_on_the_left(zoo: Zoo) -> None:
    model = replace(zoo("llama-genai-fp32"), padding="left")
    feeds = model.make_feeds(batch=2, sequence=7, pad=2)
    assert worst_difference(model, feeds, run_graph(model.path, feeds)["logits"]) > 1


def test_a_folder_that_is_there_is_not_exported_again(zoo: Zoo) -> None:
    model = zoo("llama-torchscript-fp32")
    before = model.path.stat().st_mtime_ns
    again = MAKERS[model.name](model.folder)
    feeds = model.make_feeds(batch=1, sequence=4)
    assert again.path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.logits(feeds), model.logits(feeds))


def test_what_cannot_be_fed_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match="4 padding tokens in a sequence of 4: a row needs a token of its own"):
        zoo("llama-torchscript-fp32").make_feeds(batch=1, sequence=4, pad=4)
    with pytest.raises(ValueError, match="llama-torchscript-fp32 was exported without a cache"):
        zoo("llama-torchscript-fp32").next_feeds({}, {})
    genai = zoo("llama-genai-fp32")
    with pytest.raises(ValueError, match="llama-genai-fp32 pads on the right"):
        genai.next_feeds(genai.make_feeds(batch=1, sequence=4, pad=2), {})
    with pytest.raises(KeyError, match="no model 'gpt' in the zoo"):
        zoo("gpt")
