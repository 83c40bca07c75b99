"""The fuzzer: damaged files through the command line, each in a process of its own.

    python tests/hostile/fuzz.py --cases 5000 --docs docs/security.md     # a part of `make fuzz`

A case passes if it is refused in one printable line with exit code 1 and leaves no file behind, or if it is guarded, proved
and verified (a picture or prompts: answered). A crash, a traceback, more than `SECONDS`, more memory than the budget, a change
to any file but OUT: findings. Hypothesis makes the cases (`hostile.strategies`), and shrinks what it finds to the smallest
case, whose files stay in `--keep`.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.mutations import damaged
from hostile.process import Ended, command, prepare
from hostile.strategies import Case, damaged_files, decoders, some_directions
from hostile.told import tell
from hypothesis import HealthCheck, Phase, given, seed, settings
from tiny_vlm_paths import ANCHORS, SOURCE

SECONDS = 15  # a chat template has 5 of them
MEMORY = 3 << 30  # bytes of address space beyond what the process has when it begins


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        kind: `refused`, `guarded`, `answered`, or what is wrong: `crash`, `traceback`, `hang`, `memory`, `sentence`, `files`,
            `unproved`.
        detail: the sentence, or the end of what was printed.
    """

    kind: str
    detail: str

    @property
    def passed(self) -> bool:
        return self.kind in ("refused", "guarded", "answered")


class Sandbox:
    """Runs cases, each in a folder of its own.

    Attributes:
        tiny: directions of the tiny VLM, and the tiny VLM guarded with them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tiny = (folder / "tiny.safetensors", folder / "tiny-guarded")
        _must(["directions", str(SOURCE), "--anchors", str(ANCHORS), "-o", str(self.tiny[0])])
        _must(["export", str(SOURCE), str(self.tiny[1]), *self._steered()])

    def outcome(self, case: Case, keep: Path) -> Outcome:
        """What becomes of it; the files of one that does not pass are copied to `keep`."""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        try:
            (folder / "canary").write_text("nobody touches this")
            found = self._judge(case, folder)
            if not found.passed:
                shutil.rmtree(keep, ignore_errors=True)
                shutil.copytree(folder, keep, symlinks=True)
            return found
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _judge(self, case: Case, folder: Path) -> Outcome:
        if case.target == "picture":
            (folder / case.name).write_bytes(case.content)
            asked = ["generate", str(self.tiny[1]), "--prompt", "what is this", "--image", str(folder / case.name)]
            return _asked([*asked, "--max-new-tokens", "2"], folder)
        if case.target == "prompts":
            (folder / case.name).write_bytes(case.content)
            return _asked(["prompts", str(folder / case.name)], folder)
        if case.target == "companion":
            model = folder / "model"
            shutil.copytree(SOURCE, model)
            (model / case.name).write_bytes(case.content)
            return _exported([str(model), str(folder / "out"), *self._steered()], folder)
        model, found = folder / "model.onnx", folder / "directions.safetensors"
        model.write_bytes(decoders()[case.base].SerializeToString())
        found.write_bytes(some_directions())
        export = [str(model), str(folder / "out"), "--directions", str(found), "--mode", case.mode]
        if case.target == "manifest":
            _must(["export", *export])
            manifest = folder / "out" / "guard.json"
            manifest.write_bytes(damaged(manifest.read_bytes(), random.Random(case.seed)))
            return _asked(["verify", str(folder / "out")], folder, "guarded")
        (folder / case.name).write_bytes(case.content)
        return _exported(
            [*export[:2], "--config", str(folder / case.name)] if case.target == "wish" else export, folder
        )

    def _steered(self) -> list[str]:
        return ["--directions", str(self.tiny[0]), "--mode", "steer", "--tau", "0"]


def _asked(arguments: list[str], folder: Path, kind: str = "answered") -> Outcome:
    """A command that writes nothing."""
    before = _digests(folder)
    outcome = _judged(command(arguments, SECONDS, MEMORY), kind)
    return Outcome("files", f"changed: {_changed(before, folder)}") if _digests(folder) != before else outcome


def _exported(arguments: list[str], folder: Path) -> Outcome:
    """A guarded folder that verifies, or a refusal that leaves nothing."""
    before = _digests(folder)
    outcome = _judged(command(["export", *arguments], SECONDS, MEMORY), "guarded")
    changed = _changed(before, folder)
    if outcome.kind == "refused" and changed:
        return Outcome("files", f"left behind: {changed}")
    if outcome.kind == "guarded":
        if any(name.partition("/")[0] != "out" for name in changed):
            return Outcome("files", f"changed: {changed}")
        checked = command(["verify", arguments[1], "--source", arguments[0]], SECONDS, MEMORY)
        if checked.code != 0:
            return Outcome("unproved", checked.said[-300:])
    return outcome


def _changed(before: dict[str, str], folder: Path) -> list[str]:
    after = _digests(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))[:3]


def _judged(ended: Ended, done: str) -> Outcome:
    end = ended.said.strip()[-400:]
    if "MemoryError" in ended.said or "bad_alloc" in ended.said:
        return Outcome("memory", end)
    if ended.killed:
        return Outcome("hang", f"{ended.seconds:.1f} s; {end}")
    if ended.code < 0:
        return Outcome("crash", f"signal {-ended.code}; {end}")
    if "Traceback" in ended.said:
        return Outcome("traceback", end)
    if ended.code == 0:
        return Outcome(done, "")
    lines = ended.said.strip().splitlines()
    if ended.code != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable():
        return Outcome("sentence", f"exit code {ended.code}: {end!r}")
    return Outcome("refused", lines[0])


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def _must(arguments: list[str]) -> None:
    done = command(arguments, 600)  # nobody damaged these
    assert done.code == 0, done.said[-500:]


@dataclass
class Counts:
    """What came of all cases so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.outcomes[outcome.kind] += 1
        self.targets[f"{case.target}, {outcome.kind}"] += 1
        self.damage.update({f"{case.target}: {one}" if case.target != "model" else one for one in case.done})


def fuzz(sandbox: Sandbox, number: int, first: int, keep: Path) -> tuple[Counts, str]:
    """So many cases; what came of them, and the smallest finding if there is one."""
    counts, finding = Counts(), ""

    @seed(first)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_files())
    def every_case_passes(case: Case) -> None:
        nonlocal finding
        outcome = sandbox.outcome(case, keep)
        counts.add(case, outcome)
        if sum(counts.outcomes.values()) % 200 == 0:
            print(f"{sum(counts.outcomes.values())} cases: {dict(counts.outcomes)}", file=sys.stderr, flush=True)
        if not outcome.passed:
            finding = f"{case!r}: {outcome.kind}: {outcome.detail}"  # the last one is the smallest
        assert outcome.passed

    try:
        every_case_passes()
    except AssertionError:
        return counts, finding
    return counts, ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--docs", type=Path, help="write the counts into this page")
    options.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where the files of a finding go")
    asked = options.parse_args()
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="vlmguard-fuzz-"))
    started = time.monotonic()
    try:
        counts, finding = fuzz(Sandbox(folder), asked.cases, asked.seed, asked.keep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    if finding:
        print(f"{finding}\nits files are in {asked.keep}")
    told = f"{sum(counts.outcomes.values())} cases in {seconds:.0f} s, seed {asked.seed}: {dict(counts.outcomes)}"
    tell(
        "fuzz",
        [
            f"{told}; {1 if finding else 0} findings",
            f"by what was damaged: {dict(sorted(counts.targets.items()))}",
            f"by kind of damage: {dict(sorted(counts.damage.items()))}",
        ],
        asked.docs,
    )
    return 1 if finding else 0


if __name__ == "__main__":
    sys.exit(main())
