"""A command within a budget of time and memory: models of strangers that ask for too much of either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import decoder, directions
from onnx import TensorProto, helper, numpy_helper
from random_directions import write_directions
from tiny_vlm_paths import SOURCE

from vlmguard.commands import application
from vlmguard.commands.application import _budget
from vlmguard.exporter import budget
from vlmguard.exporter.budget import DEFAULT_SECONDS, LEAST, LEAST_DEFAULT, free_memory, memory_of
from vlmguard.graphs.errors import GuardError

COMMAND = [sys.executable, "-c", "from vlmguard.cli import main; main()"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def before_logits(folder: Path, nodes: list[onnx.NodeProto], **constants: list[int]) -> list[object]:
    """A decoder that adds `zero`, which the nodes make, to its logits; and the command that guards it."""
    folder.mkdir()
    proto = ir.to_proto(decoder(layers=2))
    logits = proto.graph.output[0].name
    last = next(node for node in proto.graph.node if logits in node.output)
    last.output[list(last.output).index(logits)] = "plain"
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    proto.graph.node.extend([*nodes, helper.make_node("Add", ["plain", "zero"], [logits])])
    onnx.save(proto, folder / "model.onnx")
    found = write_directions(folder / "directions.safetensors", directions((0, 1)))
    asked = ["--directions", found, "--mode", "project", "--proof", "full"]  # the default need not run such a graph
    return ["export", folder / "model.onnx", folder / "out", *asked]


def greedy(folder: Path, numbers: int) -> list[object]:
    """It makes a tensor of so many numbers when it runs."""
    nodes = [
        helper.make_node("ConstantOfShape", ["many"], ["huge"]),
        helper.make_node("ReduceSum", ["huge", "axis"], ["zero"], keepdims=0),
    ]
    return before_logits(folder, nodes, many=[numbers], axis=[0])


def endless(folder: Path, turns: int) -> list[object]:
    """It goes through a loop so often when it runs: native code, which no Python signal reaches."""
    given = [
        helper.make_tensor_value_info(name, kind, ())
        for name, kind in (("turn", TensorProto.INT64), ("going", TensorProto.BOOL), ("before", TensorProto.FLOAT))
    ]
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Identity", ["before"], ["after"])],
        "body",
        given,
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, ()),
        ],
    )
    nodes = [
        helper.make_node("Squeeze", ["turns"], ["many"]),
        helper.make_node("Cast", ["nothing"], ["first"], to=TensorProto.FLOAT),
        helper.make_node("Squeeze", ["first"], ["start"]),
        helper.make_node("Loop", ["many", "", "start"], ["zero"], body=body),
    ]
    return before_logits(folder, nodes, turns=[turns], nothing=[0])


def test_sizes() -> None:
    assert memory_of("4G") == memory_of("4GiB") == memory_of("4096m") == 4 << 30
    assert memory_of("0") == memory_of("0G") == 0
    assert memory_of("1.5g") == 3 << 29 and memory_of(str(LEAST)) == LEAST
    for text, sentence in (
        ("lots", "--max-memory lots: is no size; write 4G or 512M, or 0 for no limit"),
        ("-4G", "--max-memory -4G: is no size; write 4G or 512M, or 0 for no limit"),
        ("9" * 400, f"--max-memory {'9' * 40}: is no size; write 4G or 512M, or 0 for no limit"),
        (
            "999999999999T",
            "--max-memory 999999999999T: is more than any machine has; write 4G or 512M, or 0 for no limit",
        ),
        ("100M", "--max-memory 100M: nothing runs in less than 512M; allow more"),
    ):
        with pytest.raises(GuardError) as told:
            memory_of(text)
        assert str(told.value) == sentence


@pytest.mark.parametrize(
    "option", [("--max-memory", "999999999999T"), ("--max-seconds", "nan"), ("--max-seconds", "inf")]
)
def test_a_limit_that_is_none_is_wrong_usage(option: tuple[str, str]) -> None:
    asked = run(*option, "inspect", "nowhere")
    assert asked.returncode == 2 and "Traceback" not in asked.stderr and "Usage: " in asked.stderr


def test_commands_that_open_untrusted_models_have_a_budget_unless_it_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "free_memory", lambda: 5 << 30)
    assert {name: _budget(name, None, None) for name in DEFAULT_SECONDS} == {
        "inspect": (600, 5 << 30),
        "verify": (14400, 5 << 30),
        "export": (86400, 5 << 30),
    }
    assert _budget("serve", None, None) == (None, None)
    assert _budget("export", 0, "0") == (None, None)
    assert _budget("export", 7, None) == (7, 5 << 30) and _budget("export", None, "1G") == (
        86400,
        1 << 30,
    )
    monkeypatch.setattr(application, "free_memory", lambda: None)
    assert _budget("verify", None, None) == (14400, None)


def test_the_default_budget_is_no_more_than_the_machine_has() -> None:
    free = free_memory()
    if sys.platform == "linux":
        assert free is not None and free >= LEAST_DEFAULT
        total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
        assert free <= max(LEAST_DEFAULT, 2 * total)


def test_what_the_default_budget_runs_is_the_same_command() -> None:
    lifted = run("inspect", SOURCE, "--json")
    default = run("inspect", SOURCE, "--json", VLMGUARD_MAX_SECONDS="", VLMGUARD_MAX_MEMORY="")
    assert (default.returncode, default.stdout, default.stderr) == (0, lifted.stdout, lifted.stderr)
    refused = run("inspect", "nowhere", VLMGUARD_MAX_SECONDS="", VLMGUARD_MAX_MEMORY="")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_nothing_in_the_current_folder_is_imported(tmp_path: Path) -> None:
    """Users go to the folder of a model that they look at, and it may hold a `typer.py`."""
    for name in ("typer", "rich", "numpy", "onnx"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    command = [sys.executable, "-P", *COMMAND[1:], "--max-seconds", "100", "inspect", "nowhere"]
    asked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 1 and asked.stderr.startswith("error: ") and not (tmp_path / "imported").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_parent_that_is_killed_takes_the_command_along(tmp_path: Path) -> None:
    started = subprocess.Popen([*COMMAND, "--max-seconds", "300", *map(str, endless(tmp_path / "endless", 1 << 50))])
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while not children.read_text().split():
        time.sleep(0.05)
    (child,) = children.read_text().split()
    started.kill()
    started.wait(30)
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        time.sleep(0.1)


def test_a_command_that_stays_within_it_is_the_same_command() -> None:
    plain = run("inspect", SOURCE, "--json")
    for asked in (
        run("--max-seconds", 100, "--max-memory", "4G", "inspect", SOURCE, "--json"),
        run("inspect", SOURCE, "--json", VLMGUARD_MAX_SECONDS="100", VLMGUARD_MAX_MEMORY="4G"),
    ):
        assert (asked.returncode, asked.stdout, asked.stderr) == (0, plain.stdout, plain.stderr)
    assert json.loads(plain.stdout)
    assert run("--max-seconds", 100, "inspect", "nowhere").returncode == 1
    assert run("--max-seconds", 100, "inspect", "--nonsense").returncode == 2


def test_a_graph_that_never_ends_is_stopped(tmp_path: Path) -> None:
    assert run("--max-seconds", 100, *endless(tmp_path / "modest", 100)).returncode == 0
    model = tmp_path / "endless"
    asked = run("--max-seconds", 4, *endless(model, 1 << 50))
    assert (asked.returncode, asked.stderr.splitlines()) == (
        1,
        ["error: time is up: it took more than the 4 s of --max-seconds; allow more"],
    )
    assert sorted(path.name for path in model.iterdir()) == ["directions.safetensors", "model.onnx"]


def test_a_graph_that_wants_too_much_memory_is_refused(tmp_path: Path) -> None:
    modest = greedy(tmp_path / "modest", 1 << 10)
    assert run("--max-memory", "2G", *modest).returncode == 0
    model = tmp_path / "greedy"
    asked = run("--max-memory", "2G", *greedy(model, 1 << 30))
    assert asked.returncode == 1 and len(asked.stderr.strip().splitlines()) == 1, asked.stderr
    assert asked.stderr.startswith("error: ")
    assert sorted(path.name for path in model.iterdir()) == ["directions.safetensors", "model.onnx"]


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_who_ends_the_command_ends_what_it_waits_for(tmp_path: Path) -> None:
    model = tmp_path / "endless"
    started = subprocess.Popen([*COMMAND, "--max-seconds", "300", *map(str, endless(model, 1 << 50))])
    wait_until_it_computes(started.pid)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGQUIT", "SIGKILL", "SIGABRT"])
def test_a_signal_that_is_sent_is_not_taken_for_a_lack_of_memory(sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = signal.Signals[sent]

    def ended(child: subprocess.Popen[bytes], _: float | None) -> int:
        child.send_signal(number)
        return child.wait()

    monkeypatch.setattr(budget, "_awaited", ended)
    if sent in ("SIGTERM", "SIGQUIT"):
        assert budget.run_within(["inspect", "missing"], None, 8 << 30) == 128 + number
    else:
        with pytest.raises(GuardError) as refusal:
            budget.run_within(["inspect", "missing"], None, 8 << 30)
        assert (
            str(refusal.value)
            == f"the command needs more memory than the 8.0G of --max-memory (ended by {sent}); allow more"
        )


def wait_until_it_computes(parent: int) -> None:
    """Until the command, a child, has spent more processor time than it needs before its model runs."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            if int(fields[11]) / os.sysconf("SC_CLK_TCK") > 8:  # user time
                return
        time.sleep(0.1)
    raise AssertionError("the command does not compute")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_command_in_native_code_is_ended_by_ctrl_c(tmp_path: Path) -> None:
    """The terminal interrupts both processes; the one in native code does not notice, and is killed after some seconds."""
    model = tmp_path / "endless"
    command = [*COMMAND, "--max-seconds", "300", *map(str, endless(model, 1 << 50))]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until_it_computes(started.pid)
    os.killpg(started.pid, signal.SIGINT)
    told = started.communicate(timeout=60)[1]
    assert (started.returncode, told.splitlines()[-1]) == (130, "interrupted")
