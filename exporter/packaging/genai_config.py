"""Writes `genai_config.json` from the model's own configs and its decoder's inputs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.errors import GuardError
from ...graphs.graph_io import load_graph
from ...graphs.json_files import read_json
from ...graphs.package import ModelPackage
from ...graphs.roles import EMBEDS, LOGITS, MASK, POSITIONS, TOKENS
from ...graphs.strict_json import to_strict_json
from .genai_pictures import FED_PICTURES, SESSION, picture_sections
from .genai_pipelines import RUNTIME, PicturePipeline, pipeline_of

FED_TEXT = (TOKENS, MASK, POSITIONS)
GRAPH = "model.onnx"


def takes_pictures(decoder: ir.Model) -> bool:
    """Whether the decoder is part of a picture pipeline: it takes embeddings in place of tokens."""
    return any(value.name == EMBEDS for value in decoder.graph.inputs)


def config_bytes(package: ModelPackage, decoder: ir.Model) -> bytes:
    """`genai_config.json` as it is written."""
    return (to_strict_json(_config(package, decoder), indent=4) + "\n").encode()


def _config(package: ModelPackage, decoder: ir.Model) -> dict[str, Any]:
    """`genai_config.json`: who the model is, what its graph is called, how it is searched (greedy)."""
    config, generation = package.config, read_json(package.root / "generation_config.json")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config

    def said(*names: str) -> Any:
        values = (part.get(name) for name in names for part in (generation, text, config))
        return next((value for value in values if value is not None), None)

    pictures = takes_pictures(decoder)
    fed = FED_PICTURES if pictures else FED_TEXT
    inputs = {name: name for name in fed if any(value.name == name for value in decoder.graph.inputs)}
    longest, heads = package.longest_sequence, said("num_attention_heads", "n_head")
    known = {
        "eos_token_id": said("eos_token_id"),
        "vocab_size": said("vocab_size"),
        "num_hidden_layers": package.expected_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": package.kv_heads,
        "head_dim": package.head_size,
        "hidden_size": (_fed_width(decoder) if pictures else None) or said("hidden_size", "n_embd"),
        "max_position_embeddings": longest,
        # a prompt's tokens of this id are padding to genai: another one than the model's would hide tokens of the prompt
        **({"pad_token_id": said("pad_token_id")} if pictures else {}),
    }
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise GuardError(
            f"{package.root}: its configs do not contain {missing[0]}, which {RUNTIME} needs; put the model's config.json "
            "beside it"
        )
    pipeline = pipeline_of(config, package.root) if pictures else None
    states = pipeline.states if pipeline is not None else {}
    layers = _layers(pipeline, package, decoder) if pipeline is not None else {}
    shares = any(node.op_type == "GroupQueryAttention" for node in decoder.graph.all_nodes())
    eos = known["eos_token_id"]
    first = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "bos_token_id": said("bos_token_id") if said("bos_token_id") is not None else first,
            "context_length": longest,
            "decoder": {
                "session_options": SESSION,
                "filename": GRAPH,
                "head_size": known["head_dim"],
                "hidden_size": known["hidden_size"],
                "inputs": inputs
                | {f"past_{kind}_names": f"{COMMUNITY_PAST}.%d.{kind}" for kind in ("key", "value")}
                | {f"past_{kind}_names": f"{past}.%d" for kind, (past, _) in states.items()},
                "outputs": {LOGITS: LOGITS}
                | {f"present_{kind}_names": f"{COMMUNITY_PRESENT}.%d.{kind}" for kind in ("key", "value")}
                | {f"present_{kind}_names": f"{present}.%d" for kind, (_, present) in states.items()},
                "num_attention_heads": heads,
                "num_hidden_layers": known["num_hidden_layers"],
                "num_key_value_heads": known["num_key_value_heads"],
                **layers,
            },
            "eos_token_id": eos,
            "pad_token_id": said("pad_token_id") if said("pad_token_id") is not None else first,
            "type": said("model_type"),
            "vocab_size": known["vocab_size"],
            **(_picture_sections(package) if pictures else {}),
        },
        # One buffer for past and present is GroupQueryAttention's alone.
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": shares},
    }


def _fed_width(decoder: ir.Model) -> int | None:
    """The width of the embeddings that are fed, if it is known; larger than that of states where features lie beside them."""
    shape = next(value.shape for value in decoder.graph.inputs if value.name == EMBEDS)
    width = None if shape is None else shape[-1]
    return width if isinstance(width, int) else None


def _layers(pipeline: PicturePipeline, package: ModelPackage, decoder: ir.Model) -> dict[str, Any]:
    """The entries about layers that only this type has."""
    try:
        return pipeline.of_decoder(package.expected_layers or 0, decoder.graph)
    except GuardError as error:
        raise GuardError(f"{package.decoder}: {error}") from None


def _picture_sections(package: ModelPackage) -> dict[str, Any]:
    assert package.vision_encoder is not None  # `require_graphs`
    return picture_sections(package.config, load_graph(package.vision_encoder, trust_links=True).graph, package.root)
