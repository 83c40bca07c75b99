"""A run over a Ray cluster: the same to the bit as in one process, also when a worker is killed in the middle of a batch."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_vlm_paths import ANCHORS, EVALUATION, PROMPTS, SOURCE, Guarded

from vlmguard.exporter import cluster as cluster_module
from vlmguard.exporter.cluster import cluster, open_executors
from vlmguard.exporter.evaluation import evaluate as evaluate_module
from vlmguard.exporter.evaluation.evaluate import compare
from vlmguard.exporter.executors import ExecutorFactory, PinnedSpec, local_executors, versions, when_needed
from vlmguard.exporter.extract_directions import extract_directions
from vlmguard.graphs.errors import ExtraMissing, GuardError, ModelUnreadable, PromptsUnusable
from vlmguard.graphs.extras import install_command

pytest_plugins = ("tiny_vlm_fixtures",)
pytestmark = pytest.mark.usefixtures("bundled_pictures")

WHERE = f"worker on {platform.node()}"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights")
    return path


# ---------------------------------------------------------------------------------------------------------- without a cluster


def test_without_an_address_everything_is_done_here(weights: Path) -> None:
    from ray_worker_specs import Numbers

    with open_executors(None) as executors:
        assert executors is local_executors
        assert list(executors(Numbers(weights))(lambda n: n + 1, [1, 2])) == [2, 3]
    with pytest.raises(GuardError, match=re.escape("2 workers need a cluster; name it with --ray")):
        open_executors(None, 2)


def test_what_is_not_needed_is_not_opened() -> None:
    opened = []

    class WorkerSpec:
        def files(self) -> list[Path]:
            return []

        def open(self):
            opened.append(1)
            return lambda shard: shard + 1

    work = when_needed(WorkerSpec())
    assert opened == []
    assert [work(1), work(2)] == [2, 3] and opened == [1]


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing) as caught:
        extract_directions(SOURCE, tmp_path / "d.safetensors", ray="auto")
    assert str(caught.value) == (
        f"distributing a run over a cluster needs ray, which is not installed; run: {install_command('ray')}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_another_file_or_library_is_refused(weights: Path) -> None:
    from ray_worker_specs import Numbers

    pinned = PinnedSpec.of(Numbers(weights))
    assert pinned.open()(1)[0] == 1
    other = PinnedSpec(pinned.worker_spec, pinned.digests, versions() | {"numpy": "0.9"})
    with pytest.raises(ModelUnreadable) as caught:
        other.open()
    assert str(caught.value) == (f"{WHERE}: has numpy {versions()['numpy']}, the run began with 0.9; install the same")
    weights.unlink()
    with pytest.raises(ModelUnreadable) as caught:
        pinned.open()
    assert str(caught.value) == f"{WHERE}: {weights} is not there; put the models at the same path on every machine"


# ------------------------------------------------------------------------------------------------------------- on a cluster
# Ray's processes take half a minute to start, and give up on a busy machine: `make long` runs these.


@pytest.fixture(scope="module")
def two_workers() -> Iterator[ExecutorFactory]:
    """A cluster of this machine, started as `--ray local` starts it; runs within find it and do not stop it."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
    paths = [
        str(Path(__file__).parents[1]),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]  # workers import `ray_worker_specs`
    settings = {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray puts one into the user's home
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with contextlib.ExitStack() as stack:
            for attempt in range(3):
                try:
                    executors = stack.enter_context(cluster("local", workers=2))
                    break
                except GuardError:  # Ray gives its processes 15 seconds to come up, whatever else the machine has to do
                    if attempt == 2:
                        raise
            yield executors
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def one_worker(two_workers: ExecutorFactory) -> Iterator[ExecutorFactory]:
    """On the same cluster, for what takes no more: a process of Ray's takes a second to start."""
    with cluster("local", workers=1) as executors:
        yield executors


@pytest.mark.long
def test_results_come_in_order_from_both_workers(two_workers: ExecutorFactory, weights: Path) -> None:
    from ray_worker_specs import Numbers

    executor = two_workers(Numbers(weights))
    found = list(executor(lambda _: pytest.fail("this process has no part in it"), range(20)))
    assert [number for number, _ in found] == list(range(20))
    pids = {pid for _, pid in found}
    assert len(pids) == 2 and os.getpid() not in pids
    assert list(executor(print, [])) == []


@pytest.mark.long
def test_a_worker_refuses_a_file_that_was_changed(one_worker: ExecutorFactory, weights: Path) -> None:
    from ray_worker_specs import Numbers

    executor = one_worker(Numbers(weights))
    weights.write_bytes(b"WEIGHTS")
    with pytest.raises(ModelUnreadable) as caught:
        list(executor(print, [1]))
    assert str(caught.value) == (
        f"{WHERE}: {weights} is another file (its SHA-256 begins 14422b042349, where the run began it begins "
        "9a129038d9a0); copy the model there again"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (100, PromptsUnusable, r"100 is too much; choose less"),
        (101, ZeroDivisionError, r"a bug"),
        (
            102,
            GuardError,
            r"3 workers were lost while they did batch 3 \(.*\); is there enough memory on the machines of ",
        ),
    ],
)
def test_work_that_fails_ends_the_run(
    one_worker: ExecutorFactory, weights: Path, number: int, error: type[Exception], words: str
) -> None:
    """A refusal is the same sentence as here, a bug has its traceback, and a batch that kills its workers is given up."""
    from ray_worker_specs import Numbers

    with pytest.raises(error, match=words):
        list(one_worker(Numbers(weights))(print, [1, 2, number, 3]))


@pytest.mark.long
@pytest.mark.usefixtures("two_workers")
def test_states_are_the_same_to_the_bit(tmp_path: Path, raw_directions: Path) -> None:
    output, told = tmp_path / "d.safetensors", []
    extract_directions(
        SOURCE, output, anchors=ANCHORS, ray="auto", ray_workers=2, report_progress=lambda *e: told.append(e)
    )
    assert output.read_bytes() == raw_directions.read_bytes()
    assert told == [("extracting directions", done, 192) for done in range(16, 193, 16)]
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.long
@pytest.mark.usefixtures("two_workers")
def test_a_killed_workers_batch_is_redone(guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings; the file of records and every figure are those of the run in this process."""
    from ray_worker_specs import Mortal

    rows = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    kinds = [(setting, label) for setting in ("text", "blank", "image") for label in ("harmful", "harmless")]
    some = [row for kind in kinds for row in [r for r in rows if (r["setting"], r["label"]) == kind][7:11]]
    some = [row | ({"image": str(PROMPTS / row["image"])} if row.get("image") else {}) for row in some]
    prompts = tmp_path / "some.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    here_file, there_file = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    local = compare(SOURCE, guarded("restore"), prompts, 20, 4, out=here_file, keep_answers=True)

    killed: list[int] = []

    def kill() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        killed.append(int((tmp_path / "pid").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    monkeypatch.setattr(evaluate_module, "AskBoth", functools.partial(Mortal, folder=tmp_path))
    told: list[tuple[str, int, int]] = []
    distributed = compare(
        SOURCE,
        guarded("restore"),
        prompts,
        20,
        4,
        out=there_file,
        keep_answers=True,
        ray="auto",
        ray_workers=2,
        report_progress=lambda *event: told.append(event),
    )
    killer.join(60)
    assert killed and killed[0] != os.getpid()
    assert there_file.read_bytes() == here_file.read_bytes()
    assert distributed == local and distributed.to_json() == local.to_json()
    assert told == [("asking both models", done, 48) for done in range(8, 49, 8)]

    # What a run kept is not asked again, whoever asked it: half of the file is enough to go on with.
    lines = here_file.read_bytes().splitlines(keepends=True)
    there_file.write_bytes(b"".join(lines[:13]))
    resumed = compare(SOURCE, guarded("restore"), prompts, 20, 4, out=there_file, keep_answers=True, ray="auto")
    assert there_file.read_bytes() == here_file.read_bytes() and resumed.to_json() == local.to_json()
