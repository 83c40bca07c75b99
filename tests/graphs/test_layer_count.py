"""The layer count as configs spell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_graphs import decoder

from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layer_count import LayerCount, declared_layers
from vlmguard.graphs.layouts import open_package


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"num_hidden_layers": 4}, 4),
        ({"n_layer": 4}, 4),
        ({"n_layers": 4}, 4),
        ({"num_layers": 4}, 4),
        ({"layer_types": ["full_attention"] * 4}, 4),
        ({"layers_block_type": ["mamba", "attention", "mamba", "attention"]}, 4),
        # an encoder-decoder: its `num_hidden_layers` and `num_layers` count the encoder's
        ({"decoder_layers": 3, "encoder_layers": 2, "num_hidden_layers": 2}, 3),
        ({"num_decoder_layers": 3, "num_layers": 2}, 3),
        # a VLM: the text decoder's part comes first
        ({"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 4}}, 4),
        ({"vision_config": {"num_hidden_layers": 9}, "llm_config": {"num_hidden_layers": 4}}, 4),
        ({"language_config": {"num_hidden_layers": 4}}, 4),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 4}}}, 4),
        ({"encoder": {"num_hidden_layers": 9}, "decoder": {"decoder_layers": 4, "num_hidden_layers": 9}}, 4),
        ({"text_config": {"decoder_layers": 3, "num_hidden_layers": 2}}, 3),
        ({"model": {"decoder": {"num_hidden_layers": 4}}}, 4),  # genai_config.json
    ],
)
def test_every_spelling(config: dict[str, Any], count: int) -> None:
    assert declared_layers([config]) == LayerCount(count)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4},
        {"text_config": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}},
    ],
)
def test_blocks_of_one_mixer(config: dict[str, Any]) -> None:
    assert declared_layers([config]) == LayerCount(4, (True, False, True, False))


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": "4"}, {"num_hidden_layers": True}, {"layer_types": []}])
def test_nothing_is_declared(config: dict[str, Any]) -> None:
    assert declared_layers([config]) is None


def test_what_goes_past_the_sums_is_named_by_its_key() -> None:
    gemma4 = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    shared = "keys and values that layers share (num_kv_shared_layers 2)"
    per_layer = "embeddings per layer (hidden_size_per_layer_input 8)"
    assert declared_layers([{"text_config": gemma4}]) == LayerCount(4, past_sums=(shared, per_layer))
    gemma3n = declared_layers([{"num_hidden_layers": 4, "altup_num_inputs": 4, "num_kv_shared_layers": 0}])
    assert gemma3n == LayerCount(4, past_sums=("several residual streams side by side (altup_num_inputs 4)",))
    assert declared_layers(
        [{"num_hidden_layers": 4, "altup_num_inputs": True, "num_kv_shared_layers": "2"}]
    ) == LayerCount(4)


def test_layers_of_cross_attention_are_listed() -> None:
    config = {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, "2", True]}}
    assert declared_layers([config]) == LayerCount(4, cross_attention=(1,))
    assert declared_layers([{"num_hidden_layers": 4, "cross_attention_layers": "1"}]) == LayerCount(4)


@pytest.mark.parametrize("key", ["hc_mult", "hc_count"])
def test_hyper_connections_are_several_streams(key: str) -> None:
    declared = declared_layers([{"num_hidden_layers": 4, key: 4}])
    assert declared == LayerCount(4, past_sums=(f"several residual streams side by side ({key} 4)",))
    assert declared_layers([{"num_hidden_layers": 4, key: 1}]) == LayerCount(4)


def test_the_first_config_that_declares_wins() -> None:
    assert declared_layers([{}, {"n_layer": 2}, {"n_layer": 3}]) == LayerCount(2)


def test_a_config_of_parts_in_parts_is_read_to_a_depth() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 4}
    for _ in range(500):
        config = {"model": config}
    assert declared_layers([config]) is None


def test_a_package_declares_what_its_config_does(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(graph_bytes(decoder()))
    (tmp_path / "config.json").write_text(json.dumps({"layers_block_type": ["mamba", "mlp"]}))
    package = open_package(tmp_path)
    assert package.declared_layers == LayerCount(2, (True, False))
    assert package.expected_layers == 2
