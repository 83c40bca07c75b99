"""A model's folder: which layouts are known, what comes along, and the sentence for every folder that is no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import decoder, text_model

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.graphs.graph_io import external_files, graph_bytes, in_memory, load_graph, save_graph
from vlmguard.graphs.json_files import read_json
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.package import ModelPackage


def write_graph(path: Path, data: str | None = None) -> Path:
    """A small decoder; with `data` its weights are in that file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = ir.to_proto(decoder(layers=1))
    if data is None:
        onnx.save(proto, path)
    else:
        onnx.save(proto, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def write_files(root: Path, *names: str, content: str = "{}") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def files_of(package: ModelPackage) -> dict[str, Path]:
    """What a guarded copy takes along: its place there -> where it comes from."""
    listed = list(package.files())
    found = {relative: source for source, relative in listed}
    assert len(found) == len(listed)
    return found


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(GuardError) as raised:
        action()
    assert isinstance(raised.value, ModelUnreadable) and "\n" not in str(raised.value)
    return str(raised.value)


# -------------------------------------------------------------------------------------------------------------------- bare


def test_a_bare_file(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "nice.onnx", data="nice.onnx.data")
    package = open_package(path)
    assert package == ModelPackage(tmp_path, path, "bare")
    assert package.name == "nice"
    assert external_files(path) == [tmp_path / "nice.onnx.data"]
    assert (package.config, package.expected_layers, package.kv_heads, package.head_size) == ({}, None, None, None)
    assert open_package(tmp_path) == open_package(str(path)) == package


def test_a_relative_path_is_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "m" / "model.onnx", data="w.data")
    monkeypatch.chdir(tmp_path / "m")
    package = open_package("model.onnx")
    monkeypatch.chdir(tmp_path)
    assert package.decoder == tmp_path / "m" / "model.onnx"
    assert len(package.load_decoder().graph) == len(decoder().graph)
    assert external_files(package.decoder) == [tmp_path / "m" / "w.data"]


def test_a_bare_model_takes_its_tokenizer_from_the_folder_above(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graphs" / "model.onnx", data="model.onnx.data")
    write_files(tmp_path, "graphs/config.json", "tokenizer.json", "config.json", "chat_template.jinja", "secret.txt")
    write_files(tmp_path, "graphs/notes.txt", "graphs/other.onnx", "graphs/model.safetensors")
    assert files_of(open_package(path)) == {
        "config.json": tmp_path / "graphs" / "config.json",  # the nearer one
        "tokenizer.json": tmp_path / "tokenizer.json",
        "chat_template.jinja": tmp_path / "chat_template.jinja",
    }


def test_everything_that_tokenises_templates_or_describes_comes_along(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx")
    names = [
        *("config.json", "generation_config.json", "genai_config.json", "LICENSE", "LICENSE.txt", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "processor.json"),
        *(
            "preprocessor_config.json",
            "processor_config.json",
            "video_preprocessor_config.json",
            "image_processor.json",
        ),
    ]
    write_files(tmp_path, *names)
    assert sorted(files_of(ModelPackage(tmp_path, path, "bare"))) == sorted(names)


def test_several_graphs_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_graph(tmp_path / f"{name}.onnx")
    assert refusal(lambda: open_package(tmp_path)) == (
        f"{tmp_path}: holds 2 graphs (a.onnx, b.onnx); name the decoder's file"
    )
    for name in ("c", "d", "e"):
        write_graph(tmp_path / f"{name}.onnx")
    assert refusal(lambda: open_package(tmp_path)) == (
        f"{tmp_path}: holds 5 graphs (a.onnx, b.onnx, c.onnx, d.onnx ...); name the decoder's file"
    )
    assert open_package(tmp_path / "b.onnx").layout == "bare"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    sentence = f"{tmp_path}: holds no .onnx file and is no checkpoint; give a model file or folder"
    assert refusal(lambda: open_package(tmp_path)) == sentence
    write_files(tmp_path, "config.json", "sub/tokenizer.json")
    assert refusal(lambda: open_package(tmp_path)) == sentence


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert refusal(lambda: open_package(path)) == (
        f"{path}: no such file or folder; give a .onnx file or a model folder"
    )


# ---------------------------------------------------------------------------------------------------------- onnx-community

COMMUNITY_CONFIG = {
    "num_hidden_layers": 99,
    "text_config": {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 16},
}


@pytest.fixture
def community(tmp_path: Path) -> Path:
    """A LLaVA as transformers.js loads it, in two precisions."""
    root = tmp_path / "llava"
    for suffix in ("", "_q4"):
        for stem in ("decoder_model_merged", "embed_tokens", "vision_encoder"):
            write_graph(root / "onnx" / f"{stem}{suffix}.onnx", data=f"{stem}{suffix}.onnx_data")
    write_files(root, "config.json", content=json.dumps(COMMUNITY_CONFIG))
    write_files(root, "tokenizer.json", "preprocessor_config.json", "onnx/quantize_config.json", ".git/config")
    write_files(root, "guard.json", "directions.safetensors", "model.safetensors", "README.md")
    return root


def test_all_variants_of_an_onnx_community_folder(community: Path) -> None:
    """Each is a decoder that an app may load; the plain one runs."""
    package = open_package(community)
    graphs = community / "onnx"
    assert package == ModelPackage(
        community,
        graphs / "decoder_model_merged.onnx",
        "onnx-community",
        vision_encoder=graphs / "vision_encoder.onnx",
        embed_tokens=graphs / "embed_tokens.onnx",
        others=(graphs / "decoder_model_merged_q4.onnx",),
    )
    assert package.name == "llava"
    assert package.expected_layers == 1  # the text decoder's own, not the outer config's
    assert (package.kv_heads, package.head_size) == (4, 4)
    one = open_package(graphs / "decoder_model_merged.onnx")
    assert one == open_package(community, variant="") != package
    assert one.left_out == ("onnx/decoder_model_merged_q4.onnx", "onnx/decoder_model_merged_q4.onnx_data")


def test_what_comes_along_with_an_onnx_community_folder(community: Path) -> None:
    """No other decoder, no weights of the checkpoint, no promises of an older guard, nothing hidden."""
    assert sorted(files_of(open_package(community))) == [
        "README.md",
        "config.json",
        "onnx/embed_tokens.onnx",
        "onnx/embed_tokens.onnx_data",
        "onnx/embed_tokens_q4.onnx",
        "onnx/embed_tokens_q4.onnx_data",
        "onnx/quantize_config.json",
        "onnx/vision_encoder.onnx",
        "onnx/vision_encoder.onnx_data",
        "onnx/vision_encoder_q4.onnx",
        "onnx/vision_encoder_q4.onnx_data",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    assert all(source == community / relative for relative, source in files_of(open_package(community)).items())


def test_another_variant_of_an_onnx_community_folder(community: Path) -> None:
    package = open_package(community, variant="q4")
    assert package.decoder == community / "onnx" / "decoder_model_merged_q4.onnx"
    assert package.embed_tokens == community / "onnx" / "embed_tokens_q4.onnx"
    assert package.left_out == ("onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data")
    assert open_package(package.decoder) == package


def test_the_only_variant_needs_no_name(community: Path) -> None:
    (community / "onnx" / "decoder_model_merged.onnx").unlink()
    (community / "onnx" / "vision_encoder_q4.onnx").unlink()
    package = open_package(community)
    assert package.decoder.name == "decoder_model_merged_q4.onnx"
    # a q4 decoder beside an encoder that was not quantised
    assert package.vision_encoder == community / "onnx" / "vision_encoder.onnx"


def test_an_encoder_of_any_variant_is_better_than_none(community: Path) -> None:
    for name in ("vision_encoder", "embed_tokens_q4", "embed_tokens"):
        (community / "onnx" / f"{name}.onnx").unlink()
    package = open_package(community)
    assert package.vision_encoder == community / "onnx" / "vision_encoder_q4.onnx"
    assert package.embed_tokens is None


def test_a_variant_that_is_not_there_is_refused(community: Path) -> None:
    assert refusal(lambda: open_package(community, variant="fp16")) == (
        f"{community / 'onnx'}: the decoder has no variant 'fp16', only '', 'q4'; name one"
    )
    plain = community / "onnx" / "decoder_model_merged.onnx"
    plain.rename(plain.with_name("decoder_model_merged_fp16.onnx"))
    assert refusal(lambda: open_package(community, variant="")) == (
        f"{community / 'onnx'}: the decoder has no variant '', only 'fp16', 'q4'; name one"
    )
    package = open_package(community)  # none is the plain one: the first runs
    assert [path.name for path in (package.decoder, *package.others)] == [
        "decoder_model_merged_fp16.onnx",
        "decoder_model_merged_q4.onnx",
    ]


def test_an_onnx_folder_without_a_decoder_is_refused(community: Path) -> None:
    for path in (community / "onnx").glob("decoder_*.onnx"):
        path.unlink()
    known = "decoder_model_merged, decoder_with_past_model, decoder_model, model"
    found = "embed_tokens.onnx, embed_tokens_q4.onnx, vision_encoder.onnx, vision_encoder_q4.onnx"
    assert (
        refusal(lambda: open_package(community)) == f"{community / 'onnx'}: holds no decoder ({known}); found {found}"
    )
    for path in (community / "onnx").glob("*.onnx"):
        path.unlink()
    assert refusal(lambda: open_package(community)).endswith("found nothing")


def test_unmerged_decoders_are_taken_in_order(tmp_path: Path) -> None:
    """The one with a cache serves every call, so it runs; an app may load the others, so they are guarded too."""
    for name in ("decoder_model", "decoder_with_past_model", "model_fp16"):
        write_graph(tmp_path / "onnx" / f"{name}.onnx")
    write_files(tmp_path, "config.json")
    package = open_package(tmp_path)
    assert package.decoder.name == "decoder_with_past_model.onnx"
    assert [path.name for path in package.others] == ["decoder_model.onnx", "model_fp16.onnx"]
    assert package.left_out == ()
    one = open_package(tmp_path, variant="fp16")
    assert (one.decoder.name, one.others) == ("model_fp16.onnx", ())
    assert one.left_out == ("onnx/decoder_model.onnx", "onnx/decoder_with_past_model.onnx")


def test_shared_weights_of_a_left_out_decoder_stay(tmp_path: Path) -> None:
    """Two graphs, one data file: it belongs to the one that stays."""
    merged = write_graph(tmp_path / "onnx" / "decoder_model_merged.onnx", data="shared.data")
    merged.with_name("decoder_model.onnx").write_bytes(merged.read_bytes())
    package = open_package(merged.with_name("decoder_model.onnx").rename(merged.with_name("decoder_model_q4.onnx")))
    assert (package.layout, package.others) == ("bare", ())  # without a config.json it is a file like any other
    write_files(tmp_path, "config.json")
    package = open_package(tmp_path, variant="")
    assert package.left_out == ("onnx/decoder_model_q4.onnx",)
    assert "onnx/shared.data" not in files_of(package)  # the decoder's own, which comes with it


def test_a_decoder_that_cannot_be_read_is_left_out_all_the_same(community: Path) -> None:
    broken = community / "onnx" / "decoder_model_merged_q4.onnx"
    broken.write_bytes(b"half")
    assert "onnx/decoder_model_merged_q4.onnx" in open_package(community, variant="").left_out
    # asked for, or as one of all, it is an error that names it
    assert refusal(lambda: open_package(community, variant="q4")).startswith(f"{broken}: is not an ONNX model")
    assert refusal(lambda: open_package(community)).startswith(f"{broken}: is not an ONNX model")


def test_an_encoders_file_is_no_decoder_of_the_layout(community: Path) -> None:
    """Named itself, it is a bare graph like any other."""
    assert open_package(community / "onnx" / "vision_encoder.onnx").layout == "bare"


# ------------------------------------------------------------------------------------------------------------------- genai


def genai(root: Path, model: object) -> Path:
    write_graph(root / "text.onnx", data="text.onnx.data")
    write_graph(root / "vision.onnx", data="vision.onnx.data")
    write_graph(root / "unused.onnx", data="unused.onnx.data")
    write_files(root, "tokenizer.json")
    write_files(root, "genai_config.json", content=json.dumps({"model": model}))
    return root


DECODER_PART = {"filename": "text.onnx", "num_hidden_layers": 1, "num_key_value_heads": 2, "head_size": 8}


def test_a_genai_folder(tmp_path: Path) -> None:
    root = genai(tmp_path, {"decoder": DECODER_PART, "vision": {"filename": "vision.onnx"}, "type": "phi3v"})
    package = open_package(root)
    assert package == ModelPackage(
        root,
        root / "text.onnx",
        "genai",
        vision_encoder=root / "vision.onnx",
        left_out=("unused.onnx", "unused.onnx.data"),
    )
    assert (package.expected_layers, package.kv_heads, package.head_size) == (1, 2, 8)
    assert sorted(files_of(package)) == ["genai_config.json", "tokenizer.json", "vision.onnx", "vision.onnx.data"]
    assert open_package(root / "text.onnx") == package
    assert open_package(root / "unused.onnx").layout == "bare"


def test_config_json_has_the_word_before_genai_config(tmp_path: Path) -> None:
    genai(tmp_path, {"decoder": DECODER_PART})
    write_files(tmp_path, "config.json", content=json.dumps({"num_hidden_layers": 7, "n_head": 4, "n_embd": 64}))
    package = open_package(tmp_path)
    assert package.expected_layers == 7
    # what config.json does not say, genai_config.json may
    assert (package.kv_heads, package.head_size) == (2, 8)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"decoder": {}},
        {"decoder": {"filename": 3}},
        {"decoder": "text.onnx"},
        {"decoder": None},
        [],
        "text.onnx",
        None,
    ],
    ids=str,
)
def test_a_genai_config_that_names_no_decoder_is_refused(tmp_path: Path, model: object) -> None:
    root = genai(tmp_path, model)
    assert refusal(lambda: open_package(root)) == (
        f"{root / 'genai_config.json'}: names no model.decoder.filename; is it complete?"
    )


@pytest.mark.parametrize("part", [None, "vision.onnx", ["vision.onnx"], {"filename": None}], ids=str)
def test_a_part_of_a_genai_config_that_names_no_file_is_none(tmp_path: Path, part: object) -> None:
    package = open_package(genai(tmp_path, {"decoder": DECODER_PART, "vision": part}))
    assert package.vision_encoder is None


@pytest.mark.parametrize("name", ["../text.onnx", "/etc/text.onnx", "a/../../text.onnx"])
@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_a_genai_config_that_leads_outside_is_refused(tmp_path: Path, part: str, name: str) -> None:
    root = genai(tmp_path / "inner", {"decoder": DECODER_PART, part: {"filename": name}})
    assert refusal(lambda: open_package(root)) == (
        f"{root}: names a file outside itself ({name}); do not use it, or fix genai_config.json"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_genai_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    genai(tmp_path, {})
    write_files(tmp_path, "genai_config.json", content=content)
    path = tmp_path / "genai_config.json"
    sentence = refusal(lambda: open_package(tmp_path))
    if content == "[]":
        assert sentence == f"{path}: holds a list, expected an object; copy it from the model again"
    else:
        assert sentence.startswith(f"{path}: cannot be read (") and sentence.endswith("); copy it from the model again")


# ----------------------------------------------------------------------------------------------------------- what configs say


@pytest.mark.parametrize(
    ("config", "layers", "heads", "size"),
    [
        ({"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 32}, 2, 1, 32),
        ({"n_layer": 3, "n_head": 4, "n_embd": 64}, 3, 4, 16),  # GPT-2
        ({"num_hidden_layers": 5, "num_attention_heads": 8, "hidden_size": 64}, 5, 8, 8),
        ({"llm_config": {"num_hidden_layers": 6}, "num_hidden_layers": 1}, 6, None, None),
        ({"vision_config": {"num_hidden_layers": 6}}, None, None, None),
        ({"num_hidden_layers": "6", "text_config": [6]}, None, None, None),
    ],
)
def test_numbers_about_the_text_decoder(
    tmp_path: Path, config: dict, layers: int | None, heads: int | None, size: int | None
) -> None:
    write_graph(tmp_path / "model.onnx")
    write_files(tmp_path, "config.json", content=json.dumps(config))
    package = open_package(tmp_path)
    assert (package.expected_layers, package.kv_heads, package.head_size) == (layers, heads, size)


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff{}")
    assert refusal(lambda: read_json(path)).startswith(f"{path}: cannot be read (")
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


# -------------------------------------------------------------------------------------------------------- graphs: truncated


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\0", b"hello, world", b"\x89PNG\r\n\x1a\n" * 9, b"<html></html>" * 30)):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        sentence = refusal(lambda path=path: load_graph(path))
        assert sentence.startswith(f"{path}: is not an ONNX model or is truncated (")


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert refusal(lambda: load_graph(path)) == f"{path}: no such file; give an ONNX model"
    assert refusal(lambda: load_graph(tmp_path)) == f"{tmp_path}: no such file; give an ONNX model"


def test_a_graph_without_nodes_or_outputs_is_refused(tmp_path: Path) -> None:
    sentence = "is not an ONNX model or is truncated (no nodes or no outputs)"
    for number, text in enumerate(("g (float[2] x) => (float[2] x) {}", "g (float[2] x) => () { y = Neg(x) }")):
        path = tmp_path / f"{number}.onnx"
        save_graph(text_model(text), path)
        assert refusal(lambda path=path: load_graph(path)) == f"{path}: {sentence}"


def test_a_graph_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """At the end, where the operator sets are, at every byte; a cut before them leaves a file that still parses."""
    whole = graph_bytes(decoder())
    path = tmp_path / "cut.onnx"
    for cut in (*range(0, len(whole) - 40, 53), *range(len(whole) - 40, len(whole))):
        path.write_bytes(whole[:cut])
        assert refusal(lambda: load_graph(path)).startswith(f"{path}: is not an ONNX model or is truncated (")
    path.write_bytes(whole)
    assert load_graph(path).opset_imports == {"": 18}


def test_a_cut_real_export_is_refused(zoo, tmp_path: Path) -> None:
    whole = zoo("llama-torchscript-fp32").path.read_bytes()
    path = tmp_path / "cut.onnx"
    for share in (0.01, 0.3, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "is not an ONNX model or is truncated" in refusal(lambda: load_graph(path))


# ----------------------------------------------------------------------------------------------------- graphs: external data


def external(tmp_path: Path) -> tuple[Path, Path]:
    path = write_graph(tmp_path / "model.onnx", data="model.onnx.data")
    return path, tmp_path / "model.onnx.data"


def edit_external(path: Path, **changes: str | None) -> None:
    """Rewrite an entry of every external tensor of a file; `None` removes it."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data} | changes
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    path, data = external(tmp_path)
    data.unlink()
    sentence = f"{path}: its external data model.onnx.data is missing; put it beside the model"
    assert refusal(lambda: load_graph(path)) == sentence
    assert refusal(lambda: external_files(path)) == sentence
    data.mkdir()
    assert refusal(lambda: load_graph(path)) == (
        f"{path}: its external data model.onnx.data is no regular file; do not use it"
    )


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize("missing", [1, 100, None])
def test_truncated_external_data_is_refused(tmp_path: Path, missing: int | None, says_length: bool) -> None:
    """The length may be left out of the file: then it is the tensor's own."""
    path, data = external(tmp_path)
    if not says_length:
        edit_external(path, length=None)
    assert len(load_graph(path).graph.initializers) == 2
    content = data.read_bytes()
    data.write_bytes(content[: -missing if missing else 0])
    sentence = refusal(lambda: load_graph(path))
    left = len(content) - missing if missing else 0
    assert sentence.startswith(f"{path}: its external data model.onnx.data has {left} bytes, '")
    assert sentence.endswith("; it is truncated, copy it again")
    assert f"ends at {len(content)}" in sentence or not missing


def test_the_end_of_a_tensor_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = text_model("g (float[4] x) => (float[4] y) <float[4] w> { y = Mul(x, w) }")
    onnx.save(ir.to_proto(model), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes(b"\0" * 15)
    assert refusal(lambda: load_graph(path)) == (
        f"{path}: its external data w.bin has 15 bytes, 'w' ends at 16; it is truncated, copy it again"
    )


@pytest.mark.parametrize("location", ["../outside.data", "sub/../../outside.data", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path, _ = external(tmp_path / "inner")
    (tmp_path / "outside.data").write_bytes(b"\0" * 4096)
    edit_external(path, location=location)
    sentence = refusal(lambda: load_graph(path))
    assert sentence == (f"{path}: keeps weights outside its folder ({location}); do not use it, or move them beside it")


def test_weights_of_a_body_are_external_data_too(tmp_path: Path) -> None:
    body = "b () => (float[2] t) <float[2] w = {1, 2}> { t = Add(x, w) }"
    model = text_model(
        f"g (float[2] x, bool c) => (float[2] y) {{ y = If (c) < then_branch = {body}, else_branch = {body} > }}"
    )
    proto = ir.to_proto(model)
    tensor = proto.graph.node[0].attribute[0].g.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), tensor.name))
    onnx.external_data_helper.set_external_data(tensor, location="body.data", offset=0, length=8)
    tensor.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "its external data body.data is missing" in refusal(lambda: load_graph(path))
    (tmp_path / "body.data").write_bytes(b"\0" * 8)
    assert external_files(path) == [tmp_path / "body.data"]


def test_weights_are_referenced_not_read(tmp_path: Path) -> None:
    path, _ = external(tmp_path)
    tensors = [value.const_value for value in load_graph(path).graph.initializers.values()]
    assert tensors and all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------------ writing


def test_a_written_graph_is_read_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    path, data = external(tmp_path / "a")
    model = load_graph(path)
    copy = tmp_path / "b" / "model.onnx"
    copy.parent.mkdir()
    save_graph(model, copy)
    assert refusal(lambda: load_graph(copy)).endswith("model.onnx.data is missing; put it beside the model")
    (tmp_path / "b" / "model.onnx.data").write_bytes(data.read_bytes())
    again = load_graph(copy)
    assert dissect(again).to_json() == dissect(model).to_json()
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(again.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    assert copy.read_bytes() == graph_bytes(load_graph(path)) == graph_bytes(load_graph(copy))


def test_a_graph_beyond_two_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        def SerializeToString(self, deterministic: bool) -> bytes:
            raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr("vlmguard.graphs.graph_io.ir.to_proto", lambda model: TooLarge())
    with pytest.raises(GuardError) as refused:
        save_graph(decoder(), tmp_path / "model.onnx")
    assert (
        str(refused.value)
        == "model.onnx: the guarded graph passes 2 GiB; save the model with external data first, or choose --lowering lowrank"
    )
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_guard_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    """Aligned, in the order of their names; what is small stays inside."""
    model, path = decoder(), tmp_path / "model.onnx"
    arrays = {"b": np.arange(300, dtype=np.float32), "a": np.arange(1024, dtype=np.uint8), "small": np.ones(3)}
    for name, array in arrays.items():
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.Tensor(array, name=name)))
    assert save_graph(model, path, arrays) == tmp_path / "model.onnx.guard.data"
    assert external_files(path) == [tmp_path / "model.onnx.guard.data"]
    again = load_graph(path).graph.initializers
    for name, array in arrays.items():
        tensor = again[name].const_value
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert isinstance(tensor, ir.ExternalTensor) == (name != "small")
    assert [again[name].const_value.offset for name in ("a", "b")] == [0, 1024]
    assert (tmp_path / "model.onnx.guard.data").stat().st_size == 1024 + 1216  # 1200, filled up to 64
    assert save_graph(decoder(), tmp_path / "plain.onnx") is None
    assert save_graph(decoder(), tmp_path / "own.onnx", ["w0"]) == tmp_path / "own.onnx.guard.data"


def test_a_changed_file_is_asked_again_for_its_external_data(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", data="first.data")
    assert external_files(path) == [tmp_path / "first.data"]
    write_graph(path, data="second.data.longer")
    assert external_files(path) == [tmp_path / "second.data.longer"]


def test_a_model_in_memory_refers_to_its_own_folder(tmp_path: Path) -> None:
    path, data = external(tmp_path / "m")
    content, folder = in_memory(load_graph(path), path.parent)
    assert folder == path.parent and content == graph_bytes(load_graph(path))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    data.rename(blobs / "abc")
    data.symlink_to("../blobs/abc")
    content, folder = in_memory(load_graph(path, trust_links=True), path.parent)
    assert folder == blobs
    locations = {
        e.value
        for t in onnx.load_from_string(content).graph.initializer
        for e in t.external_data
        if e.key == "location"
    }
    assert locations == {"abc"}


# ------------------------------------------------------------------------------------------------- transformers' export.json


def exported(root: Path, **files: str) -> Path:
    """A folder with an `export.json` that names these components."""
    root.mkdir(exist_ok=True)
    content = {"components": {name: {"file": file} for name, file in files.items()}}
    (root / "export.json").write_text(json.dumps(content))
    return root


def cached_graph(path: Path, past: bool) -> Path:
    """A graph with a cache among its outputs, and with `past` among its inputs too."""
    taken = ", float[B, 1, P, 4] input.past_key_values.0" if past else ""
    made = "input.past_key_values.0" if past else "x4"
    text = f"""
        g (float[B, S, 8] x{taken}) => (float[B, S, 8] y, float[B, 1, T, 4] output.past_key_values.0) {{
            y = Neg(x)
            {"" if past else "x4 = Neg(x)"}
            output.past_key_values.0 = Neg({made})
        }}
    """
    path.write_bytes(graph_bytes(text_model(text.replace(".", "_"))))
    return path


def test_both_decoders_of_a_transformers_export(tmp_path: Path) -> None:
    """`decode` takes a past, so it can run alone; `language_model` for prompts is the same decoder once more."""
    root = exported(tmp_path / "m", language_model="language_model.onnx", lm_head="lm_head.onnx", decode="decode.onnx")
    cached_graph(root / "language_model.onnx", past=False)
    cached_graph(root / "decode.onnx", past=True)
    write_graph(root / "lm_head.onnx")
    write_graph(root / "stray.onnx", data="stray.data")
    package = open_package(root)
    assert package == ModelPackage(
        root,
        root / "decode.onnx",
        "transformers",
        left_out=("stray.data", "stray.onnx"),
        others=(root / "language_model.onnx",),
    )
    assert [view.decoder.name for view in package.views()] == ["decode.onnx", "language_model.onnx"]
    assert [view.others for view in package.views()] == [package.others, (package.decoder,)]
    assert sorted(files_of(package)) == ["export.json", "lm_head.onnx"]
    for name in ("decode.onnx", "language_model.onnx"):
        assert refusal(lambda name=name: open_package(root / name)) == (
            f"{root / name}: is one of the decoder graphs of a transformers export (decode.onnx, language_model.onnx); "
            "name the folder, so that all are guarded"
        )
    assert open_package(root / "lm_head.onnx").layout == "bare"
    assert refusal(lambda: open_package(root, variant="fp16")) == (
        f"{root}: variant 'fp16' needs an onnx-community folder, other layouts have no variants; leave --variant out"
    )


def test_a_transformers_export_of_one_graph(tmp_path: Path) -> None:
    root = exported(tmp_path / "m", model="model.onnx")
    write_graph(root / "model.onnx")
    package = open_package(root)
    assert (package.layout, package.decoder, package.others) == ("transformers", root / "model.onnx", ())
    assert open_package(root / "model.onnx").layout == "bare"


def test_a_transformers_export_without_a_decoder_is_refused(tmp_path: Path) -> None:
    root = exported(tmp_path / "m", vision="vision.onnx", head="head.onnx")
    for name in ("vision.onnx", "head.onnx"):
        write_graph(root / name)
    sentence = f"{root / 'export.json'}: names no graph with a KV cache among "
    assert refusal(lambda: open_package(root)) == sentence + "vision.onnx, head.onnx; is it a decoder?"
    (root / "export.json").write_text("{}")
    assert refusal(lambda: open_package(root)) == sentence + "nothing; is it a decoder?"


def test_a_transformers_export_that_leads_outside_is_refused(tmp_path: Path) -> None:
    root = exported(tmp_path / "m", model="../model.onnx")
    assert refusal(lambda: open_package(root)) == (
        f"{root}: names a file outside itself (../model.onnx); do not use it, or fix export.json"
    )
