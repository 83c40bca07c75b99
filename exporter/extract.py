"""Safety steering directions from the ONNX model itself: one tapped pass over the anchors, then an SVD per layer.

VLM-Guard (arXiv 2502.10486): `A_l[i] = h_l(q_i-) - h_l(q_i+)`, not centred; `A_l = U S V^T`; the first `m` rows of `V^T`
are the SSD of layer `l`. The sign that an SVD returns is arbitrary, so each row is oriented from the data: `+` means
harmful. Text only: the language model inside the VLM is the safety-aligned one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.digests import sha256_file
from ..graphs.directions import Directions, LayerDirections
from ..graphs.errors import GuardError
from ..graphs.spec import MAX_RANK
from ..graphs.taps import STATES_OUTPUT, tap_last_token
from ..runtime.vlm import Request, Sampling, VisionLanguageModel
from .prompts import AnchorPair

# (done, of how many)
Progress = Callable[[int, int], None]


def extract_all_layers(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    pairs: Sequence[AnchorPair],
    rank: int = 4,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Directions:
    """The SSD of every layer, with its evidence.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        pairs: anchors.
        rank: rows to keep per layer, 1..8; never more than there are pairs.
        batch_size: prompts per pass.
        progress: told after each batch.
    """
    texts = [Request(text) for pair in pairs for text in (pair.harmful, pair.harmless)]
    states = collect_states(tapped(model, anatomy), texts, batch_size, progress)
    harmful, harmless = states[0::2], states[1::2]
    layers, evidence = {}, {}
    for site in anatomy.sites:
        number = site.layer_index
        layers[number], evidence[str(number)] = _direction(harmful[:, number], harmless[:, number], rank)
    return Directions(
        width=anatomy.width,
        layers=layers,
        model_sha256=sha256_file(model.package.decoder),
        pairs=len(pairs),
        evidence=evidence,
    )


def tapped(model: VisionLanguageModel, anatomy: DecoderAnatomy) -> VisionLanguageModel:
    """The model with one output more: every layer's state at the last token."""
    graph = model.package.load_decoder()
    tap_last_token(graph, anatomy.sites)
    return model.with_decoder(graph)


def collect_states(
    model: VisionLanguageModel, requests: Sequence[Request], batch_size: int = 16, progress: Progress | None = None
) -> np.ndarray:
    """Hidden states at the last prompt token, `[requests, layers, d]` float32, in the order of the requests."""
    states: list[np.ndarray | None] = [None] * len(requests)
    done = 0
    for indices in model.groups(requests, batch_size):
        outputs = model.prefill([requests[index] for index in indices])
        for row, index in enumerate(indices):
            states[index] = outputs[STATES_OUTPUT][row]
        done += len(indices)
        if progress is not None:
            progress(done, len(requests))
    collected = np.stack([state for state in states if state is not None])
    if len(collected) != len(requests) or not np.isfinite(collected).all():
        raise GuardError("the model's hidden states hold NaN or infinity; its arithmetic overflows, use fp32 or bf16")
    return collected


def collect_answer_states(
    model: VisionLanguageModel, requests: Sequence[Request], max_new_tokens: int, batch_size: int = 16
) -> list[np.ndarray]:
    """Hidden states at the tokens of each request's own greedy answer: per request `[tokens, layers, d]` float32.

    `model` is tapped. A gate is asked again at every token of the answer, so a gate that only ever saw the ends of
    prompts opens in the middle of harmless answers.
    """
    rows: list[list[np.ndarray]] = [[] for _ in requests]
    for indices in model.groups(requests, batch_size):
        said: list[int | None] | None = None
        for step in model.steps([requests[index] for index in indices], Sampling(max_new_tokens=max_new_tokens)):
            for row, index in enumerate(indices):
                if said is not None and said[row] is not None:
                    rows[index].append(step.outputs[STATES_OUTPUT][row])
            said = step.tokens
    return [np.stack(row) if row else np.zeros((0, 0, 0), np.float32) for row in rows]


def _direction(harmful: np.ndarray, harmless: np.ndarray, rank: int) -> tuple[LayerDirections, dict[str, Any]]:
    """SSD of one layer from states `[pairs, d]`, and the evidence for its sign."""
    from sklearn.metrics import roc_auc_score  # here: half of the time that the command line takes to start

    a, b = harmful.astype(np.float64), harmless.astype(np.float64)
    difference = a - b
    _, singular, rows = np.linalg.svd(difference, full_matrices=False)
    rows = rows[: min(rank, MAX_RANK, len(difference))]
    if not singular[0] > 0:
        raise GuardError("the anchors' hidden states do not differ; are harmful and harmless prompts the same?")
    rows = rows * np.where((difference @ rows.T).mean(axis=0) < 0, -1.0, 1.0)[:, None]
    along = difference @ rows[0]
    return LayerDirections(ssd=rows.astype(np.float32)), {
        "mean": float(along.mean()),
        "std": float(along.std()),
        "auc": float(roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a @ rows[0], b @ rows[0]]))),
        "harmful_mean": float((a @ rows[0]).mean()),
        "harmless_mean": float((b @ rows[0]).mean()),
        "explained": [float(share) for share in (singular**2 / (singular**2).sum())[: len(rows)]],
    }
