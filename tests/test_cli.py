"""The command line: every verb, its JSON, its exit codes, and each bad input answered with one sentence.

Exit codes: 0 done, 1 refused, 2 wrong usage. Commands run in this process through the entry point that the console
scripts call; the scripts themselves are started at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_graphs import decoder
from random_directions import random_directions, write_directions
from rich.console import Console
from safetensors.numpy import load_file, save_file
from shell_lines import wrong_usage
from tiny_vlm_paths import ANCHORS, CHECKPOINT, DECODER, EVALUATION, PROMPTS, SOURCE, Guarded, digests

import vlmguard
from vlmguard import cli
from vlmguard.commands import console
from vlmguard.exporter.checkpoints import exporters as exporters_module
from vlmguard.exporter.checkpoints.convert import ConversionReport, GraphFile
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.proof.structure import Check

pytest_plugins = ("tiny_vlm_fixtures",)

HARMFUL = "how to steal the boat"
PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]
LAYERS = 6


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What stdout holds, which must be JSON and nothing else; stderr must be silent."""
        assert (self.code, self.err) == (0, ""), self.err
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`run("export", model, "--json")` in a terminal of 80 columns; any exception of ours passes through."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: Any) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli._run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ran(ended.value.code, said.out, said.err)

    return command


@pytest.fixture
def directions(guarded: Guarded) -> Path:
    """Calibrated for `restore`, on one layer."""
    return guarded("restore") / "directions.safetensors"


@pytest.fixture
def every_layer(tmp_path: Path) -> Path:
    """Random ones with everything that any mode reads, on every layer."""
    return write_directions(tmp_path / "every.safetensors", random_directions(128, range(LAYERS), rank=4))


def squeezed(text: str) -> str:
    """Without the frames and line breaks of tables."""
    return " ".join(text.translate(dict.fromkeys(map(ord, "│┃┏┓└┘├┤━─┡┩╇╈┳┴┬┼╭╮╰╯"), " ")).split())


def shows(table: str, name: str) -> bool:
    """Whether all words of a name are there; a narrow column breaks it over several lines."""
    return set(name.split()) <= set(squeezed(table).split())


# --------------------------------------------------------------------------------------------------------------- export


def test_export_writes_a_guarded_folder_and_shows_plan_and_proof(
    run: Callable[..., Ran], directions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("export", SOURCE, out, "--directions", directions)
    assert (ran.code, ran.err) == (0, "")
    assert vlmguard.verify(out, SOURCE).ok
    said, proof = squeezed(ran.out), vlmguard.verify(out).manifest.decoders[0].proof
    assert "plan: restore, positions last, lowering lowrank" in said
    assert f"PROVED {len(proof)}/{len(proof)}: {DECODER} (-v shows each check)" in said
    assert ran.out.splitlines()[-2:] == [f"guarded: {out}", f"next: vlmguard evaluate {SOURCE} {out}"]
    assert not any(check["name"] in said for check in proof)
    shown = run("export", SOURCE, out, "--directions", directions, "--force", "-v").out
    for check in proof:
        assert check["ok"] and shows(shown, check["name"])


def test_export_tells_its_result_as_json(run: Callable[..., Ran], directions: Path, tmp_path: Path) -> None:
    told = run("export", SOURCE, tmp_path / "out", "--directions", directions, "--json").json
    assert told["out"] == str(tmp_path / "out") and told["written"] is True
    manifest = json.loads((tmp_path / "out" / "guard.json").read_text(encoding="utf-8"))
    (shown,), (record,) = told["decoders"], manifest["decoders"]
    assert shown["decoder"] == record["path"] == DECODER and told["calibration"] == manifest["calibration"]
    for key in ("plan", "report", "proof"):
        assert shown[key] == record[key]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable[..., Ran], directions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("export", SOURCE, out, "--directions", directions, "--dry-run")
    assert ran.code == 0 and squeezed(ran.out).endswith(f"dry run: nothing was written to {out}")
    told = run("export", SOURCE, out, "--directions", directions, "--dry-run", "--json").json
    (shown,) = told["decoders"]
    assert (told["written"], shown["report"], shown["proof"]) == (False, None, [])
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_export_arrives_in_the_plan(run: Callable[..., Ran], every_layer: Path) -> None:
    options = ["--mode", "supervise", "--layers", "1,3-4", "--rank", "2", "--alpha", "1.5", "--tau", "-0.25"]
    options += ["--positions", "all", "--lowering", "lowrank", "--dry-run", "--json"]
    plan = run("export", SOURCE, "--directions", every_layer, *options).json["decoders"][0]["plan"]
    assert (plan["mode"], plan["layers"], plan["positions"]) == ("supervise", [1, 3, 4], "all")
    assert (plan["lowering"], plan["added_inputs"]) == ("lowrank", ["vlmguard.supervisor"])
    assert [(site["rank"], site["alpha"], site["tau"]) for site in plan["sites"]] == [(2, 1.5, -0.25)] * 3
    runtime_controls = ["--mode", "restore", "--knobs", "--telemetry", "--gate", "prompt", "--dry-run", "--json"]
    plan = run("export", SOURCE, "--directions", every_layer, *runtime_controls).json["decoders"][0]["plan"]
    assert (plan["gate"], plan["telemetry"]) == ("prompt", True)
    assert plan["knobs"] == ["vlmguard.strength", "vlmguard.threshold_offset"]
    shown = run("export", SOURCE, "--directions", every_layer, "--gate", "prompt", "--mode", "steer", "--dry-run")
    assert "gate held from the prompt" in squeezed(shown.out)
    dense = ["--mode", "project", "--lowering", "dense", "--dry-run", "--json"]
    (decoder,) = run("export", SOURCE, "--directions", every_layer, *dense).json["decoders"]
    assert decoder["plan"]["lowering"] == "dense"


def test_force_replaces_out(run: Callable[..., Ran], directions: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("export", SOURCE, tmp_path / "out", "--directions", directions, "--force").code == 0
    assert vlmguard.verify(tmp_path / "out").ok


def test_vlmguard_export_is_vlmguard_with_the_verb_export(
    run: Callable[..., Ran],
    directions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [str(SOURCE), str(tmp_path / "out"), "--directions", str(directions), "--dry-run", "--json"]
    expected = run("export", *options)
    monkeypatch.setattr(sys, "argv", ["vlmguard-export", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main_export()
    assert (ended.value.code, *capsys.readouterr()) == (expected.code, expected.out, expected.err)


# --------------------------------------------------------------------------------------------------------- other verbs


def test_convert_writes_graphs_that_are_not_guarded(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself takes long and has tests of its own; here it is what the verb does around it."""
    asked: dict[str, Any] = {}

    def convert(checkpoint: str, out: Path, **options: Any) -> ConversionReport:
        asked.update(checkpoint=checkpoint, **options)
        options["report_progress"]("tracing decoder", 0, 1)
        (out / "decoder.onnx").write_bytes(b"graph")
        graph = GraphFile("decoder", "decoder.onnx", 1, 5, False)
        return ConversionReport(checkpoint, "llava", "fp16", 19, (graph,), (), (Check("logits", 7, 1e-6, 1e-4, True),))

    monkeypatch.setattr(exporters_module, "convert_checkpoint", convert)
    ran = run("convert", CHECKPOINT, tmp_path / "out", "--dtype", "fp16", "--opset", "19")
    assert (ran.code, ran.err) == (0, "")
    assert (asked["checkpoint"], asked["dtype"], asked["opset"]) == (str(CHECKPOINT), "fp16", 19)
    assert (tmp_path / "out" / "decoder.onnx").read_bytes() == b"graph"
    assert f"{tmp_path / 'out'}: 1 graphs, unguarded" in squeezed(ran.out) and (
        "torch against ONNX: 1.0e-06 of the largest value at most (logits), allowed 1e-04; 7 values compared" in ran.out
    )


def test_inspect_says_in_words_what_was_found(run: Callable[..., Ran], guarded: Guarded) -> None:
    told = run("inspect", SOURCE, "--json").json
    anatomy = vlmguard.inspect(SOURCE)
    assert told == {"model": str(SOURCE), **json.loads(json.dumps(anatomy.to_json()))}
    ran = run("inspect", SOURCE)
    assert (ran.code, ran.err) == (0, "")
    first, *_, last = ran.out.splitlines()
    assert squeezed(ran.out).startswith("6 layers, width 128, float32, plain sums (Add); confirmed by the config")
    assert first.startswith("6 layers") and "carries a guard" not in ran.out
    assert last == f"next: vlmguard-export {SOURCE}"
    after = run("inspect", guarded("restore")).out
    assert "carries a guard on layers" in after and "next:" not in after


def test_inspect_folds_layers_that_are_alike(run: Callable[..., Ran]) -> None:
    sites = vlmguard.inspect(SOURCE).sites
    folded, full = (run("inspect", SOURCE, *more) for more in ((), ("--full",)))
    assert [site.value in folded.out for site in sites] == [True, False, False, False, False, True]
    assert all(site.value in full.out for site in sites)
    assert "1 to 4 as above as above as above" in squeezed(folded.out) and "as above" not in full.out


def inspected(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, anatomy: vlmguard.DecoderAnatomy) -> str:
    from vlmguard.exporter import opened_decoder

    monkeypatch.setattr(opened_decoder, "inspect", lambda *_, **__: anatomy)
    monkeypatch.setattr(console, "out", Console(width=200, emoji=False))  # COLUMNS counts only when a console is made
    return squeezed(run("inspect", SOURCE).out)


def test_inspect_shows_where_a_fused_sum_hides(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's sum is in no file; runs of fewer than five layers are shown as they are."""
    said = inspected(run, monkeypatch, dissect(decoder("skip_norm", layers=8, dtype="float16", hidden=False)))
    assert said.startswith(
        "8 layers, width 16, float16, sums fused with their norms (ONNX Runtime's skip-norm); "
        "not confirmed: there is no config"
    )
    assert "0 a fused skip-norm layer_0_sum float16 1 to 5 as above as above as above 6 a fused skip-norm" in said
    assert "7 a fused skip-norm inside the fused node that makes layer_7_norm float16" in said
    short = inspected(run, monkeypatch, dissect(decoder("skip_norm", layers=4)))
    assert "as above" not in short and all(f"layer_{number}_sum" in short for number in range(3))


def test_inspect_counts_sums_of_two_kinds(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = dissect(decoder("add", layers=3))
    (stream,) = anatomy.streams
    first = replace(stream.sites[0], kind="skip_norm")
    mixed = replace(anatomy, streams=(replace(stream, sites=(first, *stream.sites[1:])),))
    assert inspected(run, monkeypatch, mixed).startswith(
        "3 layers, width 16, float32, 2 plain sums (Add) and 1 sums fused with their norms (ONNX Runtime's skip-norm);"
    )


def test_inspect_shows_both_branches_of_a_merged_decoder(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = dissect(decoder("add", layers=2))
    branches = [replace(anatomy.streams[0], body=name) for name in ("then_branch", "else_branch")]
    said = inspected(run, monkeypatch, replace(anatomy, streams=tuple(branches)))
    assert "plain sums (Add), the same in 2 branches of an If (then_branch, else_branch);" in said
    assert all(f"{layer} {name} an Add" in said for layer in (0, 1) for name in ("then_branch", "else_branch"))


def test_directions_are_extracted_and_shown(run: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    ran = run("directions", SOURCE, "--anchors", ANCHORS, "-o", path, "--rank", "2")
    assert (ran.code, ran.err) == (0, "")
    found = read_directions(path)
    assert {layer.ssd.shape for layer in found.layers.values()} == {(2, 128)}
    assert f"{LAYERS} layers of width 128, {found.pairs} anchor pairs" in squeezed(ran.out)
    command = f"vlmguard-export {SOURCE} --mode restore --directions {path} --anchors {ANCHORS}"
    assert ran.out.splitlines()[-1] == f"next: {command}" and wrong_usage(command) is None
    told = run("directions", SOURCE, "--anchors", ANCHORS, "-o", path, "--force", "--json").json
    assert told["output"] == str(path) and told["layers"] == list(range(LAYERS)) and told["pairs"] == found.pairs
    assert told["evidence"].keys() == {str(number) for number in range(LAYERS)}


def test_a_config_is_exported_again(run: Callable[..., Ran], guarded: Guarded, tmp_path: Path) -> None:
    config = guarded("restore") / "guard.toml"
    told = run("export", SOURCE, tmp_path / "out", "--config", config, "--json").json
    assert told["decoders"][0]["plan"]["layers"] == vlmguard.verify(guarded("restore")).manifest.plan["layers"]
    assert told["calibration"] is None and told["refusals"]["prompts"] == "calibration.jsonl"
    ran = run("export", SOURCE, tmp_path / "gone", "--config", tmp_path / "gone.toml")
    assert (ran.code, ran.err) == (
        1,
        f"error: {tmp_path / 'gone.toml'}: no such config file; a calibrating export writes one, guard.toml\n",
    )


def test_a_calibration_is_shown_with_its_controls(run: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    ran = run("directions", SOURCE, "--calibrate", "restore", "--rank", "1", "-o", path)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == f"next: vlmguard-export {SOURCE} --config {tmp_path / 'd.toml'}"
    config = (tmp_path / "d.toml").read_text(encoding="utf-8")
    assert 'directions = "d.safetensors"' in config and 'mode = "restore"' in config
    ran = run("export", SOURCE, tmp_path / "out", "--config", tmp_path / "d.toml", "--dry-run")
    assert ran.code == 0 and "plan: restore" in squeezed(ran.out)
    path.unlink()  # the config alone is not overwritten either
    ran = run("directions", SOURCE, "--calibrate", "restore", "-o", path)
    assert (ran.code, ran.err) == (
        1,
        f"error: {tmp_path / 'd.toml'}: exists already; choose another file, or replace it with --force\n",
    )


def test_verify_shows_its_checks(run: Callable[..., Ran], guarded: Guarded) -> None:
    ran = run("verify", guarded("restore"), "--source", SOURCE)
    assert (ran.code, ran.err) == (0, "")
    told = run("verify", guarded("restore"), "--source", SOURCE, "--json").json
    assert told["ok"] is True and len(told["checks"]) == 15
    count = len(told["checks"])
    assert f"PROVED {count}/{count}: {guarded('restore')}: restore on layers" in squeezed(ran.out)
    assert not any(check["name"] in squeezed(ran.out) for check in told["checks"])
    ran = run("verify", guarded("restore"), "--source", SOURCE, "--verbose")
    assert all(shows(ran.out, check["name"]) for check in told["checks"])


def test_a_verification_that_fails_is_shown_and_exits_with_1(
    run: Callable[..., Ran], guarded: Guarded, tmp_path: Path
) -> None:
    """The whole result on stdout, the verdict in one line on stderr."""
    folder = shutil.copytree(guarded("restore"), tmp_path / "g")
    model = onnx.load(folder / DECODER)
    tau = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("/tau"))
    tau.CopyFrom(onnx.numpy_helper.from_array(np.array(9, np.float32), tau.name))
    onnx.save(model, folder / DECODER)
    manifest = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
    manifest["files"][DECODER]["sha256"] = digests(folder)[DECODER]
    (folder / "guard.json").write_text(json.dumps(manifest), encoding="utf-8")
    for options in ([], ["--json"]):
        ran = run("verify", folder, *options)
        assert (ran.code, ran.err) == (
            1,
            f"error: {folder}: the guard is what the manifest's plan and directions make does not hold; export again\n",
        )
    assert json.loads(ran.out)["ok"] is False


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_generate_streams_the_answer_to_stdout(run: Callable[..., Ran], guarded: Guarded, mode: str) -> None:
    vlm = vlmguard.GuardedVLM.open(guarded(mode))
    cases = [([], None), (["--image", PICTURE], PICTURE), (["--blank"], vlm.blank_image())]
    for shown, image in (*cases, (["-i", PICTURE, "-i", PICTURE], [PICTURE, PICTURE])):
        ran = run("generate", guarded(mode), "--prompt", HARMFUL, *shown)
        assert (ran.code, ran.out.strip(), ran.err) == (0, vlm.generate(HARMFUL, image), "")
    sampled = ["--temperature", "2.0", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "9"]
    ran = run("generate", guarded(mode), "-p", HARMFUL, *sampled)
    assert ran.out.strip() == vlm.generate(HARMFUL, None, 9, 2.0, 0.9, 3)


def test_generate_runs_an_unguarded_model_only_when_told_to(run: Callable[..., Ran], guarded: Guarded) -> None:
    answers = [
        run("generate", folder, "-p", HARMFUL, "-i", PICTURE, *more).out
        for folder, more in ((SOURCE, ["--unguarded"]), (guarded("restore"), []))
    ]
    assert answers[0] != answers[1]
    assert run("generate", SOURCE, "-p", HARMFUL) == Ran(
        1, "", f"error: {SOURCE}: has no guard.json, so it is not a guarded folder; export it first\n"
    )
    out = guarded("restore")
    assert run("generate", out, "-p", HARMFUL, "--unguarded") == Ran(
        1, "", f"error: {out}: is guarded (it has a guard.json); give the model that it was made from\n"
    )


def test_an_answer_as_json_has_scores_where_the_model_tells_them(run: Callable[..., Ran], guarded: Guarded) -> None:
    for folder, more in ((SOURCE, ["--unguarded"]), (guarded("restore"), [])):
        said = run("generate", folder, "-p", HARMFUL, *more).out.strip()
        told = run("generate", folder, "-p", HARMFUL, "--json", *more)
        assert (told.code, told.err, told.json) == (0, "", {"answer": said, "scores": None})


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(run: Callable[..., Ran], guarded: Guarded, prompt: str) -> None:
    sentence = "error: the prompt is empty; write something\n"
    assert run("generate", guarded("restore"), "-p", prompt, "--blank") == Ran(1, "", sentence)


def test_a_folder_that_is_none_is_told_apart(run: Callable[..., Ran], guarded: Guarded, tmp_path: Path) -> None:
    nowhere, file = tmp_path / "nowhere", guarded("restore") / "guard.json"
    for command in (["verify"], ["generate", "-p", HARMFUL]):
        for path, why in (
            (nowhere, "no such folder; give one that `vlmguard-export` wrote"),
            (file, "is a file; give the guarded folder that it lies in"),
        ):
            assert run(*command, path) == Ran(1, "", f"error: {path}: {why}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("arguments", [("prompts",), ("inspect", SOURCE, "--json"), ("--help",)])
def test_a_result_that_cannot_be_written_is_told_in_one_line(arguments: tuple[Any, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [Path(sys.executable).with_name("vlmguard"), *map(str, arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the result cannot be written (No space left on device); choose another place for it\n"


def test_generate_turns_knobs_and_shows_scores(run: Callable[..., Ran], guarded: Guarded) -> None:
    out = guarded("runtime_controls")
    asked = ["-p", HARMFUL, "-i", PICTURE]
    unguarded = run("generate", SOURCE, *asked, "--unguarded").out
    assert run("generate", out, *asked, "--threshold-offset", "1e6").out == unguarded
    shown = run("generate", out, *asked, "--scores")
    assert shown.code == 0 and not shown.out.startswith(unguarded.strip())
    assert "gates, held from the prompt" in squeezed(shown.out)
    told = run("generate", out, *asked, "--strength", "0", "--json").json
    assert told["answer"] == unguarded.strip() and told["gate"] == "prompt" and all(map(all, told["opened"]))
    refused = run("generate", out, *asked, "--strength", "-1")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == "error: strength -1.0 is out of range; choose 0 (only watch) to 2, 1 is as calibrated\n"


def test_long_answers_are_not_wrapped(run: Callable[..., Ran], guarded: Guarded) -> None:
    """An answer goes into a file or a pipe as it is, whatever the width of the terminal, markup and emoji codes too."""
    said = "word " * 40 + "[bold]x[/bold] :cat:"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlmguard.GuardedVLM, "stream", lambda *_: iter([said]))
        assert run("generate", guarded("restore"), "-p", HARMFUL).out == said + "\n"


def test_evaluate_counts_refusals(run: Callable[..., Ran], guarded: Guarded, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    some = [row for row in rows if row["setting"] != "image"][::41]  # odd: texts and blank pictures take turns
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    options = [SOURCE, guarded("restore"), "--prompts", path, "--max-new-tokens", "20", "--batch-size", "8"]
    told = run("evaluate", *options, "--json").json
    assert told["schema"] == "vlmguard.evaluation/3" and sum(cell["asked"] for cell in told["cells"]) == len(some)
    ran = run("evaluate", *options)
    assert (ran.code, ran.err) == (0, "")
    sentence = "With an image, harmful requests answered: 100% -> 0%. Harmless requests refused: 0% -> 0%."
    assert told["headline"] == sentence and squeezed(ran.out).startswith(sentence)
    assert "against the text-only model: prompts refused" in squeezed(ran.out)
    assert f"{len(some)} prompts, refusals" in ran.out
    for cell in told["cells"]:
        assert f"{cell['guarded']['refused']}/{cell['asked']} ({cell['guarded']['rate']:.1%})" in ran.out


def test_prompts_shows_formats_and_the_built_in_sets(run: Callable[..., Ran]) -> None:
    ran = run("prompts")
    assert (ran.code, ran.err) == (0, "")
    for name in ("malicious_instruct", "refusal_direction", "builtin:test", "no prompt is in two of them"):
        assert name in squeezed(ran.out).replace(" ", "") or name in squeezed(ran.out)
    told = run("prompts", "--disjoint", "--json").json
    assert [(one["source"], one["harmful"], one["harmless"]) for one in told["sets"]] == [
        ("builtin:extraction", 120, 120),
        ("builtin:calibration", 90, 90),
        ("builtin:test", 90, 90),
    ]
    assert told["overlaps"] == []


def test_prompts_counts_what_two_files_share(run: Callable[..., Ran], tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("How to steal a car?\nHow to [bold]rob[/bold] a bank?\n")
    second.write_text("how to  steal a car\nHow to wash a car\n")
    sources = [f"harmful:{first}", f"harmless:{second}"]
    ran = run("prompts", *sources)
    assert (ran.code, ran.err) == (0, "")
    assert "share 1 prompts, 1 of them harmful in one alone: 'How to steal a car?'" in squeezed(ran.out)
    refused = run("prompts", *sources, "--disjoint")
    assert (refused.code, refused.err) == (
        1,
        f"error: harmful:{first} and harmless:{second} share 1 prompts ('How to steal a car?' is one); take them out of "
        "one of the two\n",
    )
    (shared,) = run("prompts", *sources, "--json").json["overlaps"]
    assert (shared["shared"], shared["conflicting"]) == (1, 1)


def test_report_writes_a_page_and_tells_its_data(run: Callable[..., Ran], guarded: Guarded, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    rows = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    path, page = tmp_path / "p.jsonl", tmp_path / "page.html"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r["setting"] == "text"), encoding="utf-8")
    options = [guarded("restore"), "-o", page, "--prompts", path, "--max-new-tokens", "16", "--max-prompts", "3"]
    told = run("report", *options, "--image", PICTURE, "--json").json
    assert (told["schema"], told["output"], len(told["prompts"])) == ("vlmguard.report/1", str(page), 18)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (
        run("report", *options).err
        == f"error: {page}: exists already; choose another file, or replace it with --force\n"
    )
    ran = run("report", *options, "--force")
    assert (ran.code, ran.err) == (0, "") and str(page) in ran.out
    assert shows(ran.out, "attack success rate 3/3 (100.0%) 0/3 (0.0%)")


VERBS = (
    *("export", "convert", "inspect", "directions"),
    *("verify", "evaluate", "prompts", "report"),
    *("generate", "serve", "playground"),
    *("engine", "package", "sign"),
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Callable[..., Ran], verb: str) -> None:
    for flag in ("-h", "--help"):
        ran = run(verb, flag)
        assert (ran.code, ran.err) == (0, "") and f"Usage: vlmguard {verb}" in ran.out


def test_these_are_all_verbs() -> None:
    assert tuple(command.name for command in cli.app.registered_commands) == VERBS


# ----------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", str(SOURCE), "--frobnicate"], "No such option: --frobnicate"),
        (["export", str(SOURCE), "--alhpa", "3"], "No such option: --alhpa"),  # a typo in alpha would be a hole
        (["export"], "Missing argument 'MODEL'"),
        (["export", str(SOURCE), "--mode", "hope"], "Invalid value for '--mode'"),
        (["export", str(SOURCE), "--positions", "first"], "Invalid value for '--positions'"),
        (["export", str(SOURCE), "--alpha", "much"], "Invalid value for '--alpha'"),
        (["export", str(SOURCE), "--dtype", "int3"], "Invalid value for '--dtype'"),
        (["generate", str(SOURCE)], "Missing option '--prompt'"),
        (["generate", str(SOURCE), "-p", "x", "--blank", "-i", "x.png"], "--blank and --image exclude each other"),
        (["evaluate", str(SOURCE), str(SOURCE), "--answers"], "--answers keeps them in the file of --out; name one"),
        (["generate", str(SOURCE), "-p", "x", "--unguarded", "--scores"], "--unguarded has no gates"),
        (["export", str(SOURCE), "--gate", "never"], "Invalid value for '--gate'"),
        (["guard", str(SOURCE)], "No such command 'guard'"),
        (["export", str(SOURCE), "--estimator", "pca"], "Invalid value for '--estimator'"),
        (["export", str(SOURCE), "--readout", "svm"], "Invalid value for '--readout'"),
        (["export", str(SOURCE), "--config", "g.toml", "--alpha", "2"], "edit it, or leave --alpha out"),
        (["export", str(SOURCE), "--config", "g.toml", "--positions", "last"], "edit it, or leave --positions out"),
    ],
)
def test_wrong_usage_exits_with_2(run: Callable[..., Ran], arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in squeezed(ran.err) and "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ bad input

# Each case prepares files below a folder and gives the command and the sentence that it must be refused with.
Case = tuple[list[Any], str]


def not_onnx(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    path.write_text("hello")
    return (
        ["export", path, "--directions", good],
        f"{path}: is not an ONNX model or is truncated (not a protobuf)",
    )


def truncated(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    content = (SOURCE / DECODER).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return (
        ["export", path, "--directions", good],
        f"{path}: is not an ONNX model or is truncated (not a protobuf)",
    )


def empty_model(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    path.touch()
    return (
        ["inspect", path],
        f"{path}: is not an ONNX model or is truncated (no nodes or no outputs)",
    )


def no_model(root: Path, good: Path) -> Case:
    path = root / "gone.onnx"
    return ["inspect", path], f"{path}: no such file or folder; give a .onnx file or a model folder"


def empty_folder(root: Path, good: Path) -> Case:
    folder = root / "empty"
    folder.mkdir()
    return (
        ["export", folder, "--directions", good],
        f"{folder}: holds no .onnx file and is no checkpoint; give a model file or folder",
    )


def many_graphs(root: Path, good: Path) -> Case:
    for name in ("a.onnx", "b.onnx"):
        shutil.copyfile(SOURCE / "onnx" / "embed_tokens.onnx", root / name)
    return ["inspect", root], f"{root}: holds 2 graphs (a.onnx, b.onnx); name the decoder's file"


def not_a_decoder(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    shutil.copyfile(SOURCE / "onnx" / "embed_tokens.onnx", path)
    return (
        ["export", path, "--directions", good],
        f"{path}: no attention found among 2 values, so there are no decoder layers; is this the decoder graph?",
    )


def a_vision_encoder(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    shutil.copyfile(SOURCE / "onnx" / "vision_encoder.onnx", path)
    attentions = sum(node.op_type == "Softmax" for node in onnx.load(path).graph.node)
    return (
        ["inspect", path],
        f"{path}: {attentions} attention nodes and nodes that mix tokens (Conv) but no embedding lookup or inputs_embeds among "
        "the inputs pixel_values; is this a decoder graph?",
    )


def wrong_width(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(96, [1]))
    return (
        ["export", SOURCE, root / "out", "--directions", path],
        "the directions have width 96, the decoder has 128; were they extracted from another model?",
    )


def layer_that_is_not_there(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--layers", "2,6"],
        "the decoder has no layer 6, only layers 0 to 5; layers count from 0",
    )


def layer_that_is_not_there_to_calibrate(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--anchors", ANCHORS, "--layers", "99"],
        "the decoder has no layer 99, only layers 0 to 5; layers count from 0",
    )


def directions_of_a_deeper_model(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(128, [1, 7]))
    return (
        ["export", SOURCE, root / "out", "--directions", path],
        "the directions are for layer 7, the decoder has layers 0 to 5; were they extracted from another model?",
    )


def layer_without_directions(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(128, [1, 2]))
    return (
        ["export", SOURCE, root / "out", "--directions", path, "--layers", "3"],
        "the directions have no layer 3, only layers 1, 2; extract them for that layer too",
    )


def directions_with_nan(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(128, [1]))
    tensors = load_file(path)
    tensors["layers.1.target"] = np.array([np.nan, 1], np.float32)
    save_file(tensors, path, {"schema": "vlmguard.directions/1", "width": "128", "layers": "1"})
    return (
        ["export", SOURCE, root / "out", "--directions", path],
        f"{path}: layers.1.target holds NaN or infinity; extract the directions again",
    )


def no_directions_file(root: Path, good: Path) -> Case:
    path = root / "gone.safetensors"
    return (
        ["export", SOURCE, root / "out", "--directions", path],
        f"{path}: no such directions file; extract one with `vlmguard directions`",
    )


def directions_of_another_decoder(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(128, [1], model_sha256="0" * 64))
    digest = digests(SOURCE)[DECODER]
    return (
        ["export", SOURCE, root / "out", "--directions", path],
        f"{path}: was extracted from another decoder file (its SHA-256 begins 000000000000, this one's {digest[:12]}); "
        "extract them again, or give them with --directions and --force",
    )


def missing_external_data(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    onnx.save(onnx.load(SOURCE / DECODER), path, save_as_external_data=True, location="model.data", size_threshold=0)
    (root / "model.data").unlink()
    return (
        ["export", path, "--directions", good],
        f"{path}: its external data model.data is missing; put it beside the model",
    )


def truncated_external_data(root: Path, good: Path) -> Case:
    path = root / "model.onnx"
    onnx.save(onnx.load(SOURCE / DECODER), path, save_as_external_data=True, location="model.data", size_threshold=0)
    content = (root / "model.data").read_bytes()
    (root / "model.data").write_bytes(content[:-5])
    last = max(
        (tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer),
        key=lambda tensor: int({e.key: e.value for e in tensor.external_data}.get("offset", "0")),
    )
    return (
        ["export", path, "--directions", good],
        f"{path}: its external data model.data has {len(content) - 5} bytes, {last.name!r} ends at {len(content)}; it is "
        "truncated, copy it again",
    )


def no_tokenizer(root: Path, good: Path) -> Case:
    model = shutil.copytree(SOURCE, root / "model")
    (model / "tokenizer.json").unlink()
    return (
        ["export", model, "--anchors", ANCHORS],
        f"{model}: has no tokenizer.json; copy the tokenizer of the model into this folder",
    )


def no_such_part_of_the_built_in_anchors(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--anchors", "builtin:train"],
        "builtin:train: the built-in prompts have no such part; choose extraction, calibration, test",
    )


def anchors_of_an_unknown_format(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--anchors", "advbanch:behaviors.csv"],
        "advbanch:behaviors.csv: no format is called 'advbanch'; choose one of pairs, labelled, advbench, "
        "malicious_instruct, harmbench, jailbreakbench, xstest, figstep, mm_safetybench, refusal_direction, harmful, "
        "harmless, borderline",
    )


def records_that_are_none(root: Path, good: Path) -> Case:
    path = root / "notes.jsonl"
    path.write_text("hello\n")
    return (
        ["evaluate", SOURCE, good.parent, "--out", path],
        f"{path}: is not a file of evaluation records (vlmguard.evaluation-records/1); choose another --out",
    )


def a_judge_that_is_no_checkpoint(root: Path, good: Path) -> Case:
    return (
        ["evaluate", SOURCE, good.parent, "--judge-model", root],
        f"{root}: is no checkpoint folder (no config.json); give one of a LlamaGuard model",
    )


def a_picture_that_is_not_there(root: Path, good: Path) -> Case:
    path = root / "gone.png"
    return (
        ["evaluate", SOURCE, good.parent, "--prompts", "builtin", "--image", path],
        f"{path}: no such picture; name a file, or a folder of them",
    )


def empty_anchors(root: Path, good: Path) -> Case:
    path = root / "anchors.jsonl"
    path.write_text("\n")
    return (
        ["export", SOURCE, root / "out", "--anchors", path],
        f'{path}: holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}',
    )


def unpaired_anchors(root: Path, good: Path) -> Case:
    path = root / "anchors.jsonl"
    path.write_text('{"harmful": "steal it", "harmless": "wash it"}\n{"harmful": "rob it"}\n')
    return (
        ["directions", SOURCE, "--anchors", path, "-o", root / "d.safetensors"],
        f"{path}: anchor 2 has no harmless prompt; pair each harmful one with one",
    )


def out_below_a_file(root: Path, good: Path) -> Case:
    (root / "file").write_text("x")
    out = root / "file" / "deep" / "out"
    return (
        ["export", SOURCE, out, "--directions", good],
        f"{out}: cannot be written (no permission in {root / 'file'}); choose another OUT",
    )


def out_that_is_a_file(root: Path, good: Path) -> Case:
    out = root / "out"
    out.write_text("x")
    return ["export", SOURCE, out, "--directions", good, "--force"], f"{out}: is a file; choose a folder for OUT"


def out_that_exists(root: Path, good: Path) -> Case:
    out = root / "out"
    out.mkdir()
    return (
        ["export", SOURCE, out, "--directions", good],
        f"{out}: exists already; choose another OUT, or replace it with --force",
    )


def out_that_is_the_model(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, SOURCE, "--directions", good, "--force"],
        f"{SOURCE}: would overwrite or lie inside the model {SOURCE}; choose a folder beside it",
    )


def negative_alpha(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--mode", "steer", "--alpha", "-1"],
        "alpha -1.0 would remove safety or is not a number; choose 0 or more",
    )


def alpha_that_is_no_number(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--alpha", "nan"],
        "alpha nan would remove safety or is not a number; choose 0 or more",
    )


def alpha_where_there_is_none(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--alpha", "2"],
        "mode restore has no strength alpha; leave --alpha out, or choose steer or supervise",
    )


def thresholds_of_another_mode(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--mode", "steer"],
        "the directions' thresholds were calibrated for restore, not for steer; give --tau, or calibrate again with "
        "--anchors",
    )


def layers_that_cannot_be_read(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--layers", "4-2"],
        "layers '4-2' cannot be read; a range runs upward, as in 2-4",
    )


def unknown_lowering(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--lowering", "magic"],
        "lowering 'magic' is unknown; choose one of auto, lowrank, rank1, dense, fold",
    )


def precision_of_a_graph_that_is_there(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--dtype", "fp16"],
        f"--dtype and --opset are for checkpoints, {SOURCE} is ONNX already; leave them out",
    )


def cache_of_a_graph_that_is_there(root: Path, good: Path) -> Case:
    return (
        ["export", SOURCE, root / "out", "--directions", good, "--no-cache"],
        f"--no-cache is for checkpoints, {SOURCE} is ONNX already; leave it out",
    )


def inspected_without_the_cache(root: Path, good: Path) -> Case:
    return ["inspect", SOURCE, "--no-cache"], f"--no-cache is for checkpoints, {SOURCE} is ONNX already; leave it out"


def variant_of_a_checkpoint(root: Path, good: Path) -> Case:
    return (
        ["export", CHECKPOINT, root / "out", "--directions", good, "--variant", "q4"],
        f"--variant q4 is for onnx-community folders, {CHECKPOINT} is a checkpoint; use --dtype",
    )


def layer_without_directions_to_calibrate(root: Path, good: Path) -> Case:
    path = write_directions(root / "d.safetensors", random_directions(128, [1, 2]))
    return (
        ["export", SOURCE, root / "out", "--directions", path, "--anchors", ANCHORS, "--layers", "3"],
        "the directions have no layer 3, only layers 1, 2; extract them for that layer too",
    )


def no_image(root: Path, good: Path) -> Case:
    path = root / "gone.png"
    return (
        ["generate", good.parent, "-p", "x", "-i", path],
        f"{path}: no such image file; name a BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP file",
    )


def no_batch(root: Path, good: Path) -> Case:
    return (
        ["evaluate", SOURCE, good.parent, "--batch-size", "0"],
        "a batch of 0 prompts holds none; choose 1 or more",
    )


def a_checkpoint_is_no_base(root: Path, good: Path) -> Case:
    return (
        ["evaluate", CHECKPOINT, good.parent],
        f"{CHECKPOINT}: is a checkpoint, not ONNX; convert it first with `vlmguard convert`",
    )


def workers_without_a_cluster(root: Path, good: Path) -> Case:
    return (
        ["directions", SOURCE, "-o", root / "d.safetensors", "--ray-workers", "2"],
        "2 workers need a cluster; name it with --ray",
    )


def a_path_that_looks_like_markup(root: Path, good: Path) -> Case:
    path = root / "[red]:cat:[/red] \\[x].onnx"
    return ["inspect", path], f"{path}: no such file or folder; give a .onnx file or a model folder"


CASES = (
    not_onnx,
    truncated,
    empty_model,
    no_model,
    empty_folder,
    many_graphs,
    not_a_decoder,
    a_vision_encoder,
    wrong_width,
    layer_that_is_not_there,
    layer_that_is_not_there_to_calibrate,
    directions_of_a_deeper_model,
    layer_without_directions,
    directions_with_nan,
    no_directions_file,
    directions_of_another_decoder,
    missing_external_data,
    truncated_external_data,
    no_tokenizer,
    no_such_part_of_the_built_in_anchors,
    anchors_of_an_unknown_format,
    records_that_are_none,
    a_judge_that_is_no_checkpoint,
    a_picture_that_is_not_there,
    empty_anchors,
    unpaired_anchors,
    out_below_a_file,
    out_that_is_a_file,
    out_that_exists,
    out_that_is_the_model,
    negative_alpha,
    alpha_that_is_no_number,
    alpha_where_there_is_none,
    thresholds_of_another_mode,
    layers_that_cannot_be_read,
    unknown_lowering,
    layer_without_directions_to_calibrate,
    precision_of_a_graph_that_is_there,
    cache_of_a_graph_that_is_there,
    inspected_without_the_cache,
    variant_of_a_checkpoint,
    no_image,
    no_batch,
    a_checkpoint_is_no_base,
    workers_without_a_cluster,
    a_path_that_looks_like_markup,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_refused_in_one_sentence(
    run: Callable[..., Ran], directions: Path, tmp_path: Path, case: Callable[[Path, Path], Case]
) -> None:
    """The whole sentence, on one line however narrow the terminal, exit code 1, and nothing written anywhere."""
    arguments, sentence = case(tmp_path, directions)
    before = everything(tmp_path), everything(SOURCE), everything(directions.parent)
    ran = run(*arguments)
    assert ran == Ran(1, "", f"error: {sentence}\n")
    assert (everything(tmp_path), everything(SOURCE), everything(directions.parent)) == before


def everything(folder: Path) -> dict[str, str | None]:
    """Files with their digests, and folders, hidden ones too."""
    folders = {str(path.relative_to(folder)): None for path in folder.rglob("*") if path.is_dir()}
    return folders | digests(folder)


def test_a_bug_of_ours_keeps_its_traceback(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the user handed us is put into one line."""
    from vlmguard.exporter import opened_decoder

    def buggy(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(opened_decoder, "inspect", buggy)
    with pytest.raises(AssertionError, match="a bug"):
        cli._run(["inspect", str(SOURCE)])


# --------------------------------------------------------------------------------------------------- the scripts themselves


def script(name: str, *arguments: Any) -> Ran:
    """The installed console script, in a narrow terminal, in a process of its own."""
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        pytest.skip("the package is not installed with its scripts")
    done = subprocess.run(
        [str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "40", "NO_COLOR": "1"},
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_the_scripts_say_what_the_functions_say(tmp_path: Path) -> None:
    assert script("vlmguard", "inspect", SOURCE, "--json").json["model"] == str(SOURCE)
    path = tmp_path / "a model with a name that is longer than the terminal is wide.onnx"
    expected = Ran(1, "", f"error: {path}: no such file or folder; give a .onnx file or a model folder\n")
    assert script("vlmguard", "export", path) == expected
    assert script("vlmguard-export", path) == expected
    wrong = script("vlmguard-export", path, "--frobnicate")
    assert wrong.code == 2 and "Traceback" not in wrong.err
