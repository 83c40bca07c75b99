"""A type's default config made small: 4 layers 64 wide, a vision encoder of 2 layers 32 wide, 512 tokens.

transformers' configs have many names for the same sizes. Each table maps a name to what it becomes; a list with one entry a
layer is cut to as many entries as there are layers, with every kind of layer in it. `special_configs` has what does not
follow from this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

LAYERS, WIDTH, VOCABULARY_SIZE = 4, 64, 512
FIRST_SPECIAL_TOKEN = 400  # tokens that a config names are moved to here; all below are words

_TEXT: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "decoder_layers", "max_window_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers",), LAYERS),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads", "num_sliding_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "index_n_heads", "indexer_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("indexer_head_dim", "mamba_head_dim", "query_pre_attn_scalar", "ple_embed_dim", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("laurel_rank", "ssm_state_size", "chunk_size", "d_rel", "hc_lowrank", "loop_gate_rank"), 8),
    **dict.fromkeys(("index_block_size", "make_ngram_vocab_size_divisible_by"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "n_groups"), 2),
    **dict.fromkeys(("split_ngram_parts", "heads_per_ngram"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("shared_experts_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(("rel_extent",), 32),
    **dict.fromkeys(
        ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("indexer_kv_heads", "expand", "loop_layer_index_start"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 6),
    **dict.fromkeys(("index_topk", "indexer_budget", "attention_chunk_size", "ngram_vocab_size_base"), 64),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY_SIZE),
    **dict.fromkeys(("moe_latent_size", "num_mtp_layers", "swiglu_limits", "cross_attention_layers")),
    **dict.fromkeys(("unpadded_vocab_size", "output_vocab_size")),
    "moe_hidden_size": 48,
    "index_topk_blocks": 16,
    "loop_layer_index_end": 3,
}
_TOWER: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "width", "projector_input_dim", "adapter_in_dim"), 32),
    **dict.fromkeys(("base_channels", "output_channels"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "projection_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers", "num_layers", "layers", "num_attention_heads"), 2),
    **dict.fromkeys(("num_heads", "num_key_value_heads", "attention_heads", "num_local_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(
        ("out_hidden_size", "projection_dim", "output_dim", "text_hidden_size", "vision_output_dim"), WIDTH
    ),
    **dict.fromkeys(
        ("projector_output_dim", "adapter_out_dim", "encoder_hidden_size", "image_text_hidden_size"), WIDTH
    ),
    **dict.fromkeys(("head_dim", "moe_intermediate_size", "num_patches", "num_pos_feats", "sliding_window"), 16),
    **dict.fromkeys(("image_size", "max_image_size"), 56),
    **dict.fromkeys(("num_position_embeddings", "max_num_patches"), 64),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width"), 8),
    **dict.fromkeys(("decoder_num_layers", "num_global_layers"), 1),
    "vocab_size": VOCABULARY_SIZE,
    "num_experts": 4,
    "max_position_embeddings": 256,
    "merged_hidden_size": 128,
}
_WHOLE: Mapping[str, Any] = {
    **dict.fromkeys(
        ("projection_dim", "hidden_size", "out_hidden_size", "vision_output_dim", "text_hidden_size"), WIDTH
    ),
    **dict.fromkeys(("projector_hidden_size", "projection_intermediate_size", "alignment_intermediate_size"), 48),
    **dict.fromkeys(("projection_hidden_size", "vision_hidden_size", "downsample_hidden_size"), 32),
    **dict.fromkeys(("image_token_embed_dim",), 32),
    **dict.fromkeys(("num_query_tokens", "image_seq_length", "mm_tokens_per_image", "num_image_tokens"), 4),
    "merged_hidden_size": 128,
}
_DROPPED = (
    "transformers_version",
    "architectures",
    "_name_or_path",
    "dtype",
    "id2label",
    "label2id",
    "per_layer_config",
    "quantization_config",
)
_OF_LAYERS = ("index", "idxs", "layers_indices", "feature_layer", "layer_ids")


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain data, shrunk."""
    where = _WHOLE if isinstance(config.get("text_config"), dict) else _TEXT
    return _shrunk(config, where, {})


def _shrunk(config: Mapping[str, Any], table: Mapping[str, Any], tokens: dict[int, int]) -> dict[str, Any]:
    depths = (config.get(name) for name in ("num_hidden_layers", "n_layers", "depth", "num_layers"))
    depth = next((number for number in depths if isinstance(number, int)), None)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in _DROPPED:
            continue
        if isinstance(value, dict):
            small[name] = _part(name, value, tokens)
        elif name.endswith(("token_id", "token_index", "_token_ids")):
            small[name] = _token(value, tokens)
        elif isinstance(value, list) and depth and len(value) == depth > 3:
            small[name] = _kinds(value, table.get("num_hidden_layers", 2))
        elif name in table and value is not None:
            small[name] = _size(value, table[name])
        elif isinstance(value, list) and _names_layers(name, value):
            last = table.get("num_hidden_layers", 2) - 1
            small[name] = sorted({min(number, last) for number in value}) if min(value) >= 0 else value
        else:
            small[name] = value
    return small


def _part(name: str, value: dict[str, Any], tokens: dict[int, int]) -> dict[str, Any]:
    if name.endswith("_config"):
        of_text = any(word in name for word in ("text", "llm", "language", "thinker"))
        return _shrunk(value, _TEXT if of_text else _TOWER, tokens)
    return _rotation(value) if name in ("rope_parameters", "rope_scaling") else value


def _size(value: Any, small: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return None if small is None else [min(size, small) if isinstance(size, int) else size for size in value]
    if small is None or value == 0:
        return value if small is not None else None
    return min(small, value) if isinstance(value, int | float) else small


def _kinds(values: list[Any], count: int) -> list[Any]:
    """As many entries as there are layers; every kind of layer is among them."""
    if not all(isinstance(value, str) for value in values):
        return values[:count]
    kinds = list(dict.fromkeys(values))
    return [kinds[number % len(kinds)] for number in range(max(count, len(kinds)))]


def _token(value: Any, tokens: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_token(number, tokens) for number in value]
    if not isinstance(value, int) or value < FIRST_SPECIAL_TOKEN:
        return value
    return tokens.setdefault(value, FIRST_SPECIAL_TOKEN + len(tokens))


def _rotation(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters of heads 16 wide, whose three axes share 8 pairs."""
    if value and all(isinstance(part, dict) for part in value.values()):
        return {name: _rotation(part) for name, part in value.items()}
    small = copy.deepcopy(value)
    if small.get("mrope_section"):
        small["mrope_section"] = [4, 2, 2]
    for name, size in (("original_max_position_embeddings", 64), ("max_position_embeddings", 256)):
        if name in small:
            small[name] = size
    return small


def _names_layers(name: str, value: Any) -> bool:
    of_numbers = isinstance(value, list) and bool(value) and all(isinstance(number, int) for number in value)
    return of_numbers and any(word in name for word in _OF_LAYERS)
