"""What a type's small config needs besides `shrunk_config`: sizes that depend on one another, lists of particular lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Change = Callable[[dict[str, Any]], None]


def text(**values: Any) -> Change:
    """Values of the text config."""

    def change(config: dict[str, Any]) -> None:
        part = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        part.update(values)

    return change


def at(**values: Any) -> Change:
    """Values by their path, `vision_config__image_size`."""

    def change(config: dict[str, Any]) -> None:
        for path, value in values.items():
            *parents, last = path.split("__")
            part = config
            for parent in parents:
                part = part[parent]
            part[last] = value

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(config: dict[str, Any]) -> None:
        for one in changes:
            one(config)

    return change


def _rotation(sections: list[int], partial: float = 1.0, theta: float = 10000.0) -> dict[str, Any]:
    rotation = {"rope_theta": theta, "rope_type": "default", "mrope_section": sections}
    return rotation if partial == 1.0 else {**rotation, "partial_rotary_factor": partial}


_HALVES = ["full_attention", "sliding_attention"]
_OMNI = at(
    audio_config__d_model=32,
    audio_config__encoder_attention_heads=2,
    audio_config__encoder_ffn_dim=32,
    audio_config__encoder_layers=2,
    audio_config__output_dim=64,
    vision_start_token_id=440,
    vision_end_token_id=441,
    audio_start_token_id=442,
    audio_end_token_id=443,
    text_config__rope_parameters=_rotation([4, 2, 2], theta=1e6),
)
# Names of image codes for the types whose vocabulary maps text to them.
_CODES = {"<image>": 400} | {
    f"IMGIMG{a}{b}Z": 410 + 2 * number + second for number, a in enumerate("BCDEFGHI") for second, b in enumerate("AB")
}
_GEMMA4_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 128,
    "hidden_activation": "gelu_pytorch_tanh",
}
# Gemma 3n's vision encoder, one block of each kind, in the notation of timm.
_MOBILE_NET = [
    ["er_r1_k3_s2_e4_c16"],
    ["uir_r1_a3_k5_s2_e6_c16"],
    ["uir_r1_a5_k5_s2_e6_c32", "mqa_r1_k3_h2_v2_s1_d16_c32", "uir_r1_a0_k0_s1_e2_c32"],
    ["uir_r1_a5_k5_s2_e6_c32", "mqa_r1_k3_h2_s1_d16_c32", "uir_r1_a0_k0_s1_e2_c32"],
]


def _mobile_net(config: dict[str, Any]) -> None:
    from timm.models._efficientnet_builder import decode_arch_def

    blocks = {"block_args": decode_arch_def(_MOBILE_NET), "stem_size": 16, "msfa_output_resolution": 4}
    config["vision_config"]["model_args"] = blocks


_PLAIN = _rotation([4, 2, 2])
_PARTIAL = _rotation([2, 1, 1], 0.5)

CHANGES: Mapping[str, Change] = {
    "qwen2_vl": both(text(rope_parameters=_PLAIN), at(vision_config__hidden_size=64)),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm_ocr"), text(rope_parameters=_PLAIN)),
    **dict.fromkeys(("paddleocr_vl", "cosmos3_edge", "cosmos3_omni"), text(rope_parameters=_PLAIN)),
    **dict.fromkeys(
        ("glm4v", "glm4v_moe", "glm46v", "glmga", "qwen3_5", "qwen3_5_moe"), text(rope_parameters=_PARTIAL)
    ),
    "aria": at(vision_config__patch_size=14, vision_config__image_size=490, projector_patch_to_query_dict={1225: 16}),
    **dict.fromkeys(("blip-2", "instructblip"), at(image_token_index=400)),
    "apertus1p5": at(
        text_config__vocab_size=700,
        image_token_offset=520,
        audio_token_offset=584,
        vision_config__codebook_size=64,
        vision_config__base_channels=32,
        vision_config__channel_multiplier=[1, 1, 1, 1, 1],
        vision_config__num_res_blocks=1,
        vision_config__resolution=32,
        audio_config__codebook_size=64,
        audio_config__hidden_size=32,
        audio_config__codebook_dim=32,
        audio_config__num_filters=2,
        audio_config__decoder_hidden_size=32,
        audio_config__decoder_intermediate_size=32,
        audio_config__decoder_attention_num_groups=4,
    ),
    "chameleon": at(
        vocabulary_map=_CODES,
        image_token_id=400,
        vq_config__num_embeddings=16,
        vq_config__embed_dim=32,
        vq_config__latent_channels=32,
        vq_config__resolution=32,
        vq_config__base_channels=32,
        vq_config__channel_multiplier=[1, 2],
    ),
    "cohere2_vision": at(vision_config__image_size=64),
    "cohere_compass": text(
        rope_parameters=dict.fromkeys(_HALVES, _PLAIN), layer_types=[*reversed(_HALVES)] * 2, logit_scale=0.25
    ),
    "deepseek_ocr2": both(
        text(mlp_layer_types=["dense", "sparse", "sparse", "sparse"], num_experts_per_tok=2, n_group=1, topk_group=1),
        at(vision_config__sam_config__downsample_channels=[16, 32]),
    ),
    "deepseek_vl_hybrid": at(high_res_vision_config__image_size=64),
    "diffusion_gemma": text(num_experts=4, top_k_experts=2, moe_intermediate_size=32),
    "dots3_note": both(
        text(num_key_value_heads=4, layer_types=["indexed_attention", "sliding_attention"] * 2),
        at(
            audio_config__adapter_out_dim=64,
            audio_config__adapter_input_size=32,
            audio_config__num_attention_heads=2,
            audio_config__num_key_value_heads=2,
            audio_config__downsample_hidden_size=8,
        ),
    ),
    "emu3": at(
        vocabulary_map={"<image>": 400, "<|extra_200|>": 401}
        | {f"<|visual token {code:06}|>": 410 + code for code in range(16)},
        image_token_id=400,
        vq_config__hidden_size=64,
        vq_config__base_channels=32,
        vq_config__channel_multiplier=[1, 2],
        vq_config__attn_resolutions=[],
        vq_config__num_res_blocks=1,
        vq_config__codebook_size=16,
    ),
    "ernie4_5_vl_moe": text(rope_parameters=_rotation([3, 3, 2], theta=500000.0)),
    "fast_vlm": at(
        vision_config__hidden_size=64,
        vision_config__image_size=128,
        vision_config__model_args={"inference_mode": True, "layers": [1] * 5, "embed_dims": [8, 16, 32, 32, 32]},
    ),
    "gemma3n": both(
        at(
            text_config__activation_sparsity_pattern=[0.0] * 4,
            # tokens from `eoi_token_id` on have no entry in the tables of text, but in those of pictures and sounds
            text_config__vocab_size_per_layer_input=401,
            vision_config__vocab_offset=401,
            vision_config__vocab_size=3,
            audio_config__vocab_offset=404,
            audio_config__vocab_size=108,
            audio_config__conf_num_hidden_layers=1,
            audio_config__conf_num_attention_heads=2,
            vision_soft_tokens_per_image=16,
            vision_config__hidden_size=2048,
            vision_config__image_size=128,
        ),
        _mobile_net,
    ),
    "gemma4": at(vision_config=_GEMMA4_TOWER),
    "glm5_next": text(num_key_value_heads=4, qk_nope_head_dim=16, qk_head_dim=16),
    "granite4_vision": both(
        at(
            vision_config__hidden_size=64,
            vision_config__num_attention_heads=2,
            qformer_config__hidden_size=64,
            downsample_rate="1/2",
            deepstack_layer_map=[[0, 1], [1, 0]],
            spatial_target_layers=[2, 3],
            vision_config__image_size=64,
            vision_config__patch_size=16,
            image_grid_pinpoints=[[64, 128], [128, 64], [128, 128]],
        ),
        text(embedding_multiplier=12.0, logits_scaling=2.0, residual_multiplier=0.22, attention_multiplier=0.1),
    ),
    "hunyuan_vl": text(head_dim=16, num_key_value_heads=2, rope_parameters=_rotation([2, 2, 2, 2])),
    "hy_v4_vl": text(rope_parameters=_rotation([2, 1, 1]), num_key_value_heads=4),
    "inkling2": both(at(quantization_config=None), text(unpadded_vocab_size=500, n_layers_per_attn_res_block=2)),
    "inkling2_loop": both(at(quantization_config=None), text(unpadded_vocab_size=500, n_layers_per_attn_res_block=1)),
    "inkling_mm_model": text(unpadded_vocab_size=500),
    "kimi_k25": text(head_dim=8, num_key_value_heads=4),
    "lfm2_vl": text(
        layer_types=["conv", "full_attention", "conv", "full_attention"], full_attn_idxs=[1, 3], block_multiple_of=16
    ),
    "llava_onevision": at(image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]),
    "llama4": both(
        text(no_rope_layers=[1, 0, 1, 0], attn_temperature_tuning=True, attention_chunk_size=6, floor_scale=8),
        at(vision_config__intermediate_size=128, vision_config__projector_input_dim=64),
    ),
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        at(image_token_id=400, vision_config__image_size=64, insert_layer_id=0, vision_config__insert_layer_id=0),
    ),
    "mistral4": text(num_key_value_heads=4, n_group=1),
    "mistral_large4": text(
        num_key_value_heads=4, head_dim=8, layer_types=["indexed_attention"] * 4, no_rope_layers=[1, 0, 1, 0]
    ),
    "gemma4_unified": at(
        vision_config={
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "mm_embed_dim": 32,
            "mm_posemb_size": 128,
            "output_proj_dims": 32,
        }
    ),
    "molmo2": at(
        image_patch_id=460,
        vision_config__image_size=[112, 112],  # smaller ones would be cut into as many parts as are allowed, always
        vision_config__patch_size=28,
        vision_config__num_position_embeddings=16,
        adapter_config__vision_feature_layer=[-1, -2],
    ),
    "mllama": text(cross_attention_layers=[1]),
    "muse_glimmer": at(out_hidden_size=128),
    "muse_spark": at(
        out_hidden_size=128,
        audio_config__out_hidden_size=64,
        audio_config__patch_sizes=[16, 6],
        audio_config__hidden_sizes=[16, 32],
        audio_config__depths=[1, 1],
        audio_config__num_hidden_layers=2,
    ),
    "nemotron_h_omni": at(image_token_id=400, vision_config__image_size=64),
    "perception_lm": at(
        vision_config__architecture="vit_pe_core_large_patch14_336",
        vision_config__model_args={
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "img_size": [56, 56],
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": [4, 4],
        },
    ),
    "phi4_multimodal": at(vision_config__crop_size=56, vision_config__patch_size=14, vision_config__image_token_id=400),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen4_exp": text(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
        rope_parameters=_PLAIN,
    ),
    **dict.fromkeys(("smolvlm", "idefics3", "granite_docling"), at(scale_factor=2, vision_config__patch_size=14)),
    "unlimited_ocr": at(
        vision_config__sam_config__downsample_channels=[16, 32],
        vision_config__sam_config__image_size=128,
        vision_config__encoder_config__image_size=28,
    ),
    "vipllava": at(vision_feature_layers=[-1, -2]),
    "step3p7": text(
        layer_types=_HALVES * 2,
        sliding_window=6,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _HALVES},
        swiglu_limits=None,
        swiglu_limits_shared=None,
    ),
}
