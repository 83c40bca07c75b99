"""Image-text-to-text types that runtimes ship for ONNX or OpenVINO, by transformers' names.

A runtime's own name for the same models counts as transformers' type: `llava_qwen2` (FastVLM), `multi_modality` (Janus),
`internvl_chat` (InternVL), `fara` (Qwen2.5-VL), `phi4mm`. Models of remote code that transformers has no type for (Moondream,
Phi-3 Vision, MiniCPM-V 2.6, Maira-2) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

# packages/transformers/src/models/registry.js: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and
# MODEL_FOR_MULTIMODALITY_MAPPING_NAMES; models/gemma3 and models/gemma4.
_TRANSFORMERS_JS = (
    "fast_vlm florence2 gemma3 gemma3n gemma4 glm_ocr idefics3 janus lfm2_vl lighton_ocr llava llava_onevision mistral3 "
    "paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm"
)
# onnxruntime-genai 0.18: the architectures of models/builder.py.
_GENAI = "gemma3 gemma4 gemma4_unified lfm2_vl mistral3 phi4_multimodal qwen2_5_vl qwen3_5 qwen3_5_moe qwen3_vl"
# optimum-intel, docs/source/openvino/models.mdx, and openvino.genai's table of VLMs.
_OPENVINO = (
    "fast_vlm gemma3 gemma3n gemma4 gemma4_unified got_ocr2 idefics3 internvl llama4 llava llava_next llava_next_video "
    "paddleocr_vl phi4_multimodal qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl smolvlm"
)
SHIPPED_BY: Mapping[str, tuple[str, ...]] = {
    "transformers.js": tuple(_TRANSFORMERS_JS.split()),
    "onnxruntime-genai": tuple(_GENAI.split()),
    "OpenVINO": tuple(_OPENVINO.split()),
}


def shippers(model_type: str) -> str:
    """The runtimes that ship a type, as text; empty for none."""
    return ", ".join(runtime for runtime, types in SHIPPED_BY.items() if model_type in types)
