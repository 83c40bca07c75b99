"""`export`, stage by stage: what guides it, what it writes and where, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from random_directions import random_directions, write_directions
from tiny_vlm_paths import ANCHORS, CALIBRATION, DECODER, PROMPTS, SOURCE, Guarded, digests

import vlmguard
from vlmguard.exporter import opened_decoder, stages
from vlmguard.exporter import resolve as resolve_module
from vlmguard.exporter.calibration.choice import Wish
from vlmguard.exporter.extract_directions import extract_directions
from vlmguard.exporter.opened_decoder import inspect
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.prompts.labelled import read_anchors
from vlmguard.exporter.resolve import DirectionsRequest, open_anchor_pairs
from vlmguard.exporter.session import Session
from vlmguard.graphs import staging
from vlmguard.graphs.digests import sha256_file
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.errors import DirectionMismatch, GuardError, OutputRefused, PromptsUnusable, ProofFailed
from vlmguard.graphs.manifest import read_manifest, require_intact
from vlmguard.graphs.spec import GuardSpec

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tiny VLM that may be changed, with nothing beside it."""
    return shutil.copytree(SOURCE, tmp_path / "models" / "tiny")


@pytest.fixture
def directions(guarded: Guarded) -> Path:
    return guarded("restore") / "directions.safetensors"


def refusal(error: type[GuardError], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- writing


def test_out_has_the_files_of_the_model_and_two_more(source: Path, directions: Path) -> None:
    result = export(source, directions=directions)
    assert result.out == source.parent / "tiny-guarded" and result.written
    before, after = digests(source), digests(result.out)
    assert after.keys() == before.keys() | {"directions.safetensors", "guard.json"}
    assert [name for name in before if after[name] != before[name]] == [DECODER]
    manifest = read_manifest(result.out)
    assert require_intact(result.out, manifest) == len(after) - 1
    (record,) = manifest.decoders
    assert (record.path, manifest.decoder, manifest.proved) == (DECODER, DECODER, "full")
    assert record.plan == manifest.plan == result.plan.to_json() and record.report == result.report.to_json()
    assert record.proof == [check.to_json() for check in result.proof] and all(check.ok for check in result.proof)
    assert record.source == {"decoder": Path(DECODER).name, "sha256": before[DECODER], "external_data": {}}
    assert manifest.calibration is None and manifest.versions["vlmguard"] == vlmguard.__version__


def test_the_plan_says_what_the_report_says_was_done(source: Path, directions: Path) -> None:
    result = export(source, directions=directions, spec=GuardSpec(positions="all"))
    names = {node.name for node in onnx.load(result.out / DECODER).graph.node if node.name.startswith("vlmguard/")}
    assert result.report is not None and result.report.node_count == len(names) > 0
    assert result.plan.layers == result.report.layers == read_directions(directions).recommended_layers
    assert result.plan.positions == "all"


def test_a_dry_run_plans_the_same_and_writes_nothing(source: Path, directions: Path) -> None:
    before = digests(source.parent.parent)
    dry = export(source, directions=directions, dry_run=True)
    assert digests(source.parent.parent) == before and list(source.parent.iterdir()) == [source]
    assert (dry.written, dry.report, dry.proof) == (False, None, ())
    assert dry.plan.to_json() == export(source, directions=directions).plan.to_json()


def test_a_dry_run_with_directions_needs_no_runtime(source: Path, directions: Path) -> None:
    """Nothing is run, so that a machine without onnxruntime can plan."""
    code = "import sys; sys.modules['onnxruntime'] = None\nfrom vlmguard.cli import _run; _run(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(source), "--directions", str(directions)]
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert (planned.returncode, planned.stderr) == (0, "") and "dry run: nothing was written" in planned.stdout
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: onnxruntime is not installed")


def test_big_encoders_and_embeddings_by_reference_are_exported_and_verified(
    source: Path, directions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts at hand both models are asked after the proof; the guarded folder's own links lead out of it."""
    shutil.copy(CALIBRATION, source / "calibration.jsonl")
    shutil.copytree(PROMPTS / "images", source / "images")
    monkeypatch.setattr(staging, "BIG", 1)
    out = export(source, tmp_path / "out", directions=directions, data="reference").out
    assert (out / "onnx" / "embed_tokens.onnx").is_symlink() and (out / "onnx" / "vision_encoder.onnx").is_symlink()
    assert read_manifest(out).refusals is not None
    assert vlmguard.verify(out, source).ok
    vlmguard.GuardedVLM.open(out).generate("how to wash the boat", max_new_tokens=1)


def test_what_is_found_beside_the_model_is_reported_with_its_path_and_not_recorded(
    source: Path, directions: Path
) -> None:
    shutil.copy(directions, source / "directions.safetensors")
    result = export(source, dry_run=True)
    assert result.to_json()["found"] == {"directions": str(source / "directions.safetensors")}
    assert str(source) not in json.dumps(result.plan.to_json())
    assert export(source, directions=directions, dry_run=True).found == {}


def test_directions_of_another_model_one_folder_up_are_not_taken(
    source: Path, directions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(directions, source.parent / "directions.safetensors")
    shutil.copytree(PROMPTS, source.parent / "prompts")

    def reached(session: Session, request: DirectionsRequest) -> None:
        raise LookupError(session.found, open_anchor_pairs(session, request.anchors).name)

    monkeypatch.setattr(resolve_module, "choose_mode", reached)
    with pytest.raises(LookupError) as nothing_found:
        export(source, dry_run=True)
    assert nothing_found.value.args == ({}, "builtin")


@pytest.mark.parametrize("option", [{"readout": "lda"}, {"estimator": "mean"}, {"budget": 0.5}])
def test_options_of_a_calibration_that_does_not_happen_are_refused(
    source: Path, directions: Path, option: dict[str, Any]
) -> None:
    (name,) = option
    assert refusal(GuardError, export, source, directions=directions, dry_run=True, **option) == (
        f"{directions}: these directions are used as they are, so --{name} has no effect; leave it out, or give --anchors to "
        "extract and calibrate"
    )


def test_an_existing_out_is_refused_before_any_work(
    source: Path, directions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    monkeypatch.setattr(opened_decoder, "dissect", lambda *_: pytest.fail("worked before looking"))
    assert refusal(OutputRefused, export, source, out, directions=directions) == (
        f"{out}: exists already; choose another OUT, or replace it with --force"
    )
    assert (out / "mine.txt").read_text() == "keep"


def test_force_replaces_out_as_a_whole(source: Path, directions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.onnx").write_bytes(b"an unguarded decoder that must not stay")
    export(source, out, directions=directions, force=True)
    assert not (out / "old.onnx").exists()
    require_intact(out, read_manifest(out))


@pytest.mark.parametrize("out", [".", "..", "onnx", "sub/out"])
def test_out_can_neither_be_nor_hold_nor_lie_in_the_model(source: Path, directions: Path, out: str) -> None:
    before = digests(source)
    target = source / out
    for force in (False, True):
        assert refusal(OutputRefused, export, source, target, directions=directions, force=force) == (
            f"{target}: would overwrite or lie inside the model {source}; choose a folder beside it"
        )
    assert digests(source) == before


def test_a_failed_proof_leaves_nothing(source: Path, directions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of OUT, nothing of the hidden folder that it is made in."""

    def save_tampered(model: Any, path: Path, own_data: Any) -> None:
        name = next(name for name in model.graph.initializers if name.endswith("/ssd"))
        value = model.graph.initializers[name]
        value.const_value = vlmguard_tensor(-value.const_value.numpy(), name)
        save(model, path, own_data)

    save = stages.save_graph
    monkeypatch.setattr(stages, "save_graph", save_tampered)
    sentence = refusal(ProofFailed, export, source, directions=directions)
    assert sentence.startswith("the proof failed at 'guarded states equal the numpy reference'")
    assert list(source.parent.iterdir()) == [source]


def vlmguard_tensor(array: np.ndarray, name: str) -> Any:
    import onnx_ir as ir

    return ir.Tensor(array, name=name)


def test_other_decoders_of_the_folder_are_left_out_where_one_is_asked_for(source: Path, directions: Path) -> None:
    """They would be unguarded models in a folder that says it is guarded; what is hidden or ours is not copied either."""
    shutil.copyfile(source / DECODER, source / "onnx" / "decoder_model_merged_q4.onnx")
    shutil.copyfile(source / DECODER, source / "onnx" / "embed_tokens_extra.onnx")
    for name in (".hidden", "guard.json", "model.safetensors"):
        (source / name).write_text("{}")
    result = export(source, directions=directions, variant="")
    written = digests(result.out)
    assert "onnx/decoder_model_merged_q4.onnx" not in written and ".hidden" not in written
    assert "model.safetensors" not in written and read_manifest(result.out).decoder == DECODER
    assert "onnx/embed_tokens_extra.onnx" in written
    note = "left out, because they would be unguarded decoders: onnx/decoder_model_merged_q4.onnx"
    assert note in result.plan.notes


def test_a_variant_is_guarded_under_its_own_name(source: Path, directions: Path) -> None:
    (source / DECODER).rename(source / "onnx" / "decoder_model_merged_fp16.onnx")
    shutil.copyfile(
        source / "onnx" / "decoder_model_merged_fp16.onnx", source / "onnx" / "decoder_model_merged_q4.onnx"
    )
    result = export(source, variant="q4", directions=directions)
    assert [p.name for p in (result.out / "onnx").glob("decoder*")] == ["decoder_model_merged_q4.onnx"]
    sentence = refusal(GuardError, export, source, source.parent / "x", variant="int8", directions=directions)
    assert sentence == (f"{source / 'onnx'}: the decoder has no variant 'int8', only 'fp16', 'q4'; name one")


def test_a_bare_decoder_without_a_tokenizer_is_guarded(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    """Named after its file, beside it; the proof runs on seeded numbers, since nobody can read words."""
    path = tmp_path / "decoder.onnx"
    shutil.copyfile(zoo("llava-torchscript-fp32").path, path)
    file = write_directions(tmp_path / "d.safetensors", random_directions(64, [1, 2]))
    result = export(path, directions=file)
    assert result.out == tmp_path / "decoder-guarded"
    assert digests(result.out).keys() == {"decoder.onnx", "directions.safetensors", "guard.json"}
    assert "seeded random inputs (the model has no tokenizer.json)" in result.proof[4].note
    assert vlmguard.verify(result.out, path).ok


def test_a_genai_folder_keeps_its_files_and_its_weights(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    source = zoo("llama-genai-fp32").folder
    file = write_directions(tmp_path / "d.safetensors", random_directions(64, [0, 3]))
    result = export(source, tmp_path / "out", directions=file)
    before, after = digests(source), digests(result.out)
    assert after.keys() == before.keys() | {"directions.safetensors", "guard.json"}
    assert [name for name in before if after[name] != before[name]] == ["model.onnx"]
    assert read_manifest(result.out).decoders[0].source["external_data"] == {
        "model.onnx.data": before["model.onnx.data"]
    }
    answer = vlmguard.GuardedVLM.open(result.out).generate("hello", max_new_tokens=3)
    assert isinstance(answer, str)


def test_those_who_watch_are_told_each_stage(source: Path, directions: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export(source, directions=directions, report_progress=lambda *event: told.append(event))
    hashed = [(done, total) for stage, done, total in told if stage == "hashing (bytes)"]
    assert hashed == sorted(hashed) and hashed[-1][0] == hashed[-1][1]
    name, asked = f"proving {Path(DECODER).name}", "asking both models"
    others = [event for event in told if event[0] != "hashing (bytes)"]
    before, proof, after = (
        [(asked, 8, 32), (asked, 16, 32)],
        [(name, 0, 2), (name, 1, 2), (name, 2, 2)],
        [(asked, 24, 32), (asked, 32, 32)],
    )
    assert others == [*before, *proof, *after, ("done", 1, 1)]


# ------------------------------------------------------------------------------------------------------ what guides it


def test_directions_are_found_beside_the_model(source: Path, directions: Path) -> None:
    shutil.copyfile(directions, source / "directions.safetensors")
    result = export(source)
    assert result.calibration is None and result.plan.layers == read_directions(directions).recommended_layers
    assert sha256_file(result.out / "directions.safetensors") == sha256_file(directions)


def test_directions_of_another_decoder_are_refused_unless_forced(source: Path, directions: Path) -> None:
    path = source / DECODER
    model = onnx.load(path)
    model.doc_string = "another file"
    onnx.save(model, path)
    expected, found = (sha256_file(p)[:12] for p in (SOURCE / DECODER, path))
    assert refusal(DirectionMismatch, export, source, directions=directions) == (
        f"{directions}: was extracted from another decoder file (its SHA-256 begins {expected}, this one's {found}); "
        "extract them again, or give them with --directions and --force"
    )
    result = export(source, directions=directions, force=True)
    note = f"directions of another decoder file ({expected}), accepted by --force"
    assert note in result.plan.notes and note in read_manifest(result.out).plan["notes"]


def test_directions_without_calibration_mean_a_projection_and_say_so(source: Path, raw_directions: Path) -> None:
    plan = export(source, directions=raw_directions, dry_run=True).plan
    assert plan.mode == "project" and plan.layers == tuple(read_directions(raw_directions).layers) == tuple(range(6))
    assert plan.notes[:3] == (
        f"directions given: {raw_directions.name}",
        "mode project: the directions carry an SSD alone; an uncalibrated projection may over-refuse or do nothing, so "
        "evaluate it, or calibrate (give --anchors too)",
        "layers 0, 1, 2, 3, 4, 5: those of the directions file",
    )


class Reached(Exception):
    """The calibrator was reached; what it was given is in `args`."""


def reach_calibrator(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Stop at the calibrator, and where a mode is chosen; the anchors that were extracted from are kept."""
    extracted: list[list[Any]] = []
    real = resolve_module.extract_all_layers

    def stop(
        model: Any, anatomy: Any, directions: Any, prompts: Any, spec: Any, budget: float, readout: Any, **_: Any
    ) -> Any:
        raise Reached(prompts, spec, budget, directions)

    def stop_choosing(
        model: Any, anatomy: Any, directions: Any, prompts: Any, wish: Wish, source: str, report_progress: Any
    ) -> Any:
        raise Reached(prompts, wish.spec, wish.budget, directions)

    def keep(model: Any, anatomy: Any, pairs: Any, **options: Any) -> Any:
        extracted.append(list(pairs))
        return real(model, anatomy, pairs, **options)

    monkeypatch.setattr(resolve_module, "calibrate", stop)
    monkeypatch.setattr(resolve_module, "choose", stop_choosing)
    monkeypatch.setattr(resolve_module, "extract_all_layers", keep)
    return extracted


@pytest.mark.parametrize("given", [{"anchors": ANCHORS}, {"calibration": CALIBRATION}])
def test_given_directions_are_calibrated_on_given_prompts(
    source: Path, raw_directions: Path, given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who gives anchors expects them to be used; and nothing is extracted where directions are at hand."""
    extracted = reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        export(source, directions=raw_directions, spec=GuardSpec(rank=1), **given)
    prompts, spec, _, directions = reached.value.args
    assert (extracted, spec.rank) == ([], 1)
    assert len(prompts) == len(CALIBRATION.read_text(encoding="utf-8").splitlines())
    expected = read_directions(raw_directions)
    assert directions.layers.keys() == expected.layers.keys()
    assert all(np.array_equal(layer.ssd, expected.layers[n].ssd) for n, layer in directions.layers.items())


def test_given_directions_are_calibrated_on_every_anchor_pair(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without labelled prompts beside the anchors; none of them was used up by an extraction."""
    lines = ANCHORS.read_text(encoding="utf-8").splitlines()
    anchors, others = tmp_path / "anchors.jsonl", tmp_path / "others.jsonl"
    anchors.write_text("\n".join(lines[:9]))
    others.write_text("\n".join(lines[9:12]))
    extract_directions(source, tmp_path / "d.safetensors", anchors=others)
    reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        export(source, directions=tmp_path / "d.safetensors", anchors=anchors)
    assert len(reached.value.args[0]) == 9 * 2 * 2  # both labels, as text and with a blank picture


def test_directions_are_not_calibrated_on_what_they_were_extracted_from(
    source: Path, raw_directions: Path, tmp_path: Path
) -> None:
    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("\n".join(ANCHORS.read_text(encoding="utf-8").splitlines()[:9]))
    assert refusal(PromptsUnusable, export, source, directions=raw_directions, anchors=anchors) == (
        f"{anchors}: 36 of 36 prompts are anchors that the directions were extracted from; calibrate on held-out ones"
    )


def test_a_third_of_the_anchors_is_kept_from_extraction(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no calibration prompts are at hand: no prompt is both extracted from and calibrated on."""
    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("\n".join(ANCHORS.read_text(encoding="utf-8").splitlines()[:12]))
    extracted = reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        export(source, anchors=anchors, budget=0.07)
    prompts, _, budget, _ = reached.value.args
    pairs = read_anchors(anchors)
    assert extracted == [[pair for number, pair in enumerate(pairs) if number % 3]] and budget == 0.07
    kept = {text for pair in pairs[::3] for text in (pair.harmful, pair.harmless)}
    assert {prompt.prompt for prompt in prompts} == kept and len(kept) == 8
    assert {prompt.setting for prompt in prompts} == {"text", "blank"} and len(prompts) == 16


def test_calibration_prompts_are_found_beside_the_anchors(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extracted = reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        export(source, anchors=ANCHORS)
    assert len(reached.value.args[0]) == len(CALIBRATION.read_text(encoding="utf-8").splitlines())
    assert extracted == [read_anchors(ANCHORS)]


def test_given_calibration_prompts_are_not_lost_to_found_directions(
    source: Path, directions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directions file that lies beside the model does not silence what was asked for."""
    shutil.copyfile(directions, source / "directions.safetensors")
    shutil.copyfile(ANCHORS, source / "anchors.jsonl")
    reach_calibrator(monkeypatch)
    with pytest.raises(Reached):
        export(source, calibration=CALIBRATION)


def test_too_few_anchors_are_refused(source: Path, tmp_path: Path) -> None:
    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("\n".join(ANCHORS.read_text(encoding="utf-8").splitlines()[:3]))
    assert refusal(PromptsUnusable, export, source, anchors=anchors) == (
        f"{anchors}: too few anchors to extract and calibrate on; give at least 10 pairs"
    )


def test_without_anything_to_guide_it_the_built_in_anchors_are_taken(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of those for extraction, calibrated on one of those for calibration; none of the held-out test."""
    extracted = reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        export(source)
    prompts, _, _, directions = reached.value.args
    parts = {part: read_anchors("builtin", part) for part in ("extraction", "calibration")}
    assert extracted == [parts["extraction"]]
    assert directions.anchors["source"] == "builtin:extraction" and len(directions.anchors["fingerprints"]) == 160
    asked = {prompt.prompt for prompt in prompts}
    assert asked == {text for pair in parts["calibration"] for text in (pair.harmful, pair.harmless)}
    assert {prompt.setting for prompt in prompts} == {"text", "blank"}
    assert list(source.parent.iterdir()) == [source]


# -------------------------------------------------------------------------------------------- extract_directions, inspect


def test_extracted_directions_are_written_whole_or_not_at_all(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "d.safetensors"
    found = extract_directions(source, path, anchors=ANCHORS, rank=3)
    again = read_directions(path)
    assert again.layers.keys() == found.layers.keys() and {d.ssd.shape for d in again.layers.values()} == {(3, 128)}
    assert again.pairs == len(read_anchors(ANCHORS)) and again.model_sha256 == sha256_file(source / DECODER)
    assert again.evidence == json.loads(json.dumps(found.evidence)) and not again.calibrated_layers
    content = path.read_bytes()
    assert refusal(OutputRefused, extract_directions, source, path, anchors=ANCHORS) == (
        f"{path}: exists already; choose another file, or replace it with --force"
    )
    assert path.read_bytes() == content
    extract_directions(source, path, anchors=ANCHORS, rank=1, force=True)
    assert read_directions(path).layers[0].ssd.shape == (1, 128)
    assert [p.name for p in path.parent.iterdir()] == ["d.safetensors"]


def test_the_same_anchors_give_the_same_bytes(source: Path, raw_directions: Path, tmp_path: Path) -> None:
    extract_directions(source, tmp_path / "d.safetensors", anchors=ANCHORS)
    assert (tmp_path / "d.safetensors").read_bytes() == raw_directions.read_bytes()


def test_directions_can_be_calibrated_for_a_mode(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reach_calibrator(monkeypatch)
    with pytest.raises(Reached) as reached:
        extract_directions(source, tmp_path / "d.safetensors", anchors=ANCHORS, rank=2, calibrate_for="supervise")
    _, spec, _, _ = reached.value.args
    assert (spec.mode, spec.rank) == ("supervise", 2)
    assert not (tmp_path / "d.safetensors").exists()


def test_a_models_anatomy_is_shown(source: Path) -> None:
    anatomy = inspect(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert (anatomy.layer_count, anatomy.width) == (config["num_hidden_layers"], config["hidden_size"])
    assert anatomy.certainty == "confirmed" and anatomy.guarded_layers == ()
    assert inspect(source / DECODER).sites == anatomy.sites
    (source / "config.json").unlink()
    assert inspect(source).certainty == "structural"


def test_a_guarded_models_anatomy_says_so(guarded: Guarded) -> None:
    out = guarded("restore")
    anatomy = inspect(out)
    assert list(anatomy.guarded_layers) == read_manifest(out).plan["layers"]


def test_a_guarded_model_is_not_guarded_twice(guarded: Guarded, tmp_path: Path) -> None:
    out = guarded("restore")
    sentence = "this decoder already carries a guard; start again from the unguarded model"
    directions = write_directions(tmp_path / "d.safetensors", random_directions(128, [1]))
    assert refusal(GuardError, export, out, tmp_path / "x", directions=directions) == sentence
    # those beside it are of the unguarded decoder, which is not what is wrong here
    assert refusal(GuardError, export, out, tmp_path / "x") == sentence
    assert not (tmp_path / "x").exists()
