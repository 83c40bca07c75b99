"""One decoder call in ONNX Runtime, ready to be repeated: inputs and outputs stay in place, nothing is copied per call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from shapes import Shape

from vlmguard.graphs.dtypes import ORT_DTYPES
from vlmguard.graphs.plan import SUPERVISOR_INPUTS

_PAST, _PRESENT = "past_key_values.", "present."


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """A fixed number of threads, which stop when a call returns.

    By default a session's threads go on spinning for a while, to be quick at the next call; where sessions take turns, those
    of the last one would then take the cores from the one that is timed (here: single pairs between 0.5 and 1.5).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Decoder:
    """A session on the CPU with a fixed number of threads."""

    def __init__(self, path: Path, shape: Shape, threads: int, profile: Path | None = None) -> None:
        self.shape = shape
        options = session_options(threads)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(self, tokens: int, past: int, supervisor: float = 0.0) -> Callable[[], None]:
        """Run `tokens` tokens of one sequence on a cache of `past`; every call does the same again.

        Args:
            supervisor: what a graph of mode `supervise` is told, for every layer and row: it decides that gate.
        """
        binding = self.session.io_binding()
        for port in self.session.get_inputs():
            values = self._values(port.name, port.shape, tokens, past, supervisor)
            binding.bind_cpu_input(port.name, np.ascontiguousarray(values, ORT_DTYPES[port.type]))
        for port in self.session.get_outputs():
            binding.bind_output(port.name, "cpu")
        return lambda: self.session.run_with_iobinding(binding)

    def decode(self, tokens: int, past: int) -> np.ndarray:
        """Logits `[vocabulary]` after `tokens` tokens, one call each; the cache is handed on without a copy."""
        ids = token_ids(self.shape, tokens)
        binding = self.session.io_binding()
        for port in self.session.get_inputs():
            if port.name.startswith(_PAST):
                binding.bind_cpu_input(port.name, self._values(port.name, port.shape, 1, past, 0.0))
        outputs, given = [port.name for port in self.session.get_outputs()], {}
        for place, token in enumerate(ids):
            step = {
                "input_ids": [[token]],
                "attention_mask": np.ones((1, past + place + 1)),
                "position_ids": [[past + place]],
            }
            for port in self.session.get_inputs():
                if port.name in step:
                    binding.bind_cpu_input(port.name, np.ascontiguousarray(step[port.name], ORT_DTYPES[port.type]))
            for name in outputs:
                binding.bind_output(name, "cpu")
            self.session.run_with_iobinding(binding)
            given = dict(zip(outputs, binding.get_outputs(), strict=True))
            for name, value in given.items():
                if name.startswith(_PRESENT):
                    binding.bind_ortvalue_input(_PAST + name.removeprefix(_PRESENT), value)
        return given["logits"].numpy()[0, -1]

    def _values(
        self, name: str, declared: list[int | str | None], tokens: int, past: int, supervisor: float
    ) -> np.ndarray:
        if name.startswith(_PAST):
            seed = sum(map(ord, name))
            return cache_values(self.shape, past, seed)
        if name in SUPERVISOR_INPUTS:
            _, layers, rank = declared
            assert isinstance(layers, int) and isinstance(rank, int), declared
            return np.full((1, layers, rank), supervisor)
        return {
            "input_ids": token_ids(self.shape, tokens)[None],
            "attention_mask": np.ones((1, past + tokens)),
            "position_ids": np.arange(past, past + tokens)[None],
        }[name]


def token_ids(shape: Shape, count: int) -> np.ndarray:
    """Any tokens, the same ones each time."""
    return np.random.default_rng(count).integers(3, shape.vocab_size, size=count)


def cache_values(shape: Shape, past: int, seed: int) -> np.ndarray:
    """`[1, kv_heads, past, head_dim]` of modest numbers: an attention over zeros would read denormals or ties."""
    random = np.random.default_rng(seed)
    return random.normal(scale=0.5, size=(1, shape.num_key_value_heads, past, shape.head_dim)).astype(np.float32)
