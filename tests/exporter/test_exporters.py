"""The table of exporters: who is asked for what, every refusal word for word, and what a real builder writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import onnx
import pytest
from random_directions import random_directions, write_directions
from tiny_families import save_tiny_llama, save_tiny_text
from tiny_models import save_tiny_llava
from typer.testing import CliRunner

from vlmguard import cli
from vlmguard.exporter.checkpoints import exporters
from vlmguard.exporter.checkpoints.exporters import EXPORTERS, export_checkpoint
from vlmguard.exporter.checkpoints.genai_builder import flatten_rope, name_older_tokenizer
from vlmguard.exporter.choices import ExporterName
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.sources import opened
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import ExtraMissing, GuardError, ModelUnreadable
from vlmguard.graphs.extras import install_command
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.progress import ignore_progress
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def refusal(kind: type[GuardError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as refused:
        export_checkpoint(*arguments, **options)
    assert type(refused.value) is kind
    return str(refused.value)


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for optimum that notes what it was asked; `asked["fail"]` makes it fail."""
    asked: dict[str, Any] = {}

    def main_export(name: str, output: Path, **options: Any) -> None:
        if "fail" in asked:
            raise asked["fail"]
        print("optimum talks")
        asked.update(options, name=name)
        output.mkdir(parents=True)
        (output / "model.onnx").write_bytes(b"a graph")

    module = ModuleType("optimum.exporters.onnx")
    module.main_export = main_export  # type: ignore[attr-defined]
    for name in ("optimum", "optimum.exporters"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", module)
    return asked


# Who is asked


def test_the_table_and_the_names_are_the_same() -> None:
    assert tuple(EXPORTERS) == get_args(ExporterName)


@pytest.mark.parametrize(("asked", "given"), [(None, "fp32"), ("fp16", "fp16")])
def test_transformers_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, given: str) -> None:
    calls, compared = [], (Check("logits", 7, 1e-6, 1e-4, True),)

    def convert(*arguments: Any, **options: Any) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(parity=compared)

    monkeypatch.setattr(exporters, "convert_checkpoint", convert)
    assert export_checkpoint("here", tmp_path, dtype=asked, opset=19) == compared
    assert [(call["dtype"], call["opset"]) for call in calls] == [(given, 19)]


def test_optimum_is_asked_for_the_text_decoder_with_its_cache(
    llama: Path, tmp_path: Path, optimum: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    export_checkpoint(
        llama, out, "optimum", dtype="fp16", opset=17, report_progress=lambda stage, done, total: said.append(stage)
    )
    assert (optimum["name"], optimum["task"]) == (str(llama), "text-generation-with-past")
    assert (optimum["dtype"], optimum["opset"], optimum["trust_remote_code"]) == ("fp16", 17, False)
    assert said == [f"exporting {llama} with optimum"]
    assert capsys.readouterr().out == ""
    assert open_package(out).decoder == out / "model.onnx"
    assert (out / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int4", "fp32"])
def test_genai_builds_a_folder_that_opens_like_any_other(llama: Path, dtype: Any) -> None:
    with opened(llama, None, ignore_progress, dtype, exporter="genai") as source:
        assert (source.name, source.package.layout, source.home) == (llama.name, "genai", llama)
        graph = onnx.load(source.package.decoder, load_external_data=False).graph
        kinds = {node.op_type for node in graph.node}
        assert ("MatMulNBits" in kinds) == (dtype == "int4") and "GroupQueryAttention" in kinds
        assert json.loads((source.package.root / "genai_config.json").read_text())["model"]["type"] == "llama"
        assert dissect(source.package.load_decoder(), source.package.expected_layers).layer_count == 3


@pytest.mark.slow
def test_a_checkpoint_becomes_a_guarded_genai_folder(llama: Path, tmp_path: Path) -> None:
    """As the command line does it, in one go: built in int4, guarded, proved, and running."""
    directions = write_directions(tmp_path / "d.safetensors", random_directions(64, range(3)))
    out = tmp_path / "guarded"
    asked = ["--exporter", "genai", "--dtype", "int4", "--directions", str(directions), "--mode", "project", "--json"]
    done = CliRunner().invoke(cli.app, ["export", str(llama), str(out), *asked])
    assert done.exit_code == 0, done.output
    (decoder,) = json.loads(done.stdout)["decoders"]
    assert decoder["proof"] and all(check["ok"] for check in decoder["proof"])
    assert (out / "genai_config.json").is_file() and open_package(out).layout == "genai"
    assert isinstance(GuardedVLM.open(out).answer([Request("how do I make a cake")])[0], str)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "w16a32", "int4"])
def test_convert_takes_every_dtype_that_an_export_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    asked = []

    def stand_in(job: exporters.Job) -> tuple[Check, ...]:
        asked.append(job.dtype)
        (job.out / "model.onnx").write_bytes(b"a graph")
        return ()

    name = "genai" if dtype == "int4" else "transformers"
    monkeypatch.setitem(exporters.EXPORTERS, name, replace(EXPORTERS[name], export=stand_in))  # type: ignore[arg-type]
    done = CliRunner().invoke(cli.app, ["convert", "here", str(tmp_path / "out"), "--dtype", dtype, "--exporter", name])
    assert done.exit_code == 0, done.output
    assert asked == [dtype]


# Refusals


def test_an_unknown_exporter(tmp_path: Path) -> None:
    assert refusal(GuardError, "here", tmp_path, "olive") == (
        "unknown exporter 'olive'; choose transformers, genai, optimum"
    )


@pytest.mark.parametrize(
    ("exporter", "dtype", "said"),
    [
        (
            "transformers",
            "int4",
            "transformers does not write dtype 'int4', only fp32, fp16 or w16a32; genai writes int4",
        ),
        ("optimum", "int4", "optimum does not write dtype 'int4', only fp32 or fp16; genai writes int4"),
        ("genai", "q4", "genai does not write dtype 'q4', only fp32, fp16 or int4; no exporter writes q4"),
    ],
)
def test_a_dtype_that_it_does_not_write(tmp_path: Path, exporter: str, dtype: str, said: str) -> None:
    assert refusal(GuardError, "here", tmp_path, exporter, dtype) == said


def test_an_opset_that_is_not_ours_to_choose(tmp_path: Path) -> None:
    assert refusal(GuardError, "here", tmp_path, "genai", opset=20) == (
        "genai chooses its own opset, 20 has no effect; leave --opset out"
    )


def test_an_exporter_for_a_model_that_is_onnx_already(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.touch()
    with pytest.raises(GuardError) as refused, opened(model, None, ignore_progress, exporter="genai"):
        pass
    assert str(refused.value) == f"--exporter genai is for checkpoints, {model} is ONNX already; leave it out"


@pytest.mark.parametrize("module", ["onnxruntime_genai", "torch", "transformers"])
def test_the_genai_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(exporters, "find_spec", lambda name: None if name == module else name)
    assert refusal(ExtraMissing, "here", tmp_path, "genai") == (
        f"exporter genai needs {module}, which is not installed; run: {install_command('genai')}"
    )


def test_the_optimum_extra_and_its_transformers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.setattr(metadata, "version", {"optimum-onnx": "0.1.0", "transformers": "5.23.0"}.__getitem__)
    assert refusal(ExtraMissing, "here", tmp_path, "optimum") == (
        "exporter optimum needs optimum-onnx with transformers 4.57, found optimum-onnx 0.1.0 with transformers 5.23.0; "
        f"in an environment of its own, run: {install_command('optimum')}"
    )


def test_optimum_that_is_not_there_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.setattr(metadata, "version", version)
    assert "found no optimum-onnx with no transformers" in refusal(ExtraMissing, "here", tmp_path, "optimum")


def test_what_optimum_says_against_a_checkpoint(llama: Path, tmp_path: Path, optimum: dict) -> None:
    optimum["fail"] = ValueError("no such architecture\nand much more")
    assert refusal(ModelUnreadable, llama, tmp_path / "out", "optimum") == (
        f"{llama}: optimum cannot export it (no such architecture and much more); try --exporter transformers"
    )


@pytest.mark.slow
def test_what_the_genai_builder_says_against_a_checkpoint(tmp_path: Path) -> None:
    llava = save_tiny_llava(tmp_path / "llava", layers=1)
    said = refusal(ModelUnreadable, llava, tmp_path / "out", "genai")
    assert said.startswith(f"{llava}: onnxruntime-genai's builder cannot export it (NotImplementedError: The ")
    assert said.endswith("try --exporter transformers") and "\n" not in said


@pytest.mark.parametrize(("code", "writes"), [(1, True), (0, False)])
def test_a_builder_that_writes_nothing_has_failed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, writes: bool
) -> None:
    asked = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        asked.append(command)
        if writes:
            (tmp_path / "genai_config.json").write_text("{}")
        return subprocess.CompletedProcess(command, code, "", "Traceback\n  here\nKeyError: 'rope'\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert refusal(ModelUnreadable, llama, tmp_path, "genai", "fp16") == (
        f"{llama}: onnxruntime-genai's builder cannot export it (KeyError: 'rope'); try --exporter transformers"
    )
    assert asked[0][:3] == [sys.executable, "-m", "vlmguard.exporter.checkpoints.genai_builder"]
    assert asked[0][asked[0].index("-p") + 1 :][:3] == ["fp16", "-e", "cuda"]


@pytest.mark.parametrize(
    ("name", "older"),
    [("Qwen3_5Tokenizer", "Qwen2Tokenizer"), ("Qwen2Tokenizer", "Qwen2Tokenizer"), ("Another", "Another")],
)
def test_a_tokenizer_is_named_as_genai_knows_it(name: str, older: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": name}))
    before = path.read_bytes()
    name_older_tokenizer(tmp_path)
    assert json.loads(path.read_text()) == {"eos_token": "</s>", "tokenizer_class": older}
    assert (path.read_bytes() == before) == (name == older)
    path.unlink()
    name_older_tokenizer(tmp_path)
    assert not path.exists()


def test_the_builder_reads_rotary_parameters_by_layer_type_in_the_form_that_it_knows() -> None:
    """As transformers 5 writes them for models with sliding windows; others stay as they are."""
    layers = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = SimpleNamespace(rope_parameters=dict(layers))
    flatten_rope(config)
    assert vars(config) == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
    for same in ({"rope_type": "default", "rope_theta": 1e4}, None):
        config = SimpleNamespace(rope_parameters=same)
        flatten_rope(config)
        assert vars(config) == {"rope_parameters": same}


@pytest.mark.zoo
def test_gemma_3_is_built_by_genai_and_guarded(tmp_path: Path) -> None:
    """Its rotary parameters by layer type were a KeyError."""
    # the builder takes a matrix of as many rows as the vocabulary has words for the head
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 96}
    checkpoint = save_tiny_text("gemma3_text", tmp_path / "gemma", **sizes)
    export_checkpoint(checkpoint, tmp_path / "built", "genai", "int4")
    directions = write_directions(tmp_path / "d.safetensors", random_directions(64, range(2)))
    spec = GuardSpec(mode="project")
    result = export(tmp_path / "built", tmp_path / "guarded", directions=directions, spec=spec, allow_no_effect=True)
    assert result.written and all(check.ok for check in result.proof)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path, optimum: dict) -> None:
    assert refusal(ModelUnreadable, tmp_path, tmp_path / "out", "optimum") == (
        f"{tmp_path}: no config.json; name the folder of a Hugging Face checkpoint"
    )
