"""Hidden states at the last prompt token, of both sides of a guard, and what the gates read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...exporter.extraction.extract import collect_states
from ...exporter.prompts.labelled import LabelledPrompt
from ...graphs.errors import GuardError
from ...graphs.progress import CountCallback
from ...graphs.taps import RAW_OUTPUT, STATES_OUTPUT
from ...runtime.generation import Request
from ...runtime.vlm import VisionLanguageModel
from .subject import Subject


@dataclass(frozen=True)
class States:
    """Hidden states of both sides at the last token of each prompt; float32, in the order of the prompts.

    Attributes:
        before: unguarded, `[prompts, layers, d]`.
        after: guarded, behind each layer's guard, `[prompts, layers, d]`.
        raw: what each guard reads, `[prompts, guarded layers, d]`; `None` for a guard in the weights, which reads nothing.
        supervisor: the text-only coordinates, `[prompts, guarded layers, m]` (mode `supervise` only).
    """

    before: np.ndarray
    after: np.ndarray
    raw: np.ndarray | None
    supervisor: np.ndarray | None


def read_states(
    subject: Subject, prompts: Sequence[LabelledPrompt], batch_size: int, report_count: CountCallback | None = None
) -> States:
    """Read the hidden states of all prompts, unguarded and guarded.

    Args:
        subject: the model of the report.
        prompts: the prompts to run.
        batch_size: prompts per call.
        report_count: called with `(done, total)` after each batch.

    Raises:
        GuardError: states that are not finite.
    """
    both = 2 * len(prompts)
    first = (lambda done, _: report_count(done, both)) if report_count is not None else None
    unguarded = subject.unguarded_tapped()
    before = collect_states(unguarded, [prompt.request(unguarded) for prompt in prompts], batch_size, first)
    later = (lambda done: report_count(len(prompts) + done, both)) if report_count is not None else (lambda done: None)
    guarded = subject.guarded_tapped()
    rows: list[dict[str, np.ndarray]] = [{} for _ in prompts]
    requests, done = [prompt.request(guarded) for prompt in prompts], 0
    for indices in guarded.groups(requests, batch_size):
        outputs = _prefill(guarded, [requests[index] for index in indices])
        for row, index in enumerate(indices):
            rows[index] = {name: values[row] for name, values in outputs.items()}
        done += len(indices)
        later(done)
    after = _stacked(rows, STATES_OUTPUT)
    if after is None or not np.isfinite(after).all():
        raise GuardError("the guarded model's hidden states hold NaN or infinity; run `vlmguard verify --run` on it")
    return States(before, after, _stacked(rows, RAW_OUTPUT), _stacked(rows, _SUPERVISOR))


_SUPERVISOR = "supervisor"


def _prefill(model: VisionLanguageModel, requests: Sequence[Request]) -> dict[str, np.ndarray]:
    if model.pairs:
        supervisor, outputs = None, model.prefill(requests)
    else:
        supervisor = model.supervise(requests)
        outputs, _ = model.decoder.prefill(model.batch(requests), supervisor)
    found = {name: np.asarray(outputs[name]) for name in (STATES_OUTPUT, RAW_OUTPUT) if name in outputs}
    return found if supervisor is None else found | {_SUPERVISOR: np.asarray(supervisor)}


def _stacked(rows: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray | None:
    return np.stack([row[name] for row in rows]) if name in rows[0] else None
