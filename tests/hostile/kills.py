"""kill -9 at random moments of export, extraction, evaluation and engine building.

    python tests/hostile/kills.py --kills 200     # a part of `make soak`; prints the counts

After each kill the inputs are byte for byte what they were, and what was to be written is absent or complete. After the last
one the same command runs to its end: it finishes, sweeps up what was left, and gives what a run that nobody killed gives.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.process import command, prepare
from hostile.told import tell
from small_guarded import sha256
from tiny_vlm_paths import ANCHORS, EVALUATION, SOURCE, digests

ENOUGH = 600.0  # seconds; for commands that nobody kills


@dataclass(frozen=True)
class Job:
    """A command that writes something.

    Attributes:
        arguments: of the command.
        out: what it writes.
        whole: raises unless what was written is complete.
        same: what must be equal however often a run was killed.
        partial: it may be there unfinished, and is gone on with.
    """

    name: str
    arguments: list[str]
    out: Path
    whole: Callable[[Path], None]
    same: Callable[[Path], object]
    partial: bool = False


@dataclass
class Counts:
    """What became of the kills of one job."""

    killed: int = 0
    finished_first: int = 0
    left: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def jobs(folder: Path, engines: bool) -> list[Job]:
    """Each in a folder of its own; the guarded model that some need is made here."""
    guarded = folder / "guarded-model"
    directions = folder / "d.safetensors"
    _must(["directions", str(SOURCE), "--anchors", str(ANCHORS), "-o", str(directions)])
    _must(["export", str(SOURCE), str(guarded), "--directions", str(directions), "--mode", "steer", "--tau", "0"])
    prompts = few_prompts(folder)
    (folder / "work").mkdir()
    made = [
        Job(
            "export",
            ["export", str(SOURCE), "OUT", "--directions", str(directions), "--mode", "steer", "--tau", "0"],
            folder / "work" / "export" / "out",
            lambda out: _must(["verify", str(out), "--source", str(SOURCE)]),
            lambda out: {n: d for n, d in digests(out).items() if n != "guard.json"},
        ),
        Job(
            "directions",
            ["directions", str(SOURCE), "--anchors", str(ANCHORS), "-o", "OUT"],
            folder / "work" / "directions" / "out.safetensors",
            lambda out: _must(["inspect", str(SOURCE)]),
            sha256,
        ),
        Job(
            "evaluate",
            [
                "evaluate",
                str(SOURCE),
                str(guarded),
                "--prompts",
                str(prompts),
                "--max-new-tokens",
                "12",
                "--batch-size",
                "4",
                "--out",
                "OUT",
            ],
            folder / "work" / "evaluate" / "records.jsonl",
            lambda out: None,
            lambda out: sorted(out.read_text(encoding="utf-8").splitlines()[1:]),
            partial=True,
        ),
    ]
    if engines:
        made.append(
            Job(
                "engine",
                ["engine", str(guarded), "OUT", "--backend", "tensorrt_rtx"],
                folder / "work" / "engine" / "out",
                lambda out: _must(["verify", str(out)]),
                lambda out: sorted(path.name for path in out.rglob("*") if path.is_file()),
            )
        )
    return made


def few_prompts(folder: Path) -> Path:
    """Of the tiny VLM's own, without pictures."""
    rows = [
        line for line in EVALUATION.read_text(encoding="utf-8").splitlines() if json.loads(line)["setting"] != "image"
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(rows[::20]) + "\n", encoding="utf-8")
    return prompts


def kill(job: Job, times: int, pick: random.Random, inputs: Callable[[], object]) -> Counts:
    """Kill a job again and again, then let it finish."""
    counts, before = Counts(), inputs()
    arguments = [str(job.out) if part == "OUT" else part for part in job.arguments]
    untouched = job.out.parent / f"nobody-killed-{job.out.name}"
    job.out.parent.mkdir()
    whole_run = command([str(untouched) if part == "OUT" else part for part in job.arguments], ENOUGH)
    assert whole_run.code == 0, whole_run.said
    expected = job.same(untouched)
    _remove(untouched)
    while counts.killed < times:
        ended = command(arguments, pick.uniform(0, whole_run.seconds))
        if inputs() != before:
            counts.findings.append(f"{job.name}: an input changed")
        if not ended.killed:  # it was quicker this time
            counts.finished_first += 1
            if ended.code != 0:
                counts.findings.append(f"{job.name}: the run after a kill failed: {ended.said[-300:]}")
                _remove(job.out)
        else:
            counts.killed += 1
        present = job.out.exists()
        counts.left["there" if present else "absent"] += 1
        if present and not job.partial:
            try:
                job.whole(job.out)
                if job.same(job.out) != expected:
                    counts.findings.append(f"{job.name}: what was left is not what a whole run writes")
            except AssertionError as error:
                counts.findings.append(f"{job.name}: what was left is not complete: {error}")
        if present and (not job.partial or not ended.killed):
            _remove(job.out)
    last = command(arguments, ENOUGH)
    if last.code != 0 or job.same(job.out) != expected:
        counts.findings.append(f"{job.name}: the last run did not give what a whole run gives: {last.said[-300:]}")
    left = [path.name for path in job.out.parent.iterdir() if path != job.out]
    if left:
        counts.findings.append(f"{job.name}: nobody swept up {left[:3]}")
    return counts


def _must(arguments: list[str]) -> None:
    ended = command(arguments, ENOUGH)
    assert ended.code == 0, ended.said[-500:]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200, help="in all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--docs", type=Path, help="write the counts into this page")
    options.add_argument("--engines", action="store_true", help="engine building too; needs tensorrt_rtx")
    given = options.parse_args()
    prepare()
    pick = random.Random(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="vlmguard-kills-"))
    findings: list[str] = []
    told: list[str] = []
    try:
        chosen = jobs(folder, given.engines)
        inputs = lambda: (digests(SOURCE), digests(folder / "guarded-model"), sha256(folder / "d.safetensors"))  # noqa: E731
        for job in chosen:
            counts = kill(job, -(-given.kills // len(chosen)), pick, inputs)
            findings += counts.findings
            told.append(
                f"{job.name}: {counts.killed} kills, {counts.finished_first} ended before; afterwards {dict(counts.left)}"
            )
            print(told[-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell("kills", [*told, f"{len(findings)} findings", *findings], given.docs)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
