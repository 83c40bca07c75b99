"""Ring caches of sliding windows: which part of their outputs contains tokens. The rest is uninitialised memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hand_graphs import text_model

from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder import DecoderSession, open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch

WINDOW, WIDTH = 6, 8
GRAPH = f"""g (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    float[batch, 1, past, {WIDTH}] past_key_values.0.key, float[batch, 1, past, {WIDTH}] past_key_values.0.value)
    => (float[batch, sequence, {WIDTH}] logits,
        float[batch, 1, present, {WIDTH}] present.0.key, float[batch, 1, present, {WIDTH}] present.0.value)
<float[9, {WIDTH}] table, int64[1] ones>
{{
    states = Gather (table, input_ids)
    counted = ReduceSum (attention_mask, ones)
    last = Sub (counted, ones)
    lengths = Cast <to=6> (last)
    shape = Shape (attention_mask)
    wide = Gather <axis=0> (shape, one)
    total = Cast <to=6> (wide)
    logits, present.0.key, present.0.value = com.microsoft.GroupQueryAttention
        <num_heads=1, kv_num_heads=1, local_window_size={WINDOW}, sliding_window_cache=1>
        (states, states, states, past_key_values.0.key, past_key_values.0.value, lengths, total)
}}"""


def session(folder: Path) -> DecoderSession:
    folder.mkdir()
    text = GRAPH.replace("int64[1] ones>", "int64[1] ones, int64 one>")
    for name in ("past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"):
        text = text.replace(name, f'"{name}"')
    (folder / "model.onnx").write_bytes(graph_bytes(text_model(text)))
    return open_decoder(open_package(folder / "model.onnx"))


def test_only_written_tokens_of_a_ring_are_compared(tmp_path: Path) -> None:
    decoder = session(tmp_path / "model")
    ids = np.array([[1, 2, 3]])
    outputs, state = decoder.prefill(PromptBatch(ids, np.ones_like(ids)))
    tokens = 3
    while tokens <= WINDOW + 1:
        written = decoder.written(outputs, tokens)
        assert outputs["present.0.key"].shape == (1, 1, WINDOW, WIDTH)
        assert written["present.0.key"].shape == (1, 1, min(tokens, WINDOW), WIDTH)
        np.testing.assert_array_equal(written["present.0.value"], np.ones((1, 1, min(tokens, WINDOW), WIDTH)))
        assert written["logits"].shape == outputs["logits"].shape
        assert list(written) == list(outputs)
        outputs = decoder.step(state, np.array([[4]]), None)
        tokens += 1
