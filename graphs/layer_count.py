"""Number and kinds of layers declared in the configs beside a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Where the part about the text decoder stands: in a VLM's config, in an encoder-decoder's, in genai_config.json.
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "model")
# An encoder-decoder writes the decoder's own key besides `num_hidden_layers`, which then counts the encoder's layers.
_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types")
_CROSS_ATTENTION = "cross_attention_layers"
# In a list of blocks: those that mix no positions. Models that have them (Nemotron-H) give every block ONE mixer or MLP.
_NO_MIXER = frozenset({"mlp", "moe", "ffn", "-", "E"})
# What takes a decoder's states past its residual sums, by the key that declares it, and from which value on.
_PAST_SUMS = {
    "altup_num_inputs": ("several residual streams side by side", 2),
    "num_kv_shared_layers": ("keys and values that layers share", 1),
    "hidden_size_per_layer_input": ("embeddings per layer", 1),
    "n_layers_per_attn_res_block": ("attention over the outputs of earlier layers", 1),
    "hc_mult": ("several residual streams side by side", 2),
    "hc_count": ("several residual streams side by side", 2),
}


@dataclass(frozen=True)
class LayerCount:
    """A config's declarations about the decoder's layers.

    Attributes:
        count: how many.
        mixers: where every layer is one block: whether it mixes positions (attention, recurrence) or not (MLP, experts).
            `None`: every layer has a mixer.
        past_sums: what takes states past the residual sums, each a clause with its key.
        cross_attention: the layers that attend to an encoder alone; an export without the encoder's states leaves them out.
    """

    count: int
    mixers: tuple[bool, ...] | None = None
    past_sums: tuple[str, ...] = ()
    cross_attention: tuple[int, ...] = ()


def declared_layers(configs: Iterable[Mapping[str, Any]]) -> LayerCount | None:
    """The first declaration in these configs, the most specific part first; `None` if there is none."""
    for part in decoder_parts(configs):
        blocks = next((part[key] for key in _LISTS if _is_list(part.get(key))), None)
        if blocks is not None and any(block in _NO_MIXER for block in blocks):
            return LayerCount(len(blocks), tuple(block not in _NO_MIXER for block in blocks), _past_sums(part))
        counts = (_count(part.get(key)) for key in _COUNTS)
        count = next((number for number in counts if number is not None), None)
        if count is not None:
            return LayerCount(count, past_sums=_past_sums(part), cross_attention=_numbers(part.get(_CROSS_ATTENTION)))
        if blocks is not None:
            return LayerCount(len(blocks), past_sums=_past_sums(part))
    return None


def decoder_parts(configs: Iterable[Mapping[str, Any]], depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """The parts of configs that describe the text decoder, the innermost before the config that holds it.

    Args:
        depth: largest nesting to search; configs are untrusted, and real ones have two levels.
    """
    for config in configs:
        if depth:
            nested = (config[key] for key in _PARTS if isinstance(config.get(key), Mapping))
            yield from decoder_parts(nested, depth - 1)
        yield config


def _past_sums(part: Mapping[str, Any]) -> tuple[str, ...]:
    counts = {key: _count(part.get(key)) for key in _PAST_SUMS}
    said = ((key, count, *_PAST_SUMS[key]) for key, count in counts.items() if count is not None)
    return tuple(f"{what} ({key} {count})" for key, count, what, least in said if count >= least)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(n for n in value if _count(n) is not None) if isinstance(value, list | tuple) else ()


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | str) and len(value) > 0
