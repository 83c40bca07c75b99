"""Directions from the ONNX graph are those of the torch checkpoint, and point from harmless to harmful.

torch's side is independent: the checkpoint in transformers, states taken by hooks, the SVD in float64 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlm_paths import ANCHORS, CHECKPOINT, PROMPTS, SOURCE

from vlmguard.exporter.extract_directions import extract_directions
from vlmguard.exporter.extraction.estimators import ESTIMATORS
from vlmguard.exporter.extraction.extract import collect_answer_states, collect_states, extract_all_layers, tapped
from vlmguard.exporter.prompts.labelled import AnchorPair, read_anchors
from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.digests import sha256_file
from vlmguard.graphs.directions import Directions, read_directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.taps import STATES_OUTPUT
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("zoo_fixtures",)

PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


@pytest.fixture(scope="module")
def anatomy(model: VisionLanguageModel) -> DecoderAnatomy:
    return dissect(model.package.load_decoder(), model.package.expected_layers)


@pytest.fixture(scope="module")
def pairs() -> list[AnchorPair]:
    return read_anchors(ANCHORS)


@pytest.fixture(scope="module")
def found(model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair]) -> Directions:
    return extract_all_layers(model, anatomy, pairs, rank=4)


# ids of one row -> states of every token, `[tokens, layers, d]` float64
TorchStates = Callable[[Sequence[int]], np.ndarray]


@pytest.fixture(scope="module")
def in_torch() -> Iterator[TorchStates]:
    """The checkpoint in transformers, one unpadded row at a time."""
    from transformers import LlavaForConditionalGeneration

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, local_files_only=True).eval()
    layers: list[np.ndarray] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        layers.append(state[0].double().numpy())

    for layer in checkpoint.model.language_model.layers:
        layer.register_forward_hook(record)

    def states(row: Sequence[int]) -> np.ndarray:
        layers.clear()
        with torch.no_grad():
            checkpoint(input_ids=torch.tensor([list(row)]))
        return np.stack(layers, axis=1)

    yield states
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def torch_states(model: VisionLanguageModel, pairs: list[AnchorPair], in_torch: TorchStates) -> np.ndarray:
    """The checkpoint's states at the last token of every anchor, `[pairs, harmful and harmless, layers, d]` float64."""
    texts = [text for pair in pairs for text in (pair.harmful, pair.harmless)]
    rows = [in_torch(model.chat.encode(text))[-1] for text in texts]
    return np.stack(rows).reshape(len(pairs), 2, *rows[0].shape)


# ---------------------------------------------------------------------------------------------------- torch's truth


def test_states_at_the_last_token_equal_torch(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair], torch_states: np.ndarray
) -> None:
    texts = [Request(text) for pair in pairs for text in (pair.harmful, pair.harmless)]
    states = collect_states(tapped(model, anatomy), texts)
    expected = torch_states.reshape(len(texts), anatomy.layer_count, anatomy.width)
    assert states.shape == expected.shape and states.dtype == np.float32
    for layer in range(anatomy.layer_count):
        scale = np.abs(expected[:, layer]).max()
        assert np.abs(states[:, layer] - expected[:, layer]).max() <= 1e-5 * scale


def test_directions_equal_the_svd_of_torchs_states(found: Directions, torch_states: np.ndarray) -> None:
    """Row 1 with its sign; all rows as a space, because within it rows of near-equal weight may turn."""
    assert list(found.layers) == list(range(torch_states.shape[2])) and found.width == torch_states.shape[3]
    for number, layer in found.layers.items():
        difference = torch_states[:, 0, number] - torch_states[:, 1, number]
        rows = np.linalg.svd(difference, full_matrices=False)[2][: len(layer.ssd)]
        first = rows[0] * np.sign((difference @ rows[0]).mean())
        assert layer.ssd.shape == (4, found.width)
        assert np.abs(layer.ssd[0] - first).max() <= 1e-4
        mine = layer.ssd.astype(np.float64)
        assert np.abs(mine.T @ mine - rows.T @ rows).max() <= 1e-4


def test_plus_means_harmful_on_every_layer(found: Directions, torch_states: np.ndarray) -> None:
    for number, layer in found.layers.items():
        along = torch_states[:, :, number] @ layer.ssd.astype(np.float64).T
        harmful, harmless = along[:, 0].mean(axis=0), along[:, 1].mean(axis=0)
        assert (harmful > harmless).all()  # every row is oriented, not the first alone
        evidence = found.evidence[str(number)]
        assert evidence["harmful_mean"] == pytest.approx(harmful[0], abs=1e-3)
        assert evidence["harmless_mean"] == pytest.approx(harmless[0], abs=1e-3)
        assert evidence["mean"] == pytest.approx(harmful[0] - harmless[0], abs=1e-3) and evidence["mean"] > 0


def test_the_evidence_is_that_of_the_states(found: Directions, torch_states: np.ndarray) -> None:
    """Computed again by other means: AUC as the share of harmful-harmless pairs in the right order."""
    for number, layer in found.layers.items():
        harmful, harmless = (torch_states[:, kind, number] @ layer.ssd[0].astype(np.float64) for kind in (0, 1))
        order = np.sign(harmful[:, None] - harmless[None, :])
        evidence = found.evidence[str(number)]
        assert evidence["auc"] == pytest.approx((order.mean() + 1) / 2, abs=1e-3)
        assert evidence["std"] == pytest.approx((harmful - harmless).std(), abs=1e-3)
        difference = torch_states[:, 0, number] - torch_states[:, 1, number]
        weight = np.linalg.norm(difference, axis=0)
        share = ((difference @ layer.ssd.astype(np.float64).T) ** 2).sum(axis=0) / (weight**2).sum()
        np.testing.assert_allclose(evidence["explained"], share, atol=1e-3)
        assert 0 < sum(evidence["explained"]) <= 1 + 1e-6


def test_where_they_come_from_is_recorded(found: Directions, pairs: list[AnchorPair]) -> None:
    assert (found.pairs, found.mode, found.calibrated_layers) == (len(pairs), None, ())
    assert found.model_sha256 == sha256_file(SOURCE / "onnx" / "decoder_model_merged.onnx")


# ---------------------------------------------------------------------------------------------------- torch, int4


def test_a_checkpoint_read_in_torch_gives_the_same_directions(found: Directions, tmp_path: Path) -> None:
    """No export in between; the chat template is the same, and so are layers, signs and evidence."""
    path = tmp_path / "d.safetensors"
    told: list[tuple[str, int, int]] = []
    extract_directions(CHECKPOINT, path, anchors=ANCHORS, report_progress=lambda *event: told.append(event))
    in_torch = read_directions(path)
    assert in_torch.layers.keys() == found.layers.keys()
    assert (in_torch.pairs, in_torch.estimator, in_torch.model_sha256) == (found.pairs, "svd", None)
    for number, layer in found.layers.items():
        np.testing.assert_allclose(in_torch.layers[number].ssd[0], layer.ssd[0], atol=1e-4)
        a, b = in_torch.evidence[str(number)], found.evidence[str(number)]
        assert a["mean"] == pytest.approx(b["mean"], abs=1e-3) and a["auc"] == pytest.approx(b["auc"], abs=1e-3)
    assert told[-1] == ("extracting directions", 2 * found.pairs, 2 * found.pairs)
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]


def test_an_int4_graph_gives_directions_near_those_of_its_float_twin(zoo: Callable[[str], Any]) -> None:
    """Its weights are rounded, its stream is not: every layer's state can be tapped, and points nearly the same way."""
    rows = {}
    pairs = [AnchorPair(f"steal the {thing}", f"wash the {thing}") for thing in ("boat", "car", "vase", "bike", "pen")]
    for name in ("llama-genai-int4", "llama-genai-fp32"):
        model = VisionLanguageModel(open_package(zoo(name).folder))
        graph = model.package.load_decoder()
        quantized = any(node.op_type == "MatMulNBits" for node in graph.graph)
        assert quantized == ("int4" in name)
        anatomy = dissect(graph, model.package.expected_layers)
        rows[name] = extract_all_layers(model, anatomy, pairs, rank=1)
    rounded, exact = (found.layers for found in rows.values())
    assert rounded.keys() == exact.keys() and len(exact) == 4
    for number, layer in exact.items():
        assert layer.ssd[0] @ rounded[number].ssd[0] > 0.9


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_separates_the_anchors(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair], estimator: str
) -> None:
    made = extract_all_layers(model, anatomy, pairs[:24], rank=2, batch_size=48, estimator=estimator)
    assert made.estimator == estimator
    for number in (3, 4, 5):
        assert made.layers[number].ssd.shape == (2, anatomy.width)
        assert made.evidence[str(number)]["auc"] > 0.95 and made.evidence[str(number)]["mean"] > 0


# ------------------------------------------------------------------------------------------------------------------ sign


def test_swapped_labels_turn_the_direction_around(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair], found: Directions
) -> None:
    """A sign that the data did not decide would stay as it is when the labels are swapped."""
    swapped = [AnchorPair(pair.harmless, pair.harmful) for pair in pairs]
    turned = extract_all_layers(model, anatomy, swapped, rank=4)
    assert turned.layers.keys() == found.layers.keys()
    for number, layer in found.layers.items():
        np.testing.assert_allclose(turned.layers[number].ssd[0], -layer.ssd[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- how it is computed


def test_the_batch_size_does_not_matter(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair]
) -> None:
    """Other batches mean other padding."""
    some = pairs[:12]
    one, odd, all_of_them = (extract_all_layers(model, anatomy, some, rank=2, batch_size=size) for size in (1, 7, 64))
    for number, layer in one.layers.items():
        for other in (odd, all_of_them):
            np.testing.assert_allclose(other.layers[number].ssd[0], layer.ssd[0], atol=1e-5)


def test_the_tap_gives_one_state_per_layer_however_long_the_prompt(
    model: VisionLanguageModel, anatomy: DecoderAnatomy
) -> None:
    tap = tapped(model, anatomy)
    added = tap.decoder.runner.outputs.keys() - model.decoder.runner.outputs.keys()
    assert added == {STATES_OUTPUT}
    assert tap.decoder.runner.outputs[STATES_OUTPUT].shape[1] == anatomy.layer_count
    requests = [Request("how to wash the boat"), Request("please tell me how to polish the painting")]
    for batch in ([requests[0]], requests, [replace(requests[1], image=PICTURE)]):
        outputs = tap.prefill(batch)
        assert outputs[STATES_OUTPUT].shape == (len(batch), anatomy.layer_count, anatomy.width)
        assert outputs[STATES_OUTPUT].dtype == np.float32
    # and the model says what it said without the tap
    told, expected = tap.prefill(requests)["logits"], model.prefill(requests)["logits"][:, -1:]
    np.testing.assert_allclose(told, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_states_come_in_the_order_of_the_requests(model: VisionLanguageModel, anatomy: DecoderAnatomy) -> None:
    """Requests with and without pictures run in different batches."""
    tap = tapped(model, anatomy)
    mixed = [Request("how to wash the boat", PICTURE), Request("how to wash the boat"), Request("wash it", PICTURE)]
    progress: list[tuple[int, int]] = []
    together = collect_states(tap, mixed, report_count=lambda done, total: progress.append((done, total)))
    for row, request in enumerate(mixed):
        np.testing.assert_allclose(together[row], collect_states(tap, [request])[0], atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=0.1)
    assert progress == [(2, 3), (3, 3)]


def test_states_of_answers_are_those_of_their_tokens(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, in_torch: TorchStates
) -> None:
    """As one pass over prompt and answer gives them in torch; one row per answer token, none for its end."""
    requests = [
        Request("how to wash the boat"),
        Request("how to steal the boat"),
        Request("tell me how to mend the vase"),
    ]
    collected = collect_answer_states(tapped(model, anatomy), requests, max_new_tokens=30)
    assert len({len(states) for states in collected}) > 1  # answers of different lengths in one batch
    for request, states in zip(requests, collected, strict=True):
        said = [step.tokens[0] for step in model.steps([request])]
        assert said[-1] is None
        prompt = model.chat.encode(request.prompt)
        whole = in_torch([*prompt, *said[:-1]])
        assert states.shape == (len(said) - 1, anatomy.layer_count, anatomy.width)
        np.testing.assert_allclose(states, whole[len(prompt) :], atol=1e-4)


def test_a_graph_that_cannot_be_padded_gives_the_same_directions(zoo: Callable[[str], Any]) -> None:
    """Its prompts run in batches of one length each; another order of the anchors makes other batches."""
    model = VisionLanguageModel(open_package(zoo("llama-genai-fp32").folder))
    anatomy = dissect(model.package.load_decoder(), model.package.expected_layers)
    pairs = [AnchorPair("steal " + "x" * n, "wash it" + "y" * (n % 3)) for n in range(5)]
    forward, backward = (extract_all_layers(model, anatomy, p, rank=1) for p in (pairs, pairs[::-1]))
    assert len(forward.layers) == 4
    for number, layer in forward.layers.items():
        np.testing.assert_allclose(backward.layers[number].ssd, layer.ssd, atol=1e-4)


def test_there_are_never_more_rows_than_pairs(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, pairs: list[AnchorPair]
) -> None:
    few = extract_all_layers(model, anatomy, pairs[:3], rank=8)
    many = extract_all_layers(model, anatomy, pairs[:12], rank=8)
    assert {layer.ssd.shape[0] for layer in few.layers.values()} == {3}
    assert {layer.ssd.shape[0] for layer in many.layers.values()} == {8}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_anchors_that_do_not_differ_are_refused(model: VisionLanguageModel, anatomy: DecoderAnatomy) -> None:
    with pytest.raises(GuardError) as caught:
        extract_all_layers(model, anatomy, [AnchorPair("wash it", "wash it")] * 3)
    assert str(caught.value) == ("the anchors' hidden states do not differ; are harmful and harmless prompts the same?")


def test_states_that_overflowed_are_refused(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = tapped(model, anatomy)
    real = tap.prefill

    def broken(requests: Sequence[Request]) -> dict[str, np.ndarray]:
        outputs = real(requests)
        outputs[STATES_OUTPUT] = outputs[STATES_OUTPUT].copy()
        outputs[STATES_OUTPUT][-1, 2, 5] = np.inf
        return outputs

    monkeypatch.setattr(tap, "prefill", broken)
    with pytest.raises(GuardError) as caught:
        collect_states(tap, [Request("wash it"), Request("steal it")])
    assert str(caught.value) == (
        "the model's hidden states hold NaN or infinity from layer 2 on (channel 5); its arithmetic overflows: export the "
        "model with a float32 residual stream (--dtype w16a32 from a checkpoint, or int4 with a float32 stream), in bfloat16 "
        "or in float32"
    )
