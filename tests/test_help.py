"""`--help` of every command at three widths: nothing is cut, switches have no type, panels and examples are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from shell_lines import wrong_usage

from vlmguard import cli
from vlmguard.commands import application
from vlmguard.exporter import choices
from vlmguard.exporter.checkpoints.exporters import EXPORTERS
from vlmguard.exporter.extraction.estimators import ESTIMATORS, READOUTS
from vlmguard.graphs.modes import MODES

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = GROUP.commands
PANELS = {
    "export": ["Arguments", "What", "Data", "Precision", "Runtime controls", "Proof", "Output", "Other", "Examples"],
    "directions": ["Arguments", "What", "Data", "Precision", "Output", "Cluster", "Other", "Examples"],
    "generate": ["Arguments", "What", "Limits", "Runtime controls", "Output", "Other", "Examples"],
}


def program(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    main = "main_export" if name == "vlmguard-export" else "main"
    code = f"import sys; sys.argv[0] = {name!r}; from vlmguard.cli import {main}; {main}()"
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env | environment)


def vlmguard(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return program("vlmguard", *arguments, **environment)


def page(name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as ended:
        cli._run([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "vlmguard")
def test_help_is_whole_at_every_width(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(name, width, capsys, monkeypatch)
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert "…" not in text and "\x1b" not in text
    command = COMMANDS[name] if name else GROUP
    assert words(text).startswith(f"Usage: vlmguard {name}".strip() + " [OPTIONS]")
    shown = words(text)
    assert words(command.help) in shown
    for param in command.params:
        assert words(param.help) in shown and all(option in shown for option in param.opts if option.startswith("-"))
        for choice in (param.metavar or "").split("|"):
            assert choice in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_switches_show_no_type(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = page(name, 120, capsys, monkeypatch)
    for param in COMMANDS[name].params:
        if param.param_type_name == "option" and param.is_flag:
            names = ", ".join(param.opts) + "".join(f" / {other}" for other in param.secondary_opts)
            assert re.search(rf"^  {re.escape(names)}(  |$)", text, re.MULTILINE), names
        elif param.param_type_name == "option":
            assert param.metavar, f"{param.name} shows no value"


@pytest.mark.parametrize("name", PANELS)
def test_options_stand_in_panels(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(name, 80, capsys, monkeypatch)
    assert re.findall(r"^[A-Z][a-z ]+$", text, re.MULTILINE) == PANELS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_panel(name: str) -> None:
    options = [param for param in COMMANDS[name].params if param.param_type_name == "option"]
    assert [param.name for param in options if param.name != "help" and not param.rich_help_panel] == []
    assert COMMANDS[name].rich_help_panel in application.PANELS


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "vlmguard")
def test_three_examples_that_the_program_accepts(name: str) -> None:
    examples = (COMMANDS[name] if name else GROUP).epilog.splitlines()
    assert len(examples) == 3
    ours = [example for example in examples if example.startswith("vlmguard")]
    assert any(f"{name}" in example for example in ours)
    assert [wrong_usage(example) for example in ours] == [None] * len(ours)


def test_a_wrong_example_would_be_seen() -> None:
    assert wrong_usage("vlmguard frobnicate x") == "No such command 'frobnicate'."
    assert "No such option: --frob" in (wrong_usage("vlmguard inspect x --frob") or "")
    assert "is not one of" in (wrong_usage("vlmguard export x --mode magic") or "")
    assert wrong_usage("vlmguard evaluate x") is not None


def test_an_option_is_explained_by_a_phrase_that_stands_alone() -> None:
    """A capital letter and a full stop; no phrase that goes on with the option's name ("Of the sampling.")."""
    for name, command in COMMANDS.items():
        for param in command.params:
            text = re.sub(r"( \((default|extra|needs)[^()]*(\([^()]*\)[^()]*)*\))+$", "", words(param.help))
            assert text.endswith("."), (name, param.name, text)
            assert not re.match(r"(Of|Who|Whom|Whose|Added|By) ", text), (name, param.name, text)


def test_the_choices_are_those_of_the_tables() -> None:
    assert get_args(choices.WantedMode) == ("auto", *MODES)
    assert set(get_args(choices.EstimatorName)) == set(ESTIMATORS)
    assert set(get_args(choices.ReadoutName)) == set(READOUTS)
    assert get_args(choices.ExporterName) == tuple(EXPORTERS)
    dtypes = {dtype for row in EXPORTERS.values() for dtype in row.dtypes}
    assert set(get_args(choices.Precision)) == dtypes


def test_the_program_has_the_name_that_was_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vlmguard-export", "--help"])
    with pytest.raises(SystemExit):
        cli.main_export()
    assert capsys.readouterr().out.startswith("Usage: vlmguard-export [OPTIONS] MODEL [OUT]\n")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vlmguard-export", "model", "--frob"])
    monkeypatch.setenv("VLMGUARD_WITHIN_BUDGET", "")  # the command itself, not the process that waits for it
    monkeypatch.setenv("VLMGUARD_BUDGET_PARENT", str(os.getppid()))
    with pytest.raises(SystemExit) as ended:
        cli.main_export()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("Usage: vlmguard-export [OPTIONS] MODEL [OUT]\nTry 'vlmguard-export -h' for help.\n")


# ------------------------------------------------------------------------------------------------- colours, pipes, completion


def test_colours_are_for_terminals_alone() -> None:
    assert "\x1b" not in vlmguard("--help").stdout
    assert "\x1b" not in vlmguard("inspect", "/no/such").stderr


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are of POSIX")
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_honoured_on_a_terminal(no_color: str, coloured: bool) -> None:
    import pty

    code = "import sys; sys.argv[0] = 'vlmguard'; from vlmguard.cli import main; main()"
    reader, writer = pty.openpty()
    env = os.environ | {"NO_COLOR": no_color, "TERM": "xterm", "COLUMNS": "80"}
    running = subprocess.Popen([sys.executable, "-c", code, "inspect", "--help"], stdout=writer, env=env)
    os.close(writer)
    said = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        said += piece
    os.close(reader)
    assert running.wait(timeout=60) == 0
    assert b"Usage" in said and (b"\x1b[" in said) is coloured


@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE is of POSIX")
@pytest.mark.parametrize(
    "arguments", [["prompts"], ["prompts", "--json"], ["export", "--help"], ["--version"]], ids=" ".join
)
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; sys.argv[0] = 'vlmguard'; from vlmguard.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_shell_completes_commands_options_and_their_values() -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        asked[f"_{words[0].replace('-', '_').upper()}_COMPLETE"] = "complete_bash"
        return program(words[0], **asked).stdout.split()

    assert completed("vlmguard ev") == ["evaluate"]
    assert completed("vlmguard export --mode re") == ["restore"]
    assert "--telemetry" in completed("vlmguard export --tel")
    assert completed("vlmguard-export --mode re") == ["restore"]
    assert completed("vlmguard-export --tel") == ["--telemetry"]


@pytest.mark.parametrize("name", ["vlmguard", "vlmguard-export"])
def test_completion_is_installed_for_both_programs(name: str, tmp_path: Path) -> None:
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}  # the shell is given
    done = program(name, "--install-completion", "bash", **named)
    assert (done.returncode, done.stderr) == (0, "")
    scripts = sorted((tmp_path / ".bash_completions").iterdir())
    assert [path.name for path in scripts] == ["vlmguard-export.sh", "vlmguard.sh"]
    sourced = (tmp_path / ".bashrc").read_text()
    for path, variable in zip(scripts, ("_VLMGUARD_EXPORT_COMPLETE", "_VLMGUARD_COMPLETE"), strict=True):
        assert f"{variable}=complete_bash" in path.read_text() and str(path) in sourced
    shown = program(name, "--show-completion", "bash", **named)
    assert (shown.returncode, shown.stdout) == (0, (tmp_path / ".bash_completions" / f"{name}.sh").read_text() + "\n")
    assert program(name, "--install-completion", "csh", **named).returncode == 2


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "typer.rich_utils")
    code = (
        "import sys\nfrom vlmguard.cli import _run\ntry:\n    _run(['export', '--help'])\n"
        f"finally:\n    print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")
