"""Attacks on the files of a guarded folder: what stands beside the guarded decoder, and what the manifest says of it.

The attacker lists every file that he adds or changes, with its right digest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hand_graphs import WIDTH, decoder, directions
from onnx import TensorProto, helper, numpy_helper
from random_directions import write_directions
from small_guarded import edit_manifest, sha256

import vlmguard

Attack = Callable[[Path], Any]
DECODER, EMBED, VISION = "onnx/decoder_model_merged.onnx", "onnx/embed_tokens.onnx", "onnx/vision_encoder.onnx"


def community_model(root: Path) -> Path:
    """The onnx-community layout by hand; embeddings and encoder keep their weights outside."""
    (root / "onnx").mkdir(parents=True)
    onnx.save(ir.to_proto(decoder(layers=3)), root / DECODER)
    table = numpy_helper.from_array(np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32), "table")
    save_outside(
        root / EMBED, _graph("Gather", ["table", "input_ids"], "inputs_embeds", [table], TensorProto.INT64, [1, 2])
    )
    weight = numpy_helper.from_array(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)).astype(np.float32), "weight")
    save_outside(
        root / VISION, _graph("MatMul", ["pixel_values", "weight"], "features", [weight], TensorProto.FLOAT, [1, WIDTH])
    )
    return with_texts(root)


def genai_model(root: Path) -> Path:
    """onnxruntime-genai's layout by hand."""
    root.mkdir(parents=True)
    onnx.save(ir.to_proto(decoder(layers=3)), root / "model.onnx")
    config = {"model": {"decoder": {"filename": "model.onnx", "session_options": {}}}}
    (root / "genai_config.json").write_text(json.dumps(config))
    return with_texts(root)


def with_texts(root: Path) -> Path:
    (root / "config.json").write_text("{}")
    (root / "tokenizer.json").write_text('{"model": {}}')
    (root / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (root / "generation_config.json").write_text('{"do_sample": false}')
    (root / "preprocessor_config.json").write_text('{"size": 8}')
    return root


def _graph(
    op: str, reads: list[str], output: str, weights: list[onnx.TensorProto], dtype: int, shape: list[int]
) -> onnx.ModelProto:
    read = next(name for name in reads if name not in {tensor.name for tensor in weights})
    graph = helper.make_graph(
        [helper.make_node(op, reads, [output])],
        "part",
        [helper.make_tensor_value_info(read, dtype, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def save_outside(path: Path, model: onnx.ModelProto) -> None:
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


def guard_folder(model: Path, out: Path) -> Path:
    found = write_directions(model.parent / f"{out.name}.safetensors", directions((0, 1)))
    try:
        return vlmguard.export(model, out, directions=found, proof="structure").out
    finally:
        found.unlink()


def list_all(folder: Path) -> None:
    """The manifest lists every file that is there, with its digest, and none that is not."""

    def fit(content: dict) -> None:
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("guard.json", "guard.toml")]
        content["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "size": path.stat().st_size, "modified_ns": 0}
            for path in sorted(paths)
        }

    edit_manifest(folder, fit)


def listed(attack: Attack) -> Attack:
    def change(folder: Path) -> None:
        attack(folder)
        list_all(folder)

    return change


def put(name: str, content: str | bytes | None = None) -> Attack:
    """A file more; without content the unguarded decoder."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a hard link to the source's
        if content is None:
            onnx.save(ir.to_proto(decoder(layers=3)), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return listed(change)


def configure(change: Callable[[dict], Any], name: str = "genai_config.json") -> Attack:
    def attack(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content))

    return listed(attack)


def both(*attacks: Attack) -> Attack:
    def change(folder: Path) -> None:
        for attack in attacks:
            attack(folder)

    return change


def manifest(change: Callable[[dict], Any]) -> Attack:
    return lambda folder: edit_manifest(folder, change)


def renamed_key(old: str, new: str) -> Attack:
    return manifest(lambda content: content["files"].update({new: content["files"].pop(old)}))


def another_key(old: str, new: str) -> Attack:
    return manifest(lambda content: content["files"].update({new: content["files"][old]}))


def packaged(**changes: Any) -> Attack:
    record = {"layout": "bare", "moved": {}, "written": [], "left_out": [], "options": {}}
    return manifest(lambda content: content.update(packaged=record | changes))


def engine_record(content: dict) -> None:
    source = {"graph": "model.onnx", "sha256": "0" * 64}
    content["engines"] = [
        {
            "path": next(name for name in content["files"] if name.endswith(".json")),
            "role": "decoder",
            "source": source,
            "backend": "tensorrt",
            "version": "10",
            "capabilities": [],
            "profiles": [],
            "layers": {"profiles": []},
        }
    ]


def embed_that_answers(folder: Path) -> None:
    """Embeddings, and beside them the logits of a decoder."""
    model = onnx.load(folder / EMBED)
    weight = numpy_helper.from_array(np.ones((WIDTH, 5), np.float32), "head")
    model.graph.initializer.append(weight)
    model.graph.node.append(helper.make_node("MatMul", ["inputs_embeds", "head"], ["scores"]))
    model.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 2, 5]))
    _replace(folder / EMBED, model)


def embed_that_attends(folder: Path) -> None:
    """A layer of attention among the embeddings: it sees text before any guard does, in a graph of another name."""
    model = onnx.load(folder / EMBED)
    model.graph.node[0].output[0] = "looked_up"
    model.graph.node.extend(
        [
            helper.make_node("Transpose", ["looked_up"], ["keys"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["looked_up", "keys"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["shares"]),
            helper.make_node("MatMul", ["shares", "looked_up"], ["mixed"]),
            helper.make_node("Add", ["looked_up", "mixed"], ["inputs_embeds"]),
        ]
    )
    _replace(folder / EMBED, model)


def _replace(path: Path, model: onnx.ModelProto) -> None:
    """Weights inside."""
    path.unlink()
    path.with_name(f"{path.name}.data").unlink()
    onnx.save(model, path)


def linked_folder(folder: Path) -> None:
    """A second layout through a link to a folder."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    onnx.save(ir.to_proto(decoder(layers=3)), elsewhere / "decoder_model_merged.onnx")
    os.symlink(elsewhere, folder / "more", target_is_directory=True)


def key_twice(folder: Path) -> None:
    path = folder / "guard.json"
    path.write_text(path.read_text().replace("{", '{"proved": "full",', 1))


def unlist(name: str) -> Attack:
    return manifest(lambda content: content["files"].pop(name))


def other_numbers(name: str) -> Attack:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[8] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(content)

    return listed(change)


def padded(folder: Path) -> None:
    """The unguarded decoder behind 200,000 empty fields, under a name that says nothing."""
    model = ir.to_proto(decoder(layers=3)).SerializeToString()
    (folder / "notes.bin").write_bytes(b"\x32\x00" * 200_000 + model)


GRAPHS = "every graph is a verified decoder or holds none"
CODE = "no code and no checkpoint lies in the folder"
CONFIGS = "no config leads to another graph or to code"
PACKAGED = "what was packaged is what the layout makes"
BESIDE = "a graph that no proof is about"
ADDED = "was added after the proof"
AROUND = "files around the decoder are the source's"

# name -> (which folder, what is done, what must be said)
FOLDER_ATTACKS: dict[str, tuple[str, Attack, str]] = {
    "an unguarded decoder in a second layout": (
        "genai",
        put(DECODER),
        f"holds {DECODER} beside its decoders, {BESIDE}",
    ),
    "a genai config that names an unguarded decoder": (
        "community",
        both(put("other.onnx"), put("genai_config.json", '{"model": {"decoder": {"filename": "other.onnx"}}}')),
        "holds the decoders other.onnx, the manifest lists",
    ),
    "the vision encoder is an unguarded decoder": ("community", put(VISION), f"{GRAPHS}: {VISION} outputs logits"),
    "an audio encoder is an unguarded decoder": (
        "community",
        put("onnx/audio_encoder.onnx"),
        f"{GRAPHS}: onnx/audio_encoder.onnx outputs logits",
    ),
    "the embeddings answer with logits": ("community", listed(embed_that_answers), f"{GRAPHS}: {EMBED} outputs logits"),
    "the embeddings hold an attention": (
        "community",
        listed(embed_that_attends),
        f"{GRAPHS}: {EMBED} has an attention that sees text",
    ),
    "an unguarded decoder in capitals": ("bare", put("MORE.ONNX"), f"{GRAPHS}: MORE.ONNX outputs logits"),
    "an unguarded decoder under another suffix": ("bare", put("weights.bin"), f"{GRAPHS}: weights.bin outputs logits"),
    "an unguarded decoder under another suffix, not listed": (
        "bare",
        lambda folder: onnx.save(ir.to_proto(decoder(layers=3)), folder / "weights.bin", format="protobuf"),
        f"weights.bin {ADDED}",
    ),
    "an unguarded decoder behind padding": ("bare", padded, f"notes.bin {ADDED}"),
    "a model in onnxruntime's own format": (
        "bare",
        put("more.ort", b"\x18\0\0\0ORTM"),
        "more.ort is compiled, and cannot",
    ),
    "an engine beside the graphs": (
        "bare",
        put("more.engine", b"ftrt"),
        "holds more.engine, its manifest lists no engine",
    ),
    "the manifest says that the graphs are engines": (
        "bare",
        manifest(engine_record),
        "holds no engine, its manifest lists an",
    ),
    "a pipeline of graphs": (
        "genai",
        both(
            put("stage.onnx"),
            configure(lambda c: c["model"]["decoder"].update(pipeline=[{"all": {"filename": "stage.onnx"}}])),
        ),
        BESIDE,
    ),
    "a config that leads out of the folder": (
        "bare",
        put("export.cfg.json", '{"components": {"decode": {"file": "../model/model.onnx"}}}'),
        f"{CONFIGS}: export.cfg.json names '../model/model.onnx', which lies outside the folder",
    ),
    "a config that takes weights from elsewhere": (
        "genai",
        configure(
            lambda c: c["model"]["decoder"]["session_options"].update(
                {"session.model_external_initializers_file_folder_path": "/tmp"}
            )
        ),
        f"{CONFIGS}: genai_config.json sets session.model_external_initializers_file_folder_path",
    ),
    "the manifest names another layout": (
        "bare",
        manifest(lambda content: content.update(layout="onnx-community")),
        "the folder has the layout that its manifest names: it is bare, the manifest records onnx-community",
    ),
    "the manifest lists one decoder of two": (
        "variants",
        manifest(lambda content: content["decoders"].pop()),
        "the manifest lists",
    ),
    "a packaging that excuses the tokenizer": (
        "bare",
        packaged(written=["tokenizer.json"]),
        f"{PACKAGED}: tokenizer.json is recorded as generated",
    ),
    "a packaging that makes one file of two": (
        "bare",
        packaged(moved={"tokenizer.json": "a", "config.json": "a"}),
        f"{PACKAGED}: two files are recorded as one",
    ),
    "a key that leads out": ("bare", another_key("config.json", "../config.json"), "lists a file outside the folder"),
    "a key with a detour": ("bare", renamed_key("config.json", "./config.json"), "which is no plain relative path"),
    "two keys of one file": ("bare", another_key("config.json", "CONFIG.JSON"), "which are one file on some systems"),
    "a key twice": ("bare", key_twice, "is given twice"),
    "a folder behind a link": ("bare", linked_folder, "more is a link to a folder or to nothing"),
    "a program": ("bare", put("modeling.py", "print()"), f"{CODE}: modeling.py is code"),
    "a program in a model folder": ("community", put("onnx/helper.so", "x"), f"{CODE}: onnx/helper.so is code"),
    "a checkpoint": ("bare", put("model.safetensors", b"x"), f"{CODE}: model.safetensors is a checkpoint"),
    "the embeddings' weights are not listed": (
        "community",
        unlist(f"{EMBED}.data"),
        f"all weights outside the graphs are listed: {EMBED} keeps weights in embed_tokens.onnx.data",
    ),
    "a chat template that is not listed": ("bare", lambda f: (f / "chat_template_x.jinja").write_text("x"), ADDED),
}
# Caught beside the source: name -> (which folder, what is done, what must be said).
SOURCE_ATTACKS: dict[str, tuple[str, Attack, str]] = {
    "another chat template": ("community", put("tokenizer_config.json", "{}"), f"{AROUND}: tokenizer_config.json"),
    "a chat template more": (
        "community",
        put("chat_template.jinja", "{{ x }}"),
        f"{AROUND}: chat_template.jinja is not in the source",
    ),
    "a chat template in JSON": (
        "community",
        put("chat_template.json", "{}"),
        f"{AROUND}: chat_template.json is not in the source",
    ),
    "a template among additional ones": (
        "community",
        put("additional_chat_templates/rag.jinja", "x"),
        f"{AROUND}: additional_chat_templates/rag.jinja is not in the source",
    ),
    "another preprocessor": ("community", put("preprocessor_config.json", "{}"), f"{AROUND}: preprocessor_config.json"),
    "another generation config": (
        "community",
        put("generation_config.json", "{}"),
        f"{AROUND}: generation_config.json",
    ),
    "the tokenizer's config removed": (
        "community",
        listed(lambda folder: (folder / "tokenizer_config.json").unlink()),
        f"{AROUND}: tokenizer_config.json is missing",
    ),
    "the embeddings' weights edited": (
        "community",
        other_numbers(f"{EMBED}.data"),
        f"{AROUND}: {EMBED} is not the source's",
    ),
    "the encoder's weights edited": (
        "community",
        other_numbers(f"{VISION}.data"),
        f"{AROUND}: {VISION} is not the source's",
    ),
    "the weights of two graphs change places": (
        "community",
        listed(lambda folder: swap(folder / f"{EMBED}.data", folder / f"{VISION}.data")),
        f"{AROUND}: ",
    ),
}


def swap(first: Path, second: Path) -> None:
    """Padded to one size first, so that each is long enough for the other's graph."""
    contents = [path.read_bytes() for path in (first, second)]
    longest = max(map(len, contents))
    for path, content in zip((second, first), contents, strict=True):
        path.unlink()
        path.write_bytes(content.ljust(longest, b"\0"))


def make_folders(root: Path) -> None:
    """`bare/`, `community/`, `genai/` and `variants/`, each guarded, and the sources of them in `sources/`."""
    (root / "sources").mkdir()
    community_model(root / "sources" / "community")
    genai_model(root / "sources" / "genai")
    community_model(root / "sources" / "variants")
    variants = root / "sources" / "variants" / "onnx"
    shutil.copyfile(variants / "decoder_model_merged.onnx", variants / "decoder_model_merged_q4.onnx")
    (root / "sources" / "bare").mkdir()
    bare = with_texts(root / "sources" / "bare")
    onnx.save(ir.to_proto(decoder(layers=3)), bare / "model.onnx")
    for name in ("bare", "community", "genai", "variants"):
        guard_folder(root / "sources" / name, root / name)
