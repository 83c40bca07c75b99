"""Folders of transformers' `export_for_generation`: both decoders say what torch says, and have the same layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from zoo.generation_folders import DECODE, FOLDERS, HEAD, PROMPT, GenerationFolder

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.exporters")

from zoo.oracle import SLACK, run_graph
from zoo.truth import recorded_layers

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.graph_io import load_graph

pytestmark = pytest.mark.zoo  # minutes to export
every_folder = pytest.mark.parametrize("name", FOLDERS)
Folders = Callable[[str], GenerationFolder]

TOLERANCE = 1e-4
PROMPTS = [(2, 9, 1), (3, 10, 2), (2, 12, 3)]


def counted(name: str, part: str, calls: dict[str, Any], length: int) -> np.ndarray:
    """`[batch, length]`: where a part's graph has to say what torch says. What a model says of padding means nothing.

    transformers 5.23 loses how far the cache of Gemma 3's sliding layers has slid, and `decode.onnx` reads the padding mask
    there from its beginning: behind a prompt longer than the window (6 here), padded rows see too little, others are right.
    """
    mask = calls[DECODE][1]["attention_mask"].numpy().astype(bool)
    if part != DECODE:
        return mask[:, :length]
    padded = ~mask.all(axis=1, keepdims=True)
    return ~padded if name == "gemma3-generation" else np.ones_like(padded)


@every_folder
def test_prompt_head_and_decode_say_what_torch_says(generation_folders: Folders, name: str) -> None:
    """Each graph on what `generate()` gave that part of the model; the last layers' cache included."""
    folder = generation_folders(name)
    assert folder.name == name
    for prompt in PROMPTS:
        calls = folder.calls(*prompt)
        for part, output in ((PROMPT, "last_hidden_state"), (HEAD, "output"), (DECODE, "logits")):
            module, inputs = calls[part]
            outputs = run_graph(folder.path(part), folder.feeds(part, inputs))
            answer = folder.run_torch((module, inputs))
            expected = (answer if part == HEAD else getattr(answer, output)).numpy()
            found = outputs[output]
            assert found.shape == expected.shape, (part, prompt)
            real = counted(name, part, calls, expected.shape[1])
            assert np.abs(found - expected)[real].max(initial=0) < TOLERANCE, (part, prompt)
            if part == DECODE and not real.all():  # else the exporter has mended it: count these rows too
                assert np.abs(found - expected)[~real].max() > 100 * TOLERANCE, (part, prompt)


@every_folder
@pytest.mark.parametrize("part", [PROMPT, DECODE])
def test_both_decoders_have_every_layer(generation_folders: Folders, name: str, part: str, tmp_path: Path) -> None:
    folder = generation_folders(name)
    anatomy = dissect(load_graph(folder.path(part)), folder.layers)
    assert (anatomy.layer_count, anatomy.width, anatomy.dtypes) == (folder.layers, folder.width, ("float32",))

    calls = folder.calls(2, 9, 1)
    module, inputs = calls[part]
    proto = onnx.load(folder.path(part))
    proto.graph.output.extend(onnx.ValueInfoProto(name=site.value) for site in anatomy.sites)
    onnx.save(proto, tmp_path / "tapped.onnx")
    outputs = run_graph(tmp_path / "tapped.onnx", folder.feeds(part, inputs), optimized=False)
    with recorded_layers(folder.torch_decoder) as states:
        folder.run_torch((module, inputs))
    real = counted(name, part, calls, states[0].shape[1])
    for site, state in zip(anatomy.sites, states, strict=True):
        assert np.abs(outputs[site.value] - state)[real].max() < SLACK * TOLERANCE


@every_folder
def test_the_two_graphs_hold_the_same_weights(generation_folders: Folders, name: str) -> None:
    """What makes it necessary to guard both: each is the whole decoder."""
    folder = generation_folders(name)
    assert weights(folder.path(PROMPT)) <= weights(folder.path(DECODE))


def weights(path: Path) -> set[tuple[Any, ...]]:
    matrices = (i for i in onnx.load(path).graph.initializer if len(i.dims) == 2)
    return {(*i.dims, onnx.numpy_helper.to_array(i).tobytes()) for i in matrices}
