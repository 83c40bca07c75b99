"""The parts of a table row, and the names shared by rows and graphs. Nothing here names a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The names of the axes whose length is not fixed. A row may use words of its own for axes of its own.
IMAGES = "num_images"
BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"  # always PAST + SEQUENCE

Shape = tuple[str | int, ...]  # a word for an axis of any length, a number for one that is fixed
Shapes = Mapping[str, Shape]  # by name, in the order of the graph's inputs or outputs
Arrays = dict[str, np.ndarray]

IMAGE_FEATURES = "image_features"


@dataclass(frozen=True)
class Turn:
    """One call of the decoder: the last `length` tokens of these prompts are new, the others are in the cache.

    Attributes:
        ids: all tokens up to now `[batch, total]` int64, padded on the left.
        mask: 1 for tokens, 0 for padding `[batch, total]` int64.
        length: how many of them this call is for.
        given: what transformers takes for all images of these prompts; empty if there are none.
        seen: outputs of the vision encoder for them; empty if there are none.
        image_token: stands for a row of image features in `ids`; `None` for a text-only model.
        image_tokens: how many of them each prompt has, `[batch]`; an image token that the model answers with is none of them.
    """

    ids: np.ndarray
    mask: np.ndarray
    length: int
    given: Arrays = field(default_factory=dict)
    seen: Arrays = field(default_factory=dict)
    image_token: int | None = None
    image_tokens: np.ndarray | None = None

    @property
    def of_image(self) -> np.ndarray:
        """Positions of the prompts' image tokens, `[batch, total]` bool."""
        found = self.ids == (-1 if self.image_token is None else self.image_token)
        if self.image_tokens is None:
            return found
        return found & (found.cumsum(axis=1) <= self.image_tokens[:, None])


def positions(turn: Turn) -> np.ndarray:
    """Position of each new token within its own prompt, padding not counted: `[batch, length]` int64."""
    return np.maximum(turn.mask.cumsum(-1) - 1, 0)[:, -turn.length :]


def position_inputs(model: Any) -> Shapes:
    """Inputs of most decoders besides embeddings, mask and cache."""
    return {"position_ids": (BATCH, SEQUENCE)}


def position_feeds(config: Any, turn: Turn) -> Arrays:
    """The values for `position_inputs`."""
    return {"position_ids": positions(turn)}


def run_whole_model(model: Any, **inputs: Any) -> Any:
    """transformers' own forward, from `inputs_embeds`; gives `logits` and `past_key_values`."""
    return type(model).forward(model, use_cache=True, **inputs)


def input_embeddings(model: Any, ids: Any) -> Mapping[str, Any]:
    """Inputs of most decoders in place of token ids."""
    return {"inputs_embeds": model.get_input_embeddings()(ids)}


def no_tokens(config: Any) -> tuple[list[int], list[int]]:
    """Nothing stands around an image."""
    return [], []


def in_reading_order(config: Any, given: Arrays, seen: Arrays) -> np.ndarray:
    """Every feature row of every image, first to last: `[image tokens, width]`."""
    features = seen[IMAGE_FEATURES]
    return features.reshape(-1, features.shape[-1])


@dataclass(frozen=True)
class Vision:
    """The vision encoder's graph.

    Attributes:
        inputs: `inputs(model)`, name -> shape; float inputs are float32 in the file whatever the weights are.
        outputs: `outputs(model)`, name -> shape; the first is `image_features`.
        run: `run(model, **inputs)`, the outputs by name. Traced, so free of loops over images and of `list(...)`.
        sample: `sample(model, random)`, what transformers takes for two prompts with one image each, in the order of
            the prompts. The graph gets those that `inputs` names, `place` and `feeds` get all.
        place: `place(config, given, seen)`, the rows `[image tokens, width]` that a caller puts at the image tokens of
            its prompts, in order. All that an app has to do between the graphs, in numpy.
        around: `around(config)`, token ids that stand before and after an image's tokens in every prompt.
        calls: `calls(given)`, the inputs of the graph for these images, one call after another; default: one call with all.
        traced: the inputs for tracing; default: the sample.
        others: further inputs for the comparison with torch, one call each.
        held: whether the axes keep their names while the graph is traced, so that one name is one length.
        reference: `reference(model, **inputs)`, what transformers computes for one picture, by the names of the outputs, where
            that is not `get_image_features` alone. Of the generic row.
    """

    inputs: Callable[[Any], Shapes]
    outputs: Callable[[Any], Shapes]
    run: Callable[..., Mapping[str, Any]]
    sample: Callable[[Any, np.random.Generator], Arrays]
    place: Callable[[Any, Arrays, Arrays], np.ndarray] = in_reading_order
    around: Callable[[Any], tuple[list[int], list[int]]] = no_tokens
    calls: Callable[[Arrays], Sequence[Arrays]] = lambda given: [given]
    traced: Arrays | None = None
    others: Sequence[Arrays] = ()
    held: bool = True
    reference: Callable[..., Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Decoder:
    """The graph that answers.

    Attributes:
        inputs: `inputs(model)`, name -> shape, of all inputs but `inputs_embeds`, `attention_mask` and the cache.
        feeds: `feeds(config, turn)`, values for them at any call, with images or without. Float values may be float32;
            they are cast to the graph's type.
        run: `run(model, **inputs)`, an object with `logits` and `past_key_values`. Traced.
        reference: `reference(config, turn)`, what transformers' own forward takes besides `input_ids`,
            `attention_mask`, `past_key_values` and, at the first call, the vision inputs. `None` stands for `feeds`.
        embeds: `embeds(model, ids)`, what the embedding graph gives by name, `inputs_embeds` first; the decoder takes all of
            it.
    """

    inputs: Callable[[Any], Shapes] = position_inputs
    feeds: Callable[[Any, Turn], Arrays] = position_feeds
    run: Callable[..., Any] = run_whole_model
    reference: Callable[[Any, Turn], Arrays] | None = None
    embeds: Callable[[Any, Any], Mapping[str, Any]] = input_embeddings


@dataclass(frozen=True)
class Family:
    """One supported kind of checkpoint, matched by its config's `model_type`.

    Attributes:
        model_type: of `config.json`.
        model_class: in transformers.
        image_towers: `vision_config.model_type` of the towers this was tried with; the first is transformers' default.
        vision, decoder: what differs in the graphs. Without `vision` the model is text only, and one graph from `input_ids`.
        refuse: `refuse(config)` with the parsed `config.json`: why this one checkpoint cannot be exported, or `None`.
        generic: whether `vision` and `decoder` are chosen with the model loaded (`checkpoints.fit`).
    """

    model_type: str
    model_class: str
    image_towers: tuple[str, ...]
    vision: Vision | None
    decoder: Decoder = Decoder()
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    generic: bool = False

    @property
    def takes_images(self) -> bool:
        """Whether checkpoints of this row have a vision encoder."""
        return self.generic or self.vision is not None
