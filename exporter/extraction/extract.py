"""Safety steering directions from the ONNX model itself: one tapped pass over the anchors, then an estimate per layer.

VLM-Guard (arXiv 2502.10486): `A_l[i] = h_l(q_i-) - h_l(q_i+)`, not centred; `A_l = U S V^T`; the first `m` rows of `V^T`
are the SSD of layer `l`. The sign that an SVD returns is arbitrary, so each row is oriented from the data: `+` means
harmful. Text only: the language model inside the VLM is the safety-aligned one. Other estimators of row 1 are in
`estimators.py`; a checkpoint is read in torch by `extract_torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.digests import sha256_file
from ...graphs.directions import Directions, LayerDirections
from ...graphs.errors import GuardError
from ...graphs.last_logits import keep_last_logits
from ...graphs.package import ModelPackage
from ...graphs.progress import CountCallback
from ...graphs.taps import STATES_OUTPUT, tap_last_token
from ...runtime.generation import Request, Sampling
from ...runtime.vlm import VisionLanguageModel
from ..executors import Executor, ExecutorFactory, in_turn, local_executors
from ..prompts.labelled import AnchorPair
from ..proof.headroom import WAY_OUT
from .estimators import DEFAULT_ESTIMATOR, ESTIMATORS, require_known
from .kept_states import KeptStates, model_files
from .loud_channels import held_out_auc, quiet_rows

_ROUNDING = 1e-5  # of a channel's largest state


def extract_all_layers(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    pairs: Sequence[AnchorPair],
    rank: int = 4,
    batch_size: int = 16,
    report_count: CountCallback | None = None,
    estimator: str = DEFAULT_ESTIMATOR,
    kept: KeptStates | None = None,
    executors: ExecutorFactory = local_executors,
) -> Directions:
    """The SSD of every layer that sees the anchors' difference, with its evidence.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        pairs: anchors.
        rank: rows to keep per layer, 1..64; never more than there are pairs.
        batch_size: prompts per pass.
        report_count: called with `(done, total)` after each batch.
        estimator: of row 1, a name of `estimators.ESTIMATORS`.
        kept: where states are kept until all are there.
        executors: who reads the batches; others than this process open the model that `model.package` names.
    """
    require_known("estimator", estimator, ESTIMATORS)
    over = executors(LastStates(model.package, anatomy, model.runtime))
    states = collect_states(tapped(model, anatomy), anchor_requests(pairs), batch_size, report_count, kept, over)
    layers = [site.layer_index for site in anatomy.sites]
    return directions_from_states(states, layers, rank, estimator, sha256_file(model.package.decoder))


def anchor_requests(pairs: Sequence[AnchorPair]) -> list[Request]:
    """Text only; harmful and harmless take turns."""
    return [Request(text) for pair in pairs for text in (pair.harmful, pair.harmless)]


def directions_from_states(
    states: np.ndarray, layers: Iterable[int], rank: int, estimator: str, model_sha256: str | None
) -> Directions:
    """The SSD of each layer from the states of the anchors.

    Args:
        states: `[2 * pairs, layers of the decoder, d]`, in the order of `anchor_requests`.
        layers: layer numbers to estimate.
        rank: rows per layer.
        estimator: a key of `ESTIMATORS`.
        model_sha256: digest of the decoder file; `None` if there is no file.

    Returns:
        Directions of all these layers but those that do not see what the anchors differ in (`sees_difference`).

    Raises:
        GuardError: no layer sees it.
    """
    harmful, harmless = states[0::2], states[1::2]
    found, evidence = {}, {}
    layers = list(layers)
    seeing = [number for number in layers if sees_difference(harmful[:, number], harmless[:, number])]
    for number in seeing or layers:  # where none does, the estimate reports it
        found[number], evidence[str(number)] = _direction(harmful[:, number], harmless[:, number], rank, estimator)
    return Directions(
        width=states.shape[-1],
        layers=found,
        model_sha256=model_sha256,
        pairs=len(harmful),
        evidence=evidence,
        estimator=estimator,
    )


@dataclass(frozen=True)
class LastStates:
    """Reads states in another process: the worker spec of a tapped model."""

    package: ModelPackage
    anatomy: DecoderAnatomy
    runtime: str

    def files(self) -> list[Path]:
        return model_files(self.package)

    def open(self) -> Callable[[list[Request]], np.ndarray]:
        return states_reader(tapped(VisionLanguageModel(self.package, runtime=self.runtime), self.anatomy))


def tapped(model: VisionLanguageModel, anatomy: DecoderAnatomy) -> VisionLanguageModel:
    """The model with one output more: every layer's state at the last token."""
    return model.with_decoder(tapped_graph(model.package, anatomy))


def tapped_graph(package: ModelPackage, anatomy: DecoderAnatomy) -> ir.Model:
    """The decoder with that output, and with logits of the last token alone."""
    return with_states(package.load_decoder(), anatomy)


def with_states(graph: ir.Model, anatomy: DecoderAnatomy) -> ir.Model:
    """The same graph, changed in memory: that output more, and logits of the last token alone."""
    tap_last_token(graph, anatomy.sites)
    keep_last_logits(graph)
    return graph


def collect_states(
    model: VisionLanguageModel,
    requests: Sequence[Request],
    batch_size: int = 16,
    report_count: CountCallback | None = None,
    kept: KeptStates | None = None,
    executor: Executor = in_turn,
) -> np.ndarray:
    """Read the hidden states at the last prompt token.

    Args:
        model: a tapped model (`tapped`).
        requests: the prompts.
        batch_size: prompts per call.
        report_count: called with `(done, total)` after each batch.
        kept: stores states until all are read; `None`: do not store.
        executor: runs the batches.

    Returns:
        `[requests, layers, d]` float32, in the order of the requests.
    """
    batches = model.groups(requests, batch_size)
    return read_batches(states_reader(model), requests, batches, report_count, kept, executor)


def states_reader(model: VisionLanguageModel) -> Callable[[list[Request]], np.ndarray]:
    """From the requests of one batch to the states `[batch, layers, d]` float32 that a tapped model has."""
    return lambda batch: model.prefill(batch)[STATES_OUTPUT]


def read_batches(
    read: Callable[[list[Request]], np.ndarray],
    requests: Sequence[Request],
    batches: Iterable[list[int]],
    report_count: CountCallback | None = None,
    kept: KeptStates | None = None,
    executor: Executor = in_turn,
) -> np.ndarray:
    """Read the states of all requests batch by batch; batches in `kept` are not read again.

    Args:
        read: returns the states `[batch, layers, d]` of some requests.
        requests: the prompts.
        batches: indices of the requests of each batch.
        report_count: called with `(done, total)` after each batch.
        kept: stores the states of each batch; `None`: do not store.
        executor: runs `read` on the batches.

    Returns:
        `[requests, layers, d]` float32, in the order of the requests.

    Raises:
        GuardError: a state holds NaN or infinity.
    """
    states: list[np.ndarray | None] = [None] * len(requests)
    done = 0

    def take(indices: list[int], batch_states: np.ndarray) -> None:
        nonlocal done
        for row, index in enumerate(indices):
            states[index] = batch_states[row]
        done += len(indices)
        if report_count is not None:
            report_count(done, len(requests))

    missing: list[tuple[list[int], list[Request]]] = []
    for indices in batches:
        batch = [requests[index] for index in indices]
        stored = kept.find(batch) if kept is not None else None
        if stored is None:
            missing.append((indices, batch))
        else:
            take(indices, stored)
    results = executor(read, (batch for _, batch in missing))
    for (indices, batch), stored in zip(missing, results, strict=True):
        if kept is not None:
            kept.keep(batch, stored)
        take(indices, stored)
    collected = np.stack([state for state in states if state is not None])
    assert len(collected) == len(requests), "a batch was not read"
    if not np.isfinite(collected).all():
        raise GuardError(_not_finite(collected))
    return collected


def _not_finite(states: np.ndarray) -> str:
    """Names the states `[prompts, layers, d]` that are NaN or infinite, and what to do."""
    odd = ~np.isfinite(states)
    layer = int(np.flatnonzero(odd.any(axis=(0, 2)))[0])
    channels = np.flatnonzero(odd[:, layer].any(axis=0))
    where = f"channel {channels[0]}" if len(channels) == 1 else f"{len(channels)} of {states.shape[-1]} channels"
    found = f"the model's hidden states hold NaN or infinity from layer {layer} on ({where})"
    return f"{found}; its arithmetic overflows: {WAY_OUT}"


def collect_answer_states(
    model: VisionLanguageModel, requests: Sequence[Request], max_new_tokens: int, batch_size: int = 16
) -> list[np.ndarray]:
    """Read the hidden states at the tokens of each request's own greedy answer.

    The gate decides at every token of an answer. A gate fitted only to the ends of prompts would open in the middle of harmless
    answers.

    Args:
        model: a tapped model (`tapped`).
        requests: the prompts.
        max_new_tokens: longest answer.
        batch_size: prompts per call.

    Returns:
        Per request `[tokens, layers, d]` float32.
    """
    rows: list[list[np.ndarray]] = [[] for _ in requests]
    for indices in model.groups(requests, batch_size):
        tokens: list[int | None] | None = None
        for step in model.steps([requests[index] for index in indices], Sampling(max_new_tokens=max_new_tokens)):
            for row, index in enumerate(indices):
                if tokens is not None and tokens[row] is not None:
                    rows[index].append(step.outputs[STATES_OUTPUT][row])
            tokens = step.tokens
    return [np.stack(row) if row else np.zeros((0, 0, 0), np.float32) for row in rows]


def sees_difference(harmful: np.ndarray, harmless: np.ndarray) -> bool:
    """Whether the states of some pair differ by more than rounding.

    The first layers of a decoder with short convolutions see a few tokens at the prompt's end alone. There the chat template
    has written the same ones behind every prompt.

    Args:
        harmful, harmless: states of one layer, `[pairs, d]`.
    """
    loudest = np.abs(np.concatenate([harmful, harmless])).max(axis=0)
    return bool((np.abs(harmful - harmless) > _ROUNDING * np.maximum(loudest, np.median(loudest))).any())


def _direction(
    harmful: np.ndarray, harmless: np.ndarray, rank: int, estimator: str
) -> tuple[LayerDirections, dict[str, Any]]:
    """SSD of one layer from states `[pairs, d]`, and the evidence for its sign."""
    from sklearn.metrics import roc_auc_score  # here: half of the time that the command line takes to start

    a, b = harmful.astype(np.float64), harmless.astype(np.float64)
    difference = a - b
    rows, dropped = quiet_rows(estimator, a, b, rank)
    held_out = held_out_auc(estimator, a, b, dropped)
    along = difference @ rows[0]
    shares = ((difference @ rows.T) ** 2).sum(axis=0) / (difference**2).sum()
    return LayerDirections(ssd=rows.astype(np.float32)), {
        "mean": float(along.mean()),
        "std": float(along.std()),
        "auc": float(roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a @ rows[0], b @ rows[0]]))),
        "harmful_mean": float((a @ rows[0]).mean()),
        "harmless_mean": float((b @ rows[0]).mean()),
        "explained": [float(share) for share in shares],
        **({"auc_held_out": held_out} if held_out is not None else {}),
        **({"loud_channels_dropped": dropped} if dropped else {}),
    }
