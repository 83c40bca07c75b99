"""The metrics of `/metrics`, in Prometheus' text format. Only numbers: no content of prompts or answers, no callers."""

from __future__ import annotations

from importlib.metadata import version
from itertools import pairwise

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from ...runtime.guarded import GuardedVLM
from ...runtime.refusals import refused
from ...runtime.telemetry import scored_answer
from .admission import Admission
from .answering import Made

_REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
# Of scores above their thresholds. Units differ from model to model, so both ways by factors; the buckets up to 0 hold the
# closed gates and no other.
MARGINS = (-100, -30, -10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The server's numbers, in a registry of their own."""

    def __init__(self, vlm: GuardedVLM, name: str, admission: Admission) -> None:
        self._plan = vlm.manifest.plan
        registry = self._registry = CollectorRegistry()
        about = Info("vlmguard_model", "The served model.", registry=registry)
        layers = ",".join(map(str, self._plan["layers"]))
        telemetry = "yes" if vlm.decoder.outputs_scores else "no"
        about.info(
            {
                "version": version("vlmguard"),
                "model": name,
                "mode": self._plan["mode"],
                "layers": layers,
                "telemetry": telemetry,
            }
        )
        self._requests = Counter(
            "vlmguard_requests", "Requests by path and status code.", ["path", "code"], registry=registry
        )
        self._seconds = Histogram(
            "vlmguard_request_seconds",
            "From a request's first byte to its answer's last.",
            ["path"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        for gauge, help_text, read in (
            ("vlmguard_requests_running", "Answers being made.", lambda: admission.running),
            ("vlmguard_requests_waiting", "Requests in the queue.", lambda: admission.waiting),
        ):
            Gauge(gauge, help_text, registry=registry).set_function(read)
        self._answers = Counter("vlmguard_answers", "Answers by how they ended.", ["finish_reason"], registry=registry)
        self._prompt_tokens = Counter("vlmguard_prompt_tokens", "Tokens of prompts, of images too.", registry=registry)
        self._completion_tokens = Counter("vlmguard_completion_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "vlmguard_time_to_first_token_seconds",
            "From a request's arrival to its answer's first token, the queue included.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._each = Histogram(
            "vlmguard_time_per_output_token_seconds",
            "Between two tokens of one answer.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._refusals = Counter(
            "vlmguard_refusals", "Complete answers whose first paragraph declines, by keywords.", registry=registry
        )
        self._gates_opened = Counter(
            "vlmguard_answers_with_open_gate", "Answers during which a gate opened (--telemetry).", registry=registry
        )
        self._margins = Histogram(
            "vlmguard_gate_margin",
            "Highest score of each answer minus the gate's threshold; above 0 the gate opened (--telemetry).",
            ["layer"],
            buckets=MARGINS,
            registry=registry,
        )

    def request_ended(self, path: str, code: int, seconds: float) -> None:
        self._requests.labels(path, str(code)).inc()
        self._seconds.labels(path).observe(seconds)

    def answer_ended(self, made: Made) -> None:
        """Count one answer, complete or not."""
        self._answers.labels(made.finish).inc()
        self._prompt_tokens.inc(made.prompt_tokens)
        self._completion_tokens.inc(made.tokens)
        if made.token_times:
            self._first.observe(made.token_times[0] - made.began)
        for before, after in pairwise(made.token_times):
            self._each.observe(after - before)
        if made.finish in ("stop", "length") and refused(made.text):
            self._refusals.inc()
        if made.scores:
            self._gates(made)

    def _gates(self, made: Made) -> None:
        answer = scored_answer(self._plan, made.text, made.scores)
        if answer.opened.any():
            self._gates_opened.inc()
        asked = answer.scores[:1] if answer.held else answer.scores
        margins = (asked - np.array(answer.thresholds, np.float32)).max(axis=0)
        for layer, margin in zip(answer.layers, margins, strict=True):
            self._margins.labels(str(layer)).observe(float(margin))

    def text(self) -> bytes:
        return generate_latest(self._registry)
