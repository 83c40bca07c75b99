"""One exported decoder and how it is fed: what every test of the zoo works with.

Nothing here decides what an export looks like, so a change here exports nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Feeds = dict[str, np.ndarray]
Padding = Literal["left", "right"]
# (random, mask of past and new tokens, mask of the new ones, the usual feeds) -> feeds beside or instead of the usual
SpecialFeeds = Callable[[np.random.Generator, np.ndarray, np.ndarray, Feeds], Feeds]
# (the torch model, a graph's feeds) -> logits
RunTorch = Callable[["PreTrainedModel", Mapping[str, np.ndarray]], "Tensor"]

SHORT_DTYPES = {"float32": "fp32", "float16": "fp16"}
# Seen at most, on logits of size 4: 3e-6, 7e-3, 8e-2.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int4": 0.2}
# Ids below are special ones (padding, begin, end); so is the last of the vocabulary (an image's place).
FIRST_PLAIN_ID, PAD_ID = 3, 0


@dataclass(frozen=True, eq=False)
class ZooModel:
    """One exported decoder, and the torch model it was exported from."""

    name: str
    folder: Path
    path: Path
    layers: int
    width: int
    dtype: str
    """Of the weights and of the graph's inputs and outputs: "float32" or "float16"."""
    stream_dtype: str
    """What the graph keeps the residual stream in. TorchScript's float16 graphs keep it in float32."""
    padding: Padding
    """Where `make_feeds` puts the padding. "right" for GroupQueryAttention, which is given only each row's LENGTH (the
    sum of its attention mask) and reads the first that many tokens: left padding would be read as text."""
    tolerance: float
    """How far the graph's logits may be from torch's."""
    inputs: Mapping[str, np.dtype]
    torch_model: PreTrainedModel | None
    """None where torch has no truth to tell: quantized graphs."""
    torch_decoder: nn.Module | None
    """The module whose `.layers` can be hooked; `run_torch` runs it."""
    kv_heads: int
    head_width: int
    vocabulary: int
    patterns: tuple[str, ...]
    """What the graph is an example of: letters of docs/graphs.md."""
    exporter: str
    """Package and version."""
    family: str
    """Hugging Face's `model_type`."""
    special_feeds: SpecialFeeds | None = None
    """Feeds that only this family takes: image positions, token types, states of pictures."""
    torch_runner: RunTorch | None = None
    """How torch takes the graph's feeds, where it is not by their names."""
    refusal: str = ""
    """The sentence that `dissect` must refuse the graph with; "" for a graph that can be guarded."""

    def make_feeds(self, batch: int, sequence: int, pad: int = 0) -> Feeds:
        """Feeds for a prefill on an empty cache, exactly the graph's inputs.

        Row `i` has `pad - i` padding tokens (never fewer than none), so that rows differ.
        """
        if not 0 <= pad < sequence:
            raise ValueError(f"{pad} padding tokens in a sequence of {sequence}: a row needs a token of its own")
        rows = np.maximum(pad - np.arange(batch), 0)[:, None]
        places = np.arange(sequence)[None, :]
        mask = (places >= rows if self.padding == "left" else places < sequence - rows).astype(np.int64)
        return self._feeds(mask, mask, past=None, seed=batch * 10_000 + sequence * 100 + pad)

    def next_feeds(self, feeds: Feeds, outputs: Mapping[str, np.ndarray], sequence: int = 1) -> Feeds:
        """Feeds for `sequence` more tokens after a run that had `feeds` and gave `outputs` (with its cache).

        GroupQueryAttention takes several tokens on a filled cache only for a batch of one.
        """
        if not self.cache:
            raise ValueError(f"{self.name} was exported without a cache")
        if self.padding == "right" and not feeds["attention_mask"].all():
            # The new token would sit behind the padding in torch's cache, and before it in GroupQueryAttention's.
            raise ValueError(f"{self.name} pads on the right: torch has no truth for a step after a padded prefill")
        batch = len(feeds["attention_mask"])
        fresh = np.ones((batch, sequence), dtype=np.int64)
        mask = np.concatenate([feeds["attention_mask"], fresh], axis=1)
        past = {before: outputs[after] for before, after in self.cache.items()}
        return self._feeds(mask, fresh, past, seed=mask.shape[1])

    def counted(self, feeds: Feeds) -> np.ndarray:
        """[batch, sequence] bool: the positions that hold a token. What a model says of padding means nothing."""
        sequence = feeds[self._text_name].shape[1]
        return feeds["attention_mask"][:, -sequence:].astype(bool)

    def hidden_states(self, feeds: Feeds) -> list[np.ndarray]:
        """Torch's output of every decoder layer, before the final norm: `layers` arrays [batch, sequence, width]."""
        from zoo.truth import recorded_layers

        if self.torch_decoder is None:
            raise ValueError(f"{self.name} has no torch truth: its graph is not what a torch model computes")
        with recorded_layers(self.torch_decoder) as states:
            self.run_torch(feeds)
        if len(states) != self.layers:
            raise AssertionError(f"{len(states)} layers ran, {self.layers} expected")
        return states

    def logits(self, feeds: Feeds) -> np.ndarray:
        """Torch's logits, float32: [batch, sequence, vocabulary]."""
        return self.run_torch(feeds).float().numpy()

    def run_torch(self, feeds: Feeds) -> Tensor:
        """Run torch's model on the graph's feeds; its logits."""
        from zoo.truth import run_torch

        if self.torch_model is None:
            raise ValueError(f"{self.name} has no torch truth: its graph is not what a torch model computes")
        return (self.torch_runner or run_torch)(self.torch_model, feeds)

    @property
    def has_torch(self) -> bool:
        """Whether `hidden_states`, `logits` and `run_torch` can be asked."""
        return self.torch_model is not None

    @cached_property
    def cache(self) -> dict[str, str]:
        """The graph's cache: name of the past input -> name of the present output."""
        pasts = [n for n in self.inputs if "past_key_values" in n or n.startswith(("past.", "input.cache."))]
        if not pasts:
            return {}
        outputs = {value.name for value in onnx.load(self.path, load_external_data=False).graph.output}
        return {name: next(after for after in _present_names(name) if after in outputs) for name in pasts}

    @property
    def _text_name(self) -> str:
        return "inputs_embeds" if "inputs_embeds" in self.inputs else "input_ids"

    def _feeds(self, mask: np.ndarray, fresh: np.ndarray, past: Feeds | None, seed: int) -> Feeds:
        """`mask` covers past and new tokens, `fresh` the new ones alone."""
        random = np.random.default_rng(seed)
        batch, sequence = fresh.shape
        ids = np.where(fresh == 1, random.integers(FIRST_PLAIN_ID, self.vocabulary - 1, fresh.shape), PAD_ID)
        feeds = {
            "input_ids": ids,
            "inputs_embeds": random.standard_normal((batch, sequence, self.width)),
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -sequence:],
            **(past or {name: np.zeros((batch, self.kv_heads, 0, self.head_width)) for name in self.cache}),
        }
        if self.special_feeds is not None:
            feeds |= self.special_feeds(random, mask, fresh, feeds)
        return {name: np.ascontiguousarray(feeds[name], dtype=dtype) for name, dtype in self.inputs.items()}


def zoo_model(
    name: str,
    path: Path,
    *,
    dtype: str,
    layers: int,
    width: int,
    kv_heads: int,
    head_width: int,
    vocabulary: int,
    patterns: tuple[str, ...],
    exporter: str,
    family: str,
    torch_model: PreTrainedModel | None = None,
    torch_decoder: nn.Module | None = None,
    stream_dtype: str | None = None,
    padding: Padding = "left",
    tolerance: float | None = None,
    special_feeds: SpecialFeeds | None = None,
    torch_runner: RunTorch | None = None,
    refusal: str = "",
) -> ZooModel:
    """A `ZooModel` of the decoder at `path`, its inputs read from the file."""
    graph = onnx.load(path, load_external_data=False).graph
    dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}
    return ZooModel(
        name=name,
        folder=path.parent,
        path=path,
        layers=layers,
        width=width,
        dtype=dtype,
        stream_dtype=stream_dtype or dtype,
        padding=padding,
        tolerance=tolerance or TOLERANCES[SHORT_DTYPES[dtype]],
        inputs=dtypes,
        torch_model=torch_model,
        torch_decoder=torch_decoder,
        kv_heads=kv_heads,
        head_width=head_width,
        vocabulary=vocabulary,
        patterns=patterns,
        exporter=exporter,
        family=family,
        special_feeds=special_feeds,
        torch_runner=torch_runner,
        refusal=refusal,
    )


def _present_names(past_name: str) -> tuple[str, ...]:
    """What exporters call it: the second is that of transformers 5.24 where a decoder's inputs are named by hand."""
    return present_name(past_name), past_name.replace("past_key_values.", "cache.", 1)


def present_name(past_name: str) -> str:
    if past_name.startswith("input."):
        return past_name.replace("input.", "output.", 1)
    return past_name.replace("past_key_values" if "past_key_values" in past_name else "past", "present", 1)
