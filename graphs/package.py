"""A model's folder on disk, opened read-only: the decoder, the graphs around it, configs, and the files that go along."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from .genai_pipeline import stage_files
from .graph_io import external_files, load_graph
from .json_files import read_json
from .layer_count import LayerCount, declared_layers
from .links import require_own
from .read_once import Stamp, stamp_of
from .roles import NOTHING_DECLARED, DeclaredNames, InputRoles, declare, declared_by_genai, input_roles

Layout = Literal["onnx-community", "genai", "transformers", "bare", "triton", "engines"]

# Files that belong to a bare model: what tokenises, what templates, what describes.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "processor.json",
    "image_processor.json",
    "LICENSE",
    "LICENSE.txt",
    "README.md",
)
SIGNATURE_NAME = "model.sig"
SBOM_NAME = "sbom.cdx.json"
_NEVER_COPIED = ("guard.json", "guard.toml", "directions.safetensors", SIGNATURE_NAME, SBOM_NAME)
# Checkpoints are unguarded weights, and no program of a model's is ever run.
_LEFT_BEHIND = frozenset(
    {".safetensors", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".tflite"}
    | {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}
)


@dataclass(frozen=True)
class ModelPackage:
    """A model on disk, opened read-only.

    Attributes:
        root: the folder that is the model; a guarded copy mirrors it.
        decoder: absolute path of the decoder graph that runs.
        others: absolute paths of the other graphs that hold the same decoder, to be guarded alike.
        layout: how the folder is laid out.
        vision_encoder, embed_tokens: absolute paths of the graphs around the decoder, where there are such.
        left_out: graphs of the folder that a guarded copy does not take along, relative to root.
        trust_links: the folder is a guarded one, and links out of it are what its manifest has digests of.
        head: absolute path of the graph that makes logits of what the decoder gives, where the decoder does not.
    """

    root: Path
    decoder: Path
    layout: Layout
    vision_encoder: Path | None = None
    embed_tokens: Path | None = None
    left_out: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    trust_links: bool = False
    head: Path | None = None

    def views(self) -> tuple[ModelPackage, ...]:
        """This package once per decoder graph, the one that runs first; in each view that graph is `decoder`."""
        paths = (self.decoder, *self.others)
        return tuple(replace(self, decoder=path, others=tuple(p for p in paths if p != path)) for path in paths)

    @property
    def name(self) -> str:
        """Base of the default output's name."""
        return self.decoder.stem if self.layout == "bare" else self.root.name

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, or an empty dict."""
        path = self.companion("config.json")
        return read_json(path) if path is not None else {}

    @property
    def expected_layers(self) -> int | None:
        """Number of the text decoder's layers, if a config has it."""
        declared = self.declared_layers
        return None if declared is None else declared.count

    @property
    def declared_layers(self) -> LayerCount | None:
        """The text decoder's layers, as `config.json` declares them, else `genai_config.json`; what `dissect` checks."""
        return declared_layers((self.config, read_json(self.root / "genai_config.json")))

    @property
    def kv_heads(self) -> int | None:
        """Number of key/value heads, if a config has it."""
        return self._declared("num_key_value_heads") or self._declared("num_attention_heads", "n_head")

    @property
    def head_size(self) -> int | None:
        """Size of one attention head, if a config has it."""
        declared = self._declared("head_dim", "head_size")
        width, heads = self._declared("hidden_size", "n_embd"), self._declared("num_attention_heads", "n_head")
        return declared or (width // heads if width and heads else None)

    @property
    def longest_sequence(self) -> int | None:
        """Largest number of positions, if a config has it: `config.json`, else `genai_config.json`."""
        declared = self._declared("max_position_embeddings", "n_positions", "context_length")
        if declared is None or isinstance(declared, bool) or declared < 1:
            return self._genai_context()
        return declared

    def _genai_context(self) -> int | None:
        """`model.context_length`, else `search.max_length`, of `genai_config.json`."""
        genai = read_json(self.root / "genai_config.json")
        for part, key in (("model", "context_length"), ("search", "max_length")):
            entry = genai.get(part)
            size = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
        return None

    def _declared(self, *keys: str) -> int | None:
        """A number about the text decoder: from `config.json`, else from `genai_config.json`."""
        config = self.config
        genai = self.root / "genai_config.json"
        model = read_json(genai).get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        for part in (config.get("text_config"), config.get("llm_config"), config, decoder):
            for key in keys:
                if isinstance(part, dict) and isinstance(part.get(key), int):
                    return part[key]
        return None

    def companion(self, name: str) -> Path | None:
        """A file beside the decoder, at the root, or (bare layout) in the folder above; `None` if there is none."""
        folders = [self.root, self.decoder.parent]
        if self.layout == "bare":
            folders.append(self.root.parent)
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def load_decoder(self) -> ir.Model:
        """The decoder's graph, a fresh copy at each call; big weights stay in their files."""
        model = load_graph(self.decoder, self.trust_links)
        declare(model.graph, self.declared_names)
        return model

    @property
    def declared_names(self) -> DeclaredNames:
        """Names of the decoder's inputs and outputs in `genai_config.json`; empty if it names another graph."""
        path = self.companion("genai_config.json")
        config = read_json(path) if path is not None else {}
        model = config.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        named = decoder.get("filename") if isinstance(decoder, dict) else None
        files = [named] if isinstance(named, str) else stage_files(config)
        own = path is not None and self.decoder in [path.parent / name for name in files]
        return declared_by_genai(config) if own else NOTHING_DECLARED

    @property
    def roles(self) -> InputRoles:
        """The roles of the decoder's inputs; a guarded copy has the same."""
        return _roles(self, stamp_of(self.decoder), json.dumps([self.declared_names.names, self.declared_names.states]))

    def files(self) -> Iterator[tuple[Path, str]]:
        """`(source, path relative to root)` of every file that a guarded copy takes along, the decoders' own not.

        Raises:
            ModelUnreadable: one of them is a link out of the folder: the copy would have a file that is not the model's.
        """
        for path, relative in self._files():
            if not self.trust_links:
                require_own(path, path.parent if self.layout == "bare" else self.root)
            yield path, relative

    def _files(self) -> Iterator[tuple[Path, str]]:
        decoders = (self.decoder, *self.others)
        own = {*decoders, *(data for decoder in decoders for data in external_files(decoder))}
        if self.layout == "bare":
            for name in COMPANIONS:
                path = self.companion(name)
                if path is not None:
                    yield path, name
            return
        skipped = set(self.left_out)
        for path in sorted(self.root.rglob("*")):
            relative = path.relative_to(self.root)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_file() and path not in own and not hidden and relative.as_posix() not in skipped:
                if path.suffix.lower() in _LEFT_BEHIND or path.name in _NEVER_COPIED:
                    continue
                yield path, relative.as_posix()


@lru_cache(maxsize=16)
def _roles(package: ModelPackage, stamp: Stamp | None, declared: str) -> InputRoles:
    """Cached: every opening of the decoder needs them, and they cost a parse."""
    return input_roles(package.load_decoder().graph)
