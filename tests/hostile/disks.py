"""Disks that are full, or read only: every command that writes, on file systems of our own.

    python tests/hostile/disks.py --steps 8 [--engines]      # a part of `make soak`

Each command writes onto a small tmpfs, first with room enough, then with less and less. Too little room must be told in one
line, with nothing left behind and what was there before untouched. Linux alone: it needs a mount namespace of its own, which
`unshare` gives (to root, or to everybody where user namespaces are allowed).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.kills import few_prompts
from hostile.process import command, prepare
from hostile.told import tell
from tiny_vlm_paths import ANCHORS, SOURCE, digests

ENOUGH = 600.0  # seconds
INSIDE = "VLMGUARD_OWN_MOUNTS"
PAGE = 4096  # bytes; what tmpfs counts in


@dataclass(frozen=True)
class Writer:
    """A command that writes onto DISK.

    Attributes:
        brought: a guarded folder lies there before, as DISK/guarded; its proof was not run yet.
        partial: what was written before there was no room left stays, to be gone on with.
    """

    name: str
    arguments: tuple[str, ...]
    brought: bool = False
    partial: bool = False


def writers(folder: Path, engines: bool) -> list[Writer]:
    directions, prompts, key = folder / "d.safetensors", few_prompts(folder), folder / "key.pem"
    guarded = folder / "guarded"
    steer = ("--directions", str(directions), "--mode", "steer", "--tau", "0")
    _must("directions", str(SOURCE), "--anchors", str(ANCHORS), "-o", str(directions))
    _must("export", str(SOURCE), str(guarded), *steer)
    _must("export", str(SOURCE), str(folder / "structure"), *steer, "--proof", "structure")
    asking = ("evaluate", str(SOURCE), str(guarded), "--prompts", str(prompts))
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True, capture_output=True
    )
    made = [
        Writer("export", ("export", str(SOURCE), "DISK/out", *steer)),
        Writer("directions", ("directions", str(SOURCE), "--anchors", str(ANCHORS), "-o", "DISK/out.safetensors")),
        Writer(
            "evaluate",
            (*asking, "--max-new-tokens", "2", "--batch-size", "2", "--out", "DISK/records.jsonl"),
            partial=True,
        ),
        Writer("report", ("report", str(guarded), "--prompts", str(prompts), "-o", "DISK/report.html")),
        Writer("sign", ("sign", "DISK/guarded", "--key", str(key)), brought=True),
        Writer("verify --run", ("verify", "DISK/guarded", "--run", "--source", str(SOURCE)), brought=True),
    ]
    if engines:
        made.append(Writer("engine", ("engine", str(guarded), "DISK/out", "--backend", "tensorrt_rtx")))
    return made


@contextmanager
def disk(folder: Path, size: int | None = None) -> Iterator[Path]:
    """A file system of so many bytes (`None`: enough)."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size if size is not None else '1g'}", "disk", place], check=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


def full(writer: Writer, folder: Path, steps: int) -> tuple[Counter[str], list[str]]:
    """The command with enough room, with a part of what it needs, and on a file system that is read only."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    with disk(folder) as place:
        _bring(writer, folder, place)
        brought = _used(place)
        done = _run(writer, place)
        if done.code != 0:
            return counts, [f"{writer.name}: {done.said[-300:]}"]
        needs = _used(place) - brought
    for step in range(steps):
        size = max(brought + needs * step // steps // PAGE * PAGE, PAGE)
        with disk(folder, size) as place:
            _bring(writer, folder, place)
            before, held = digests(place), _used(place)
            kind = _judged(writer, place, before, held, "No space left on device", findings)
            counts[f"full: {kind}"] += 1
    with disk(folder) as place:
        _bring(writer, folder, place)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        kind = _judged(writer, place, digests(place), _used(place), "Read-only file system", findings)
        counts[f"read only: {kind}"] += 1
    return counts, findings


def _judged(writer: Writer, place: Path, before: dict[str, str], held: int, reason: str, findings: list[str]) -> str:
    done = _run(writer, place)
    if done.code == 0 and reason.startswith("No space"):  # it needs less than it writes at the end
        return "done"
    lines = done.said.strip().splitlines()
    told = reason if reason in done.said else "no permission in"  # which is asked before any work
    if done.code != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or told not in lines[0]:
        findings.append(f"{writer.name}, {reason}: exit code {done.code}: {done.said[-500:]!r}")
        return "no sentence"
    if writer.partial:
        subprocess.run(["mount", "-o", "remount,rw,size=1g", place], check=True)
        if not _whole(place) or _run(writer, place).code != 0:
            findings.append(f"{writer.name}, {reason}: what was left cannot be gone on with")
            return "files"
        return "refused"
    if digests(place) != before:
        findings.append(
            f"{writer.name}, {reason}: left {sorted(set(digests(place)) ^ set(before)) or 'a changed file'}"
        )
        return "files"
    if _used(place) > held:
        findings.append(f"{writer.name}, {reason}: {_used(place) - held} bytes more are in use")
        return "files"
    return "refused"


def _whole(place: Path) -> bool:
    """Whether every line that is there is one."""
    return all(path.stat().st_size and path.read_bytes().endswith(b"\n") for path in place.iterdir())


def _run(writer: Writer, place: Path):
    return command([part.replace("DISK", str(place)) for part in writer.arguments], ENOUGH)


def _bring(writer: Writer, folder: Path, place: Path) -> None:
    if writer.brought:
        shutil.copytree(folder / "structure", place / "guarded")


def _used(place: Path) -> int:
    room = os.statvfs(place)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def _must(*arguments: str) -> None:
    done = command(list(arguments), ENOUGH)
    assert done.code == 0, done.said[-500:]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=8, help="how many sizes of disk each command gets")
    options.add_argument("--engines", action="store_true", help="engine building too (needs tensorrt_rtx)")
    options.add_argument("--only", nargs="*", help="these commands alone")
    options.add_argument("--docs", type=Path, help="write the counts into this page")
    given = options.parse_args()
    if INSIDE not in os.environ:
        return subprocess.run(
            ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv], env={**os.environ, INSIDE: "1"}
        ).returncode
    prepare()
    import vlmguard.apps.report.build_report  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="vlmguard-disks-"))
    told, found = [], []
    try:
        for writer in writers(folder, given.engines):
            if given.only and writer.name not in given.only:
                continue
            counts, findings = full(writer, folder, given.steps)
            found += findings
            told.append(f"{writer.name}: {dict(counts)}")
            print(*findings, sep="\n", end="\n" if findings else "", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell("disks", [*told, f"{len(found)} findings"], given.docs)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
