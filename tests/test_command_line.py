"""What a command checks before it imports anything heavy, and what Ctrl-C reports. No model is opened here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmguard import cli
from vlmguard.commands import check_commands, console
from vlmguard.exporter import usage
from vlmguard.graphs.strict_json import to_strict_json

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers")
PROBE = (
    "import sys\nfrom vlmguard.cli import _run\ntry:\n    _run(sys.argv[1:])\n"
    f"finally:\n    print([name for name in {HEAVY!r} if name in sys.modules])"
)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("verify", folder)`: the exit code, and stderr without frames and line breaks."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli._run([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert isinstance(ended.value.code, int)
        return ended.value.code, " ".join(said.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())

    return command


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """A folder with a manifest's name in it, which is all that the first look needs."""
    folder = tmp_path / "guarded"
    folder.mkdir()
    (folder / "guard.json").write_text("{}")
    return folder


NOWHERE = "no such folder; give one that `vlmguard-export` wrote"
NO_MODEL = "no such file or folder; give a .onnx file or a model folder"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["verify", "GONE"], NOWHERE),
        (["engine", "GONE"], NOWHERE),
        (["package", "GONE", "--genai", "x"], NOWHERE),
        (["sign", "GONE", "--key", "x"], NOWHERE),
        (["generate", "GONE", "-p", "hello"], NOWHERE),
        (["generate", "GONE", "-p", "hello", "--unguarded"], NO_MODEL),
        (["serve", "GONE"], NOWHERE),
        (["report", "GONE"], NOWHERE),
        (["playground", "GONE"], NOWHERE),
        (["evaluate", "GONE", "GONE"], NO_MODEL),
        (["inspect", "GONE"], NO_MODEL),
        (["export", "GONE"], NO_MODEL),
        (["directions", "GONE"], NO_MODEL),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_typo_in_a_path_is_refused_in_one_line(run: Run, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    gone = str(tmp_path / "gone")
    assert run(*(gone if one == "GONE" else one for one in arguments)) == (1, f"error: {gone}: {sentence}")


@pytest.mark.parametrize(
    "arguments", [["verify", "/no/such"], ["inspect", "/no/such"], ["export", "/no/such", "--dry-run"]], ids=" ".join
)
def test_a_typo_in_a_path_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: /no/such: no such")
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "option", "why"),
    [
        (["verify", "G", "--proof-inputs", "gone.npz"], "proof-inputs", "without --run, which runs the models on them"),
        (
            ["export", "G", "--proof", "structure", "--proof-inputs", "x"],
            "proof-inputs",
            "with --proof structure, which runs nothing",
        ),
        (["package", "G", "--genai", "x", "--gpu"], "gpu", "without --triton"),
        (["package", "G", "--onnx-community", "x", "--max-batch", "8"], "max-batch", "without --triton"),
        (["package", "G", "--genai", "x", "--instances", "1"], "instances", "without --triton"),
        (["package", "G", "--genai", "x", "--requests", "4"], "requests", "without --triton"),
        (["directions", "G", "--calibration", "x"], "calibration", "without --calibrate"),
        (["directions", "G", "--readout", "lda"], "readout", "without --calibrate"),
        (["engine", "G", "--print-command", "--force"], "force", "with --print-command, which writes nothing"),
        (
            ["engine", "G", "--backend", "tensorrt_rtx", "--timing-cache", "x"],
            "timing-cache",
            "with --backend tensorrt_rtx, which keeps none",
        ),
        (
            ["engine", "G", "--backend", "tensorrt", "--target-capability", "8.9"],
            "target-capability",
            "with --backend tensorrt, which builds for this machine's GPU",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_wrong_usage(
    run: Run, guarded: Path, arguments: list[str], option: str, why: str
) -> None:
    code, said = run(*(str(guarded) if one == "G" else one for one in arguments))
    assert code == 2 and said.endswith(f"Invalid value: --{option} has no effect {why}; leave it out")


def test_options_that_contradict_each_other_are_wrong_usage(run: Run, guarded: Path) -> None:
    code, said = run("serve", guarded, "--without-key", "--api-key-file", "x")
    assert code == 2 and said.endswith("--without-key and --api-key-file exclude each other")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["export", "M", "--directions", "gone"],
            "gone: no such directions file; extract one with `vlmguard directions`",
        ),
        (["export", "M", "--config", "gone"], "gone: no such config file; a calibrating export writes one, guard.toml"),
        (["export", "M", "--sign", "gone"], "gone: no such key file; give the path of a PEM file"),
        (["export", "M", "--proof-inputs", "gone"], "gone: no such file of proof inputs; write one with numpy.savez"),
        (["verify", "G", "--verify-signature", "gone"], "gone: no such key file; give the path of a PEM file"),
        (
            ["verify", "G", "--run", "--proof-inputs", "gone"],
            "gone: no such file of proof inputs; write one with numpy.savez",
        ),
        (["verify", "G", "--source", "./gone"], "gone: no such file or folder; give a .onnx file or a model folder"),
        (["export", "M", "--directions", "FOLDER"], "is a folder; give a file"),
        (["export", "M", "--config", "FOLDER"], "is a folder; give a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_input_files_are_looked_at_first(
    run: Run, guarded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"")
    places = {"M": "m.onnx", "G": str(guarded), "FOLDER": str(tmp_path)}
    code, said = run(*(places.get(one, one) for one in arguments))
    assert code == 1 and said.endswith(sentence)


def test_a_path_that_the_system_refuses_is_one_line(run: Run) -> None:
    name = "/" + "a" * 300
    assert run("verify", name) == (
        1,
        f"error: {name}: cannot be used (File name too long); check the path and its permissions",
    )


def test_a_folder_for_a_file_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_bytes(b"")
    for output, sentence in (
        ("folder", "is a folder; choose a file"),
        ("old/new", f"cannot be written (no permission in {tmp_path / 'old'}); choose another file"),
    ):
        assert run("directions", "m.onnx", "-o", output, "--force") == (1, f"error: {tmp_path / output}: {sentence}")


# ---------------------------------------------------------------------------------------------------------------- the home


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["verify", "~/gone"], "gone"),
        (["inspect", "~/gone.onnx"], "gone.onnx"),
        (["export", "~/gone", "~/out"], "gone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_tilde_is_the_home_folder_in_every_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], path: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = run(*arguments)
    assert code == 1 and said.startswith(f"error: {tmp_path / path}: no such")


@pytest.mark.parametrize("value", ["~/p.jsonl", "advbench:~/p.jsonl"])
def test_a_tilde_is_the_home_folder_behind_a_format(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = run("prompts", value)
    assert code == 1 and said.startswith(f"error: {tmp_path / 'p.jsonl'}: no such prompts file")


def test_a_tilde_further_on_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("verify", f"{tmp_path}/~/g") == (
        1,
        f"error: {tmp_path}/~/g: has a folder named ~, which a shell would not reach; write the home folder's full path",
    )


# ----------------------------------------------------------------------------------------------------------------- Ctrl-C


def interrupting(*notes: str) -> Callable[..., None]:
    def interrupted(*_: object, **__: object) -> None:
        stop = KeyboardInterrupt()
        for note in notes:
            stop.add_note(note)
        raise stop

    return interrupted


def test_ctrl_c_reports_what_is_kept_and_how_to_go_on(run: Run, guarded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_commands, "require_guarded_folder", interrupting())
    assert run("verify", guarded) == (130, "interrupted: nothing was kept; run the same command again")
    monkeypatch.setattr(check_commands, "require_guarded_folder", interrupting("two are kept", "go on so"))
    assert run("verify", guarded) == (130, "interrupted: two are kept; go on so")


def test_an_interrupt_is_caught_by_no_handler_of_errors() -> None:
    assert not issubclass(usage.Interrupted, Exception)


# ------------------------------------------------------------------------------------------------------------------- JSON


def test_json_on_stdout_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"auc": float("nan"), "worst": float("inf")})
    said = capsys.readouterr().out
    assert json.loads(said, parse_constant=pytest.fail) == {"auc": None, "worst": None}
    assert to_strict_json({"a": 1.0}) == '{"a": 1.0}'
