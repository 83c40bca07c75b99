"""The commands that export, directions and evaluate print to go on with: the program accepts each of them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from shell_lines import wrong_usage

from vlmguard.exporter import render
from vlmguard.graphs.proof.structure import Check


def accepted(command: str) -> str:
    assert [wrong_usage(part) for part in command.split(" && ")] == [None] * len(command.split(" && "))
    return command


def exported(out: Path, level: str = "full", tokenizer: bool = True) -> Any:
    out.mkdir()
    if tokenizer:
        (out / "tokenizer.json").write_text("{}")
    return SimpleNamespace(out=out, proved=SimpleNamespace(level=level))


def test_after_an_export_the_guard_is_evaluated(tmp_path: Path) -> None:
    out = tmp_path / "my guarded"
    command = render.next_after_export(exported(out), "my model.onnx")
    assert accepted(command) == f"vlmguard evaluate 'my model.onnx' '{out}'"


def test_a_checkpoint_is_converted_first(tmp_path: Path) -> None:
    checkpoint = tmp_path / "llava"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    command = render.next_after_export(exported(tmp_path / "out"), str(checkpoint), ["--dtype", "fp16"])
    assert accepted(command) == (
        f"vlmguard convert {checkpoint} llava-onnx --dtype fp16 && vlmguard evaluate llava-onnx {tmp_path / 'out'}"
    )


def test_a_model_that_cannot_be_asked_is_verified(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = render.next_after_export(exported(out, tokenizer=False), "m.onnx")
    assert accepted(command) == f"vlmguard verify {out} --source m.onnx"


def test_a_guard_that_was_not_run_is_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = render.next_after_export(exported(out, "structure"), "m.onnx")
    assert accepted(command) == f"vlmguard verify {out} --run --source m.onnx"


def test_after_directions_the_model_is_guarded_along_them() -> None:
    plain = render.next_after_directions("m", Path("d.safetensors"), False, None, "q4")
    assert (
        accepted(plain) == "vlmguard-export m --mode restore --directions d.safetensors --anchors builtin --variant q4"
    )
    calibrated = render.next_after_directions("m", Path("d.safetensors"), True, ["a.jsonl"], None)
    assert accepted(calibrated) == "vlmguard-export m --config d.toml"


@pytest.mark.parametrize(("found", "verb"), [(object(), "report"), (None, "verify")])
def test_after_an_evaluation_comes_the_page(monkeypatch: pytest.MonkeyPatch, found: object, verb: str) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: found)
    command = render.next_after_evaluation(Path("base"), Path("guarded"))
    assert accepted(command) == f"vlmguard {verb} guarded --source base"


def shown(checks: list[Check], verbose: bool = False) -> str:
    console = Console(width=100, file=io.StringIO())
    render.show_proof(console, checks, "decoder.onnx", verbose)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_proof_is_one_line_unless_a_check_fails_or_the_rows_are_wanted() -> None:
    checks = [Check("first", 3, 0.0, 1e-6, True), Check("second", 4, 0.5, 1e-6, True, "a note")]
    assert shown(checks) == "PROVED 2/2: decoder.onnx (-v shows each check)\n"
    assert "first" in shown(checks, verbose=True) and "a note" in shown(checks, verbose=True)
    broken = shown([*checks, Check("third", 1, 1.0, 1e-6, False)])
    assert broken.endswith("NOT PROVED 2/3: decoder.onnx\n") and "third" in broken
    assert shown([]).endswith("NOT PROVED 0/0: decoder.onnx\n")


def test_an_export_ends_with_its_proof_the_folder_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command around an export that is not made: `test_cli.py` makes one."""
    from vlmguard import cli
    from vlmguard.commands import console
    from vlmguard.exporter import pipeline

    model, out = tmp_path / "m.onnx", tmp_path / "out"
    model.write_bytes(b"")
    asked: dict[str, Any] = {}
    parity = (Check("logits", 7, 1e-6, 1e-4, True), Check("cache", 3, 2e-5, 1e-4, True))
    decoder = SimpleNamespace(path="decoder.onnx", proof=(Check("first", 3, 0.0, 1e-6, True),))
    proved = SimpleNamespace(level="full", why="it fits")
    result = SimpleNamespace(
        **vars(exported(out))
        | {"proved": proved, "plan": None, "found": {}, "calibration": None, "refusals": None, "variants": ()},
        written=True,
        decoders=(decoder,),
        parity=parity,
    )
    monkeypatch.setattr(pipeline, "export", lambda model, out, options, **_: asked.update(vars(options)) or result)
    monkeypatch.setattr(render, "show_plan", lambda *_: None)
    monkeypatch.setattr(console, "out", Console(width=400))
    with pytest.raises(SystemExit) as ended:
        cli._run(["export", str(model), str(out), "--mode", "steer", "--positions", "all", "--no-cache"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "torch against ONNX: 2.0e-05 of the largest value at most (cache), allowed 1e-04; 10 values compared",
        "PROVED 1/1: decoder.onnx (-v shows each check)",
        "proof: full, it fits",
        f"guarded: {out}",
        f"next: vlmguard evaluate {model} {out}",
    ]
    assert (asked["spec"].mode, asked["spec"].positions, asked["cache"]) == ("steer", "all", False)
