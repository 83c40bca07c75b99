"""`vlmguard package --genai`: a folder that onnxruntime-genai opens, for decoders that take token ids.

genai's vision models want an embedding graph that mixes image features in itself (inputs `input_ids` and `image_features`).
The graphs of the onnx-community layout leave that to the app, so that only text decoders can be laid out anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.errors import GuardError
from ...graphs.manifest import Manifest
from ...graphs.package import ModelPackage, load_graph, read_json
from ...graphs.roles import EMBEDS, LOGITS, MASK, POSITIONS, TOKENS
from ...graphs.staging import Data
from ...graphs.strict_json import to_strict_json
from ..sources import Watch
from .arrangement import Arrangement, Packaged, loose_files, rearrange, require_other_layout, with_data
from .known_inputs import require_known

_RUNTIME = "onnxruntime-genai"
_FED = (TOKENS, MASK, POSITIONS)
_GRAPH = "model.onnx"


def package_genai(
    guarded: Path | str,
    out: Path | str,
    *,
    data: Data = "link",
    force: bool = False,
    watch: Watch | None = None,
) -> Packaged:
    """Write the genai layout; arguments and errors as for `rearrange`.

    Raises:
        GuardError: onnxruntime-genai would not feed the decoder, or no config says what it has to know.
    """
    return rearrange(guarded, out, arrange, data=data, force=force, watch=watch)


def arrange(manifest: Manifest, package: ModelPackage) -> Arrangement:
    """What the folder holds.

    Raises:
        GuardError: as for `package_genai`.
    """
    require_other_layout(package, "genai", _RUNTIME)
    decoder = load_graph(package.decoder, vouched=True)
    inputs = [str(value.name) for value in decoder.graph.inputs]
    if EMBEDS in inputs:
        raise GuardError(
            f"{package.decoder}: takes inputs_embeds, and {_RUNTIME} wants an embedding graph that mixes image features in, "
            "which this folder has not; export the checkpoint with --exporter genai, or keep the layout that it has"
        )
    require_known(decoder, str(package.decoder), _RUNTIME, _FED)
    brought = {name: name for name in loose_files(manifest, package) if not name.startswith("onnx/")}
    brought |= with_data(package.decoder, package.root, _GRAPH)
    config = to_strict_json(_config(package, decoder), indent=4) + "\n"
    there = package.decoder.relative_to(package.root).as_posix()
    return Arrangement("genai", {there: _GRAPH}, brought, {"genai_config.json": config.encode()})


def _config(package: ModelPackage, decoder: ir.Model) -> dict[str, Any]:
    """`genai_config.json`: who the model is, what its graph is called, how it is searched (greedy)."""
    config, generation = package.config, read_json(package.root / "generation_config.json")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config

    def said(*names: str) -> Any:
        found = (part.get(name) for name in names for part in (generation, text, config))
        return next((value for value in found if value is not None), None)

    inputs = {name: name for name in _FED if any(value.name == name for value in decoder.graph.inputs)}
    longest, heads = package.longest_sequence, said("num_attention_heads", "n_head")
    known = {
        "eos_token_id": said("eos_token_id"),
        "vocab_size": said("vocab_size"),
        "num_hidden_layers": package.expected_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": package.kv_heads,
        "head_dim": package.head_size,
        "hidden_size": said("hidden_size", "n_embd"),
        "max_position_embeddings": longest,
    }
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise GuardError(
            f"{package.root}: its configs do not say {missing[0]}, which {_RUNTIME} has to know; put the model's config.json "
            "beside it"
        )
    shares = any(node.op_type == "GroupQueryAttention" for node in decoder.graph.all_nodes())
    eos = known["eos_token_id"]
    first = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "bos_token_id": said("bos_token_id") if said("bos_token_id") is not None else first,
            "context_length": longest,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": _GRAPH,
                "head_size": known["head_dim"],
                "hidden_size": known["hidden_size"],
                "inputs": inputs | {f"past_{kind}_names": f"{COMMUNITY_PAST}.%d.{kind}" for kind in ("key", "value")},
                "outputs": {LOGITS: LOGITS}
                | {f"present_{kind}_names": f"{COMMUNITY_PRESENT}.%d.{kind}" for kind in ("key", "value")},
                "num_attention_heads": heads,
                "num_hidden_layers": known["num_hidden_layers"],
                "num_key_value_heads": known["num_key_value_heads"],
            },
            "eos_token_id": eos,
            "pad_token_id": said("pad_token_id") if said("pad_token_id") is not None else first,
            "type": said("model_type"),
            "vocab_size": known["vocab_size"],
        },
        # One buffer for past and present is GroupQueryAttention's alone.
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": shares},
    }
