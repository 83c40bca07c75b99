"""Running a decoder graph: prefill a batch, then one token at a time through the KV cache.

Works from the graph's own inputs, so one class serves the onnx-community decoder (`inputs_embeds`), plain text decoders
(`input_ids`), onnxruntime-genai's, and graphs exported without a cache (each step then runs the whole sequence again).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..graphs.errors import GuardError
from ..graphs.plan import COORDINATES_OUTPUT, SUPERVISOR_INPUT
from .runners import Port, Runner

_CACHE_PREFIXES = ("past_key_values.", "past.")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for a decoder.

    Attributes:
        ids: token ids `[batch, sequence]` int64, padded on the left.
        mask: 1 for tokens, 0 for padding, `[batch, sequence]` int64.
        embeds: `[batch, sequence, d]` in the graph's dtype, where the decoder takes `inputs_embeds`.
    """

    ids: np.ndarray
    mask: np.ndarray
    embeds: np.ndarray | None = None

    @property
    def size(self) -> int:
        return self.ids.shape[0]


@dataclass
class DecoderState:
    """What one generation carries from call to call."""

    ids: np.ndarray
    mask: np.ndarray
    embeds: np.ndarray | None
    cache: dict[str, np.ndarray] = field(default_factory=dict)
    supervisor: np.ndarray | None = None


class DecoderSession:
    """One decoder graph behind a runner.

    Raises:
        GuardError: the graph takes neither token ids nor embeddings, or an input that nobody here can give.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        inputs = runner.inputs
        self.takes_embeds = "inputs_embeds" in inputs
        if not self.takes_embeds and "input_ids" not in inputs:
            raise GuardError(f"the decoder takes neither input_ids nor inputs_embeds, but {', '.join(inputs)}")
        self.cache_inputs = {n: p for n, p in inputs.items() if n.startswith(_CACHE_PREFIXES)}
        self._present = {name: _present_name(name, runner.outputs) for name in self.cache_inputs}
        known = {"inputs_embeds", "input_ids", "attention_mask", "position_ids", SUPERVISOR_INPUT, *self.cache_inputs}
        unknown = [name for name in inputs if name not in known]
        if unknown:
            raise GuardError(
                f"the decoder wants an input {unknown[0]!r} that is not known; export it in a standard layout"
            )
        self.logits_output = next((n for n in runner.outputs if n == "logits"), next(iter(runner.outputs)))

    @property
    def supervised(self) -> bool:
        """Whether the graph takes the text-only coordinates."""
        return SUPERVISOR_INPUT in self.runner.inputs

    @property
    def supervisor_shape(self) -> tuple[int, int]:
        """`(guarded layers, rank)`"""
        _, layers, rank = self.runner.inputs[SUPERVISOR_INPUT].shape
        assert layers is not None and rank is not None
        return layers, rank

    def prefill_feeds(self, batch: PromptBatch, supervisor: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The graph's inputs for a whole prompt on an empty cache."""
        state = DecoderState(batch.ids, batch.mask, batch.embeds, self._empty_cache(batch.size), supervisor)
        return self._feeds(state, batch.ids, batch.embeds)

    def prefill(
        self, batch: PromptBatch, supervisor: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], DecoderState]:
        """Run a whole prompt.

        Returns:
            All outputs, and the state for `step`.
        """
        outputs = self.runner.run(self.prefill_feeds(batch, supervisor))
        state = DecoderState(batch.ids, batch.mask, None if self.cache_inputs else batch.embeds, {}, supervisor)
        self._keep(state, outputs)
        return outputs, state

    def step(self, state: DecoderState, tokens: np.ndarray, embeds: np.ndarray | None) -> dict[str, np.ndarray]:
        """Run one more token per row, `[batch, 1]`; changes `state`."""
        state.ids = np.concatenate([state.ids, tokens], axis=1)
        state.mask = np.concatenate([state.mask, np.ones_like(tokens)], axis=1)
        current = tokens
        if not self.cache_inputs:  # exported without a cache: the whole sequence again
            current = state.ids
            if embeds is not None and state.embeds is not None:
                embeds = state.embeds = np.concatenate([state.embeds, embeds], axis=1)
        outputs = self.runner.run(self._feeds(state, current, embeds))
        self._keep(state, outputs)
        return outputs

    def coordinates(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The graph's own coordinates at the last token, `[batch, layers, m]` (supervised graphs)."""
        return outputs[COORDINATES_OUTPUT]

    def last_logits(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits at the last position, `[batch, vocabulary]` float32; prompts are padded on the left."""
        logits = outputs[self.logits_output]
        return (logits[:, -1] if logits.ndim == 3 else logits).astype(np.float32)

    def _feeds(self, state: DecoderState, current: np.ndarray, embeds: np.ndarray | None) -> dict[str, np.ndarray]:
        ports = self.runner.inputs
        feeds: dict[str, np.ndarray] = {}
        if self.takes_embeds:
            assert embeds is not None
            feeds["inputs_embeds"] = embeds.astype(ports["inputs_embeds"].dtype)
        else:
            feeds["input_ids"] = current.astype(ports["input_ids"].dtype)
        if "attention_mask" in ports:
            feeds["attention_mask"] = state.mask.astype(ports["attention_mask"].dtype)
        if "position_ids" in ports:
            positions = np.maximum(np.cumsum(state.mask, axis=1) - 1, 0)[:, -current.shape[1] :]
            feeds["position_ids"] = positions.astype(ports["position_ids"].dtype)
        if SUPERVISOR_INPUT in ports:
            if state.supervisor is None:
                raise GuardError(
                    "this graph is guarded in mode supervise and needs the text-only coordinates; run the text-only pass "
                    "first, as GuardedVLM does"
                )
            feeds[SUPERVISOR_INPUT] = state.supervisor.astype(np.float32)
        return feeds | state.cache

    def _keep(self, state: DecoderState, outputs: Mapping[str, np.ndarray]) -> None:
        state.cache = {name: outputs[present] for name, present in self._present.items()}

    def _empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        return {name: _empty(port, batch) for name, port in self.cache_inputs.items()}


def _empty(port: Port, batch: int) -> np.ndarray:
    """A cache of length 0: `[batch, kv_heads, 0, head_dim]`; heads and their size are static in the graph."""
    if len(port.shape) != 4 or port.shape[1] is None or port.shape[3] is None:
        raise GuardError(
            f"cache input {port.name!r} has shape {port.shape}, expected [batch, kv_heads, past, head_dim]"
        )
    return np.zeros((batch, port.shape[1], 0, port.shape[3]), port.dtype)


def _present_name(past: str, outputs: Mapping[str, Port]) -> str:
    for prefix in _CACHE_PREFIXES:
        if past.startswith(prefix):
            rest = past.removeprefix(prefix)
            for candidate in (f"present.{rest}", f"present_key_values.{rest}"):
                if candidate in outputs:
                    return candidate
    raise GuardError(f"cache input {past!r} has no output to refill it among {', '.join(list(outputs)[:4])} ...")
