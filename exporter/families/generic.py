"""One row for every image-text-to-text type of transformers, and for types that have no row of their own: `generic_family`.

The row says which class opens the checkpoint. What its graphs take, compute and give is chosen with the model loaded, by what
reproduces transformers' own `generate` (`checkpoints.fit`); `GenericDecoder` is one such choice.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from ...runtime.images.deepstack import embeds_name, scatter
from .family import BATCH, SEQUENCE, Arrays, Family, Shapes, Turn
from .phi4_multimodal import MODEL_CLASS, MODEL_TYPE
from .position_rules import RULES, Rule
from .transformers_class import transformers_class

PER_LAYER = "per_layer_inputs"
_MARKS = "token_type_ids"  # what every graph calls the input that marks image tokens


def generic_family(config: Mapping[str, Any]) -> Family | None:
    """The row for a checkpoint with this `config.json`; `None` where transformers has no image-text-to-text model of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as classes

    model_type = config.get("model_type")
    named = ({**classes, MODEL_TYPE: MODEL_CLASS}).get(model_type) if isinstance(model_type, str) else None
    model_class = named[0] if isinstance(named, tuple) else named
    if model_type is None or model_class is None:
        return None
    return Family(
        model_type=model_type,
        model_class=model_class,
        image_towers=(),
        vision=None,
        refuse=lambda config: why_no_decoder(config, model_class),
        generic=True,
    )


def why_no_decoder(config: Mapping[str, Any], model_class: str) -> str | None:
    """Why this type has no decoder-only graph; `None` where it may have one."""
    kind, whole = config["model_type"], transformers_class(model_class)
    if config.get("is_encoder_decoder") or (config.get("text_config") or {}).get("is_encoder_decoder"):
        return f"{kind} is an encoder-decoder; only decoder-only language models can be guarded"
    if not hasattr(whole, "generate") or "inputs_embeds" not in inspect.signature(whole.forward).parameters:
        return f"{model_class} does not generate from embeddings; only decoder-only language models can be guarded"
    if not sees(whole) and kind != MODEL_TYPE:
        return f"{model_class} has no get_image_features, so its vision encoder cannot be cut out of it"
    return None


def sees(model_class: Any) -> bool:
    """Whether a class, or a part of the same module, has a vision encoder of its own to cut out."""
    module = vars(sys.modules[model_class.__module__]).values()
    return any(hasattr(part, "get_image_features") for part in module if inspect.isclass(part))


def decoder_of(model: Any) -> Any:
    """The part of a multimodal model that is called with embeddings and a cache."""
    decoder = model.get_decoder()
    return getattr(decoder, "language_model", decoder)


@dataclass(frozen=True)
class GenericDecoder:
    """Inputs and computation of a decoder's graph.

    Attributes:
        rule: of its positions; `None`: it takes none.
        marks: the model's name for the input that marks image tokens; "" for none.
        inner: whether the decoder alone is run, and the head on it, in place of the whole model.
        deepstack: numbers of the layers behind which features go in.
        per_layer: whether it takes embeddings for each layer besides `inputs_embeds` (Gemma 4).
    """

    rule: Rule | None
    marks: str = ""
    inner: bool = False
    deepstack: tuple[int, ...] = ()
    per_layer: bool = False

    def inputs(self, model: Any) -> Shapes:
        """Besides embeddings, mask and state, in the order of the graph's inputs."""
        shapes: dict[str, Any] = {}
        if self.rule is not None:
            shapes["position_ids"] = RULES[self.rule]
        if self.marks:
            shapes[_MARKS] = (BATCH, SEQUENCE)
        width = model.config.get_text_config().hidden_size
        return shapes | {embeds_name(number): (BATCH, SEQUENCE, width) for number in self.deepstack}

    def feeds(self, config: Any, turn: Turn) -> Arrays:
        """The values for `inputs`."""
        values: Arrays = {}
        if self.rule is not None:
            values["position_ids"] = self.rule(config, turn)
        if self.marks:
            values[_MARKS] = turn.of_image[:, -turn.length :].astype(np.int64)
        if self.deepstack:
            shape = (*turn.ids.shape, config.get_text_config().hidden_size)
            dense = {embeds_name(number): np.zeros(shape, np.float32) for number in self.deepstack}
            dense = scatter(turn.seen, turn.of_image) if turn.seen else dense
            values |= {name: rows[:, -turn.length :] for name, rows in dense.items()}
        return values

    def embeds(self, model: Any, ids: Any) -> Mapping[str, Any]:
        """`inputs_embeds [batch, sequence, width]`, and `per_layer_inputs [batch, sequence, layers, width]` where there are
        such.

        Image tokens that are beyond the table are looked up as the padding token: their rows are replaced. Others keep their
        row, for a model that answers with one; Gemma 4 itself takes padding for it.
        """
        import torch

        config, table = model.config, model.get_input_embeddings()
        pad = getattr(config.get_text_config(), "pad_token_id", None)  # which Molmo 2 has not
        image, rows = config.image_token_id, len(table.weight) if hasattr(table, "weight") else 0
        if isinstance(image, int) and (self.per_layer or image >= rows):
            ids = torch.where(ids == image, pad if isinstance(pad, int) and pad >= 0 else 0, ids)
        embeds = _other_tables(model, ids, table(ids))
        if not self.per_layer:
            return {"inputs_embeds": embeds}
        layers = decoder_of(model).get_per_layer_inputs
        takes_embeds = len(inspect.signature(layers).parameters) > 1
        return {"inputs_embeds": embeds, PER_LAYER: layers(ids, embeds) if takes_embeds else layers(ids)}

    def run(self, model: Any, **inputs: Any) -> Any:
        """An object with `logits` and `past_key_values`."""
        if self.marks:
            inputs[self.marks] = inputs.pop(_MARKS)
        decoder = decoder_of(model)
        added = {number: inputs.pop(embeds_name(number)) for number in self.deepstack}
        with _added(decoder, added), _marks_count(bool(self.marks)):
            if not self.inner:
                return type(model).forward(model, use_cache=True, **inputs)
            outputs = decoder(use_cache=True, **inputs)
        if hasattr(outputs, "logits"):  # a language model with its own head
            return outputs
        logits = model.get_output_embeddings()(outputs.last_hidden_state)
        return SimpleNamespace(logits=logits, past_key_values=outputs.past_key_values)


def _other_tables(model: Any, ids: Any, embeds: Any) -> Any:
    """The embeddings with those of tokens that have a table of their own in place: Gemma 3n's marks around pictures and sounds.

    Such a table is for the tokens from its `vocab_offset` to that of the next one.
    """
    import torch

    tables = [part for part in getattr(model, "model", model).children() if hasattr(part, "vocab_offset")]
    for table in sorted(tables, key=lambda table: table.vocab_offset):
        within = ids >= table.vocab_offset
        last = table.vocab_offset + table.vocab_size - 1
        embeds = torch.where(within[..., None], table(input_ids=torch.where(within, ids, last).clamp(max=last)), embeds)
    return embeds


@contextmanager
def _marks_count(marked: bool) -> Iterator[None]:
    """Within, a model that reads marks at the prompt only (Molmo 2) reads them at every call. Later calls have none set."""
    from transformers.cache_utils import Cache

    with ExitStack() as stack:
        if marked:
            stack.enter_context(mock.patch.object(Cache, "is_initialized", property(lambda cache: False)))
        yield


@contextmanager
def _added(decoder: Any, features: Mapping[int, Any]) -> Iterator[None]:
    """Within, the decoder adds these features `[batch, sequence, width]` to the states behind the layers of these numbers.

    The original adds at the image tokens only, which it looks for; here the rest is zeros.
    """

    def with_rows(forward: Any, rows: Any) -> Any:
        def changed(*args: Any, **named: Any) -> Any:
            states = forward(*args, **named)
            return (states[0] + rows, *states[1:]) if isinstance(states, tuple) else states + rows

        return changed

    with ExitStack() as stack:
        for number, rows in features.items():
            layer = decoder.layers[number]
            stack.enter_context(mock.patch.object(layer, "forward", with_rows(layer.forward, rows)))
        yield
