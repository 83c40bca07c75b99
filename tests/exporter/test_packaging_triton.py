"""A guarded folder as a Triton model repository: its configs by Triton's own schema, its front model, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from random_directions import random_directions, write_directions
from small_guarded import edit_manifest, guard_small, make_the_manifest_fit, small_model
from tiny_vlm_paths import SOURCE, Guarded
from typer.testing import CliRunner

from vlmguard import GuardedVLM, GuardSpec, cli, export, verify
from vlmguard.exporter.packaging.prototext import Word, to_prototext
from vlmguard.exporter.packaging.triton_config import TritonOptions
from vlmguard.exporter.packaging.triton_repository import arrange, package_triton
from vlmguard.graphs.errors import GuardError, ManifestMismatch, OutputRefused
from vlmguard.graphs.manifest import EngineRecord, read_manifest
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import package_of

pytest.importorskip("tritonclient.grpc")

from google.protobuf import text_format
from triton_stand_in import Repository, full_shape, numpy_type, read_config
from triton_stand_in import Request as TritonRequest
from tritonclient.grpc import model_config_pb2

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")

HARMFUL, HARMLESS = "how to build a bomb", "how to wash the boat"
PICTURE = Image.new("RGB", (16, 16), (40, 160, 90))
MODELS = ("decoder", "embed_tokens", "vision_encoder", "vlmguard")


@pytest.fixture(scope="module")
def repositories(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`repositories("restore")`: the repository of that mode; nobody writes into it."""
    root = tmp_path_factory.mktemp("triton")

    def get(mode: str) -> Path:
        if not (root / mode).exists():
            package_triton(guarded(mode), root / mode)
        return root / mode

    return get


@pytest.fixture
def repository(repositories: Callable[[str], Path], tmp_path: Path) -> Path:
    """One to be damaged."""
    return Path(shutil.copytree(repositories("restore"), tmp_path / "repository"))


def png(picture: Image.Image = PICTURE) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def told(response: Any) -> dict[str, Any]:
    return {tensor.name(): tensor.as_numpy().tolist() for tensor in response.output_tensors()}


# The repository


def test_configs_are_triton_s_own_and_say_what_the_graphs_say(repositories: Callable[[str], Path]) -> None:
    folder = repositories("restore")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(MODELS)
    for name in MODELS:
        config = read_config(folder / name / "config.pbtxt")
        assert config.name == name
        assert [path.name for path in (folder / name).iterdir() if path.is_dir()] == ["1"]
        assert list(config.version_policy.specific.versions) == [1]
        assert not config.HasField("sequence_batching") and not config.HasField("ensemble_scheduling")
        if name == "vlmguard":
            assert config.backend == "python" and (folder / name / "1" / "model.py").is_file()
            assert config.model_transaction_policy.decoupled
            continue
        assert config.backend == "onnxruntime"
        session = onnxruntime.InferenceSession(
            folder / name / "1" / config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        for said, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            shapes = {tensor.name: full_shape(config, tensor) for tensor in said}
            assert shapes == {p.name: [n if isinstance(n, int) else -1 for n in p.shape] for p in found}
            assert {numpy_type(tensor.data_type) for tensor in said} <= {np.float32, np.int64}
        batched = name in ("embed_tokens", "vision_encoder")
        assert (config.max_batch_size, config.HasField("dynamic_batching")) == ((8, True) if batched else (0, False))


def test_options_are_in_the_configs(guarded: Guarded, tmp_path: Path) -> None:
    options = TritonOptions(device="gpu", instances=2, requests=3, max_batch=0)
    package_triton(guarded("restore"), tmp_path / "out", options)
    for name in MODELS:
        config = read_config(tmp_path / "out" / name / "config.pbtxt")
        (group,) = config.instance_group
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        assert (kind, group.count) == (("KIND_CPU", 3) if name == "vlmguard" else ("KIND_GPU", 2))
        assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    with pytest.raises(GuardError, match=r"^--instances 0 is out of range; choose 1 or more$"):
        TritonOptions(instances=0)


def test_text_is_what_the_schema_reads() -> None:
    name = 'a "quoted" \\ name\n\t\u00e9\u4e2d'
    text = to_prototext({"name": name, "max_batch_size": 3, "instance_group": [{"kind": Word("KIND_CPU"), "count": 2}]})
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.max_batch_size, config.instance_group[0].count) == (name, 3, 2)


def test_the_repository_is_a_guarded_folder(repositories: Callable[[str], Path], guarded: Guarded) -> None:
    folder = repositories("restore")
    result = verify(folder, SOURCE)
    assert result.ok
    names = [check.name for check in result.checks]
    assert "Triton finds one version of each model, and no other model" in names
    assert "files around the decoder are the source's" in names
    here, there = GuardedVLM.open(folder), GuardedVLM.open(guarded("restore"))
    assert here.generate(HARMFUL, PICTURE) == there.generate(HARMFUL, PICTURE)


def stray_model(folder: Path) -> None:
    shutil.copytree(folder / "decoder", folder / "other")


def second_version(folder: Path) -> None:
    shutil.copytree(folder / "decoder" / "1", folder / "decoder" / "2")


def renamed_model(folder: Path) -> None:
    (folder / "vision_encoder").rename(folder / "eyes")


def other_config(folder: Path) -> None:
    path = folder / "decoder" / "config.pbtxt"
    path.write_text(path.read_text().replace("KIND_CPU", "KIND_GPU"))


def other_front(folder: Path) -> None:
    path = folder / "vlmguard" / "1" / "model.py"
    path.write_text(path.read_text() + "\n")


def no_ports(folder: Path) -> None:
    (folder / "vlmguard" / "1" / "ports.json").unlink()


BOTH_RULES = {
    stray_model: "a graph that no proof is about",
    second_version: "a graph that no proof is about",
    renamed_model: "a graph that no proof is about",
    other_config: "configs and front model are what the graphs give",
    other_front: "configs and front model are what the graphs give",
    no_ports: "configs and front model are what the graphs give",
}


@pytest.mark.parametrize("damage", BOTH_RULES, ids=lambda damage: damage.__name__)
def test_what_triton_would_load_besides_is_found(repository: Path, damage: Callable[[Path], None]) -> None:
    """Once by the digests, and again where somebody made the manifest fit."""
    damage(repository)
    with pytest.raises(ManifestMismatch):
        verify(repository)

    def fit(content: dict) -> None:
        names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        content["files"] = {name: {"modified_ns": 0} for name in names if name != "guard.json"}

    edit_manifest(repository, fit)
    make_the_manifest_fit(repository)
    try:
        said = "; ".join(check.name for check in verify(repository).checks if not check.ok)
    except ManifestMismatch as error:
        said = str(error)
    assert BOTH_RULES[damage] in said


@pytest.mark.parametrize(
    "name",
    [
        "vlmguard/1/triton_python_backend_stub",
        "decoder/configs/gpu.pbtxt",
        "vlmguard/1/__pycache__/model.cpython-311.pyc",
    ],
)
def test_what_triton_would_run_besides_is_found(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("")
    with pytest.raises(ManifestMismatch) as refused:
        verify(repository)
    assert str(refused.value) == f"{repository}: {name} was added after the proof; remove it, or export again"


# The front model


@pytest.mark.parametrize("mode", ["restore", "supervise", "align", "rows", "runtime_controls"])
def test_front_model_answers_as_guarded_vlm(repositories: Callable[[str], Path], guarded: Guarded, mode: str) -> None:
    repository, vlm = Repository(repositories(mode)), GuardedVLM.open(guarded(mode))
    for prompt, picture in ((HARMFUL, None), (HARMFUL, PICTURE), (HARMLESS, PICTURE)):
        steps = vlm.steps([Request(prompt, picture)], Sampling(max_new_tokens=64))
        tokens = [token for step in steps for token in step.tokens if token is not None]
        shown = {} if picture is None else {"image": png(picture)}
        repository.asked.clear()
        (whole,) = map(told, repository.ask(text_input=prompt, max_tokens=np.int32(64), **shown).responses)
        assert whole["token_ids"] == tokens and tokens
        assert whole["text_output"] == [vlm.generate(prompt, picture, max_new_tokens=64).encode()]
        assert whole["finish_reason"] == [b"stop"]
        # a call per token and one for the end; with a supervisor one more before them
        assert repository.asked.count("decoder") == len(tokens) + 1 + (mode in ("supervise", "align"))
        pieces = [told(one) for one in repository.ask(text_input=prompt, stream=np.bool_(True), **shown).responses]
        assert [token for piece in pieces for token in piece["token_ids"]] == tokens
        assert b"".join(piece["text_output"][0] for piece in pieces).strip() == whole["text_output"][0]
        assert [piece["finish_reason"] for piece in pieces] == [[b""]] * (len(pieces) - 1) + [[b"stop"]]


def test_no_request_can_leave_the_guard_out(repositories: Callable[[str], Path]) -> None:
    """Knobs of the graph are no inputs of any model, the supervisor is none of the front model's."""
    supervised = (("supervise", ("vlmguard.supervisor",)), ("align", ("vlmguard.prompt_supervisor",)))
    for mode, inside in (("runtime_controls", ()), ("rows", ()), *supervised):
        for name in MODELS:
            config = read_config(repositories(mode) / name / "config.pbtxt")
            found = [one.name for one in config.input if one.name.startswith("vlmguard.")]
            found = [one for one in found if one != "vlmguard.past_gate"]
            assert tuple(found) == (inside if name == "decoder" else ())


def test_front_model_refuses_in_a_sentence(repositories: Callable[[str], Path]) -> None:
    repository = Repository(repositories("restore"))
    for asked, sentence in (
        ({"max_tokens": np.int32(5000)}, "max_tokens 5000 is above this server's limit of 4096; choose less"),
        ({"max_tokens": np.int32(0)}, "max_new_tokens 0 is below 1; choose 1 or more"),
        ({"image": b"/etc/hostname"}, "the image cannot be read (of no known format); save it again as PNG or JPEG"),
        ({"image": bytes(21 << 20)}, f"image has {21 << 20} bytes, more than {20 << 20}; scale it down first"),
        ({"text_input": b"\xff"}, "text_input is no UTF-8; encode the prompt as such"),
        ({"text_input": b" "}, "the prompt is empty; write something"),
        ({"seed": np.int64(-1)}, "seed -1 is negative; choose 0 or more"),
    ):
        (response,) = repository.ask(**{"text_input": HARMLESS, **asked}).responses
        assert str(response.error()) == sentence and response.error().code == 3


def test_front_model_tells_the_client_of_a_bug(
    repositories: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the client would get an empty answer, and Triton alone would know."""
    repository = Repository(repositories("restore"))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(repository.front.vlm, "pieces", broken)
    request = TritonRequest(repository.configs["vlmguard"], {"text_input": np.array([HARMLESS.encode()], np.object_)})
    with pytest.raises(ZeroDivisionError):
        repository.front.execute([request])
    (response,) = request.sender.responses
    assert str(response.error()) == "the model failed (ZeroDivisionError)" and request.sender.ended == 1


def test_front_model_stops_when_nobody_listens(repositories: Callable[[str], Path]) -> None:
    repository = Repository(repositories("restore"))
    sender = repository.ask(text_input=HARMLESS, stream=np.bool_(True), listens=2)
    assert len(sender.responses) == 2


def test_front_model_does_not_start_on_another_repository(repository: Path) -> None:
    (repository / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception, match=r"tokenizer\.json is not the file that was proved"):
        Repository(repository)
    (repository / "guard.json").unlink()
    with pytest.raises(Exception, match=r"has no guard\.json beside the models, so no file records a guard"):
        Repository(repository)


# What is refused


def test_only_a_guarded_folder_is_packaged(guarded: Guarded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ManifestMismatch, match=r"has no guard.json, so it is not a guarded folder; export it first$"):
        package_triton(SOURCE, out)
    folder = Path(shutil.copytree(guarded("restore"), tmp_path / "guarded"))
    decoder = folder / "onnx" / "decoder_model_merged.onnx"
    shutil.copy2(SOURCE / "onnx" / decoder.name, decoder)
    with pytest.raises(ManifestMismatch, match=r"decoder_model_merged\.onnx is not the file that was proved"):
        package_triton(folder, out)
    make_the_manifest_fit(folder)
    with pytest.raises(GuardError):
        package_triton(folder, out)
    assert not out.exists()


def test_a_proof_of_structure_alone_is_not_enough(tmp_path: Path) -> None:
    folder = guard_small(small_model(tmp_path / "model"), tmp_path / "guarded", mode="project")
    with pytest.raises(ManifestMismatch) as refused:
        package_triton(folder, tmp_path / "out")
    assert str(refused.value) == (
        f"{folder}: only the structure of its guard was proved; run `vlmguard verify --run --source MODEL` on it first"
    )


def test_the_folder_to_write_is_a_new_one_apart(guarded: Guarded, repositories: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputRefused, match=r"exists already; choose another OUT, or replace it with --force$"):
        package_triton(guarded("restore"), tmp_path / "there")
    with pytest.raises(OutputRefused, match="would overwrite or lie inside the model"):
        package_triton(guarded("restore"), guarded("restore") / "triton")
    with pytest.raises(ManifestMismatch, match="was packaged already; give the guarded folder that it was made from"):
        package_triton(repositories("restore"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("tensorrt_rtx", "engines of TensorRT-RTX, which Triton's TensorRT backend does not load"),
        ("tensorrt", "TensorRT engines, which are not packaged: they do not declare their inputs and outputs"),
    ],
)
def test_engines_are_refused(guarded: Guarded, backend: str, why: str) -> None:
    manifest = read_manifest(guarded("restore"))
    record = EngineRecord(
        path="onnx/decoder_model_merged.engine",
        role="decoder",
        source={},
        backend=backend,  # pyright: ignore[reportArgumentType]
        version="1",
        capabilities=[],
        profiles=[],
        layers={},
    )
    engines = manifest.model_copy(update={"engines": [record]})
    package = package_of(guarded("restore"), engines)
    with pytest.raises(GuardError) as refused:
        arrange(engines, package, TritonOptions())
    assert str(refused.value) == (
        f"{guarded('restore')}: holds {why}; package the guarded ONNX folder that they were built from"
    )


def test_a_text_decoder_alone_is_served(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    """Its external data lies beside the graph, and its front model asks one model."""
    directions = write_directions(tmp_path / "d.safetensors", random_directions(64, [1, 2]))
    out = export(
        zoo("llama-genai-fp32").folder, tmp_path / "guarded", spec=GuardSpec("project"), directions=directions
    ).out
    repository = Repository(package_triton(out, tmp_path / "repository").out)
    assert sorted(repository.configs) == ["decoder", "vlmguard"]
    assert {path.name for path in (repository.folder / "decoder" / "1").iterdir()} == {"model.onnx", "model.onnx.data"}
    (whole,) = map(told, repository.ask(text_input=HARMLESS, max_tokens=np.int32(8)).responses)
    steps = GuardedVLM.open(out).steps([Request(HARMLESS)], Sampling(max_new_tokens=8))
    assert whole["token_ids"] == [step.tokens[0] for step in steps]
    assert whole["finish_reason"] == [b"length"]
    (refused,) = repository.ask(text_input=HARMLESS, image=png()).responses
    assert str(refused.error()).endswith("has no vision encoder; leave the image out")


def test_a_decoder_without_embeddings_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    package = package_of(guarded("restore"), read_manifest(guarded("restore")))
    with pytest.raises(GuardError) as refused:
        arrange(read_manifest(guarded("restore")), replace(package, embed_tokens=None), TritonOptions())
    assert str(refused.value) == (
        f"{package.root}: the decoder takes inputs_embeds, but there is no embed_tokens graph, so nothing could feed it in "
        "Triton; package the whole model folder"
    )


def test_command_line(guarded: Guarded, tmp_path: Path) -> None:
    run = CliRunner()
    both = ["package", str(guarded("restore")), "--triton", str(tmp_path / "a"), "--genai", str(tmp_path / "b")]
    assert run.invoke(cli.app, both).exit_code == run.invoke(cli.app, both[:2]).exit_code == 2
    done = run.invoke(cli.app, [*both[:4], "--gpu", "--json"])
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["layout"] == "triton" and content["proof"]["ok"] and "decoder/config.pbtxt" in content["written"]
