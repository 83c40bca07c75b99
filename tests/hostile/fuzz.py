"""The fuzzer: damaged models, directions and manifests through the command line, each in a process of its own.

    python tests/hostile/fuzz.py --cases 5000            # `make fuzz`; prints the counts, writes them to docs/security.md
    python tests/hostile/fuzz.py --seed 1234 --keep DIR  # one case again, with its files

A case passes if it is refused in one printable line with exit code 1 and leaves no file behind, or if it is guarded, proved
and verified. A crash, a traceback, more than `SECONDS`, more memory than the budget, a change to any file but OUT: findings.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1]))

from hand_graphs import decoder, directions, merged
from hostile.mutations import mutated
from hostile.process import Ended, command, prepare
from hostile.told import tell

SECONDS = 10
MEMORY = 3 << 30  # bytes of address space beyond what the process has when it begins
TARGETS = ("model", "directions", "manifest")


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        kind: `refused`, `guarded`, or what is wrong: `crash`, `traceback`, `hang`, `memory`, `sentence`, `files`, `unproved`.
        detail: the sentence, or the end of what was printed.
    """

    seed: int
    target: str
    done: tuple[str, ...]
    kind: str
    detail: str

    @property
    def passed(self) -> bool:
        return self.kind in ("refused", "guarded")


def bases() -> list[onnx.ModelProto]:
    """What is damaged: a plain decoder, a fused one, and one whose layers lie in the branches of an If."""
    made = [decoder(layers=2), decoder("skip_norm_bias", layers=2), merged(layers=2)]
    return [ir.to_proto(model) for model in made]


def cases(seeds: Iterator[int] | range, keep: Path | None = None) -> Iterator[Outcome]:
    """Run each seed in a sandbox of its own."""
    models = bases()
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="vlmguard-fuzz-"))
        try:
            yield _case(models, seed, folder)
        finally:
            if keep is not None:
                shutil.copytree(folder, keep, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(folder, ignore_errors=True)


def _case(models: list[onnx.ModelProto], seed: int, folder: Path) -> Outcome:
    pick = random.Random(seed)
    target = pick.choices(TARGETS, (8, 1, 1))[0]
    model, found = models[seed % len(models)], folder / "directions.safetensors"
    (folder / "canary").write_text("nobody touches this")
    from vlmguard.graphs.directions import directions_bytes

    found.write_bytes(directions_bytes(directions((0, 1))))
    path, done = folder / "model.onnx", ("bytes",)
    content, names = mutated(model, seed)
    path.write_bytes(content if target == "model" else model.SerializeToString())
    if target == "model":
        done = names
    if target == "directions":
        _flip(found, pick)
    out = folder / "out"
    export = [
        "export",
        str(path),
        str(out),
        "--directions",
        str(found),
        "--mode",
        pick.choice(("project", "restore", "steer")),
    ]
    if target == "manifest":
        made = command(export, 60)
        assert made.code == 0, made.said
        _flip(out / "guard.json", pick)
    before = _digests(folder)
    kind, detail = _judged(command(["verify", str(out)] if target == "manifest" else export, SECONDS, MEMORY))
    after = _digests(folder)
    new = {name: digest for name, digest in after.items() if before.get(name) != digest}
    if kind == "refused" and after != before:
        kind, detail = "files", f"left behind: {sorted(new)[:3]}"
    elif kind == "guarded" and target != "manifest":
        if any(name.partition("/")[0] != "out" for name in new) or before.keys() - after.keys():
            kind, detail = "files", f"changed: {sorted(new)[:3]}"
        else:
            checked = command(["verify", str(out), "--source", str(path)], SECONDS, MEMORY)
            if checked.code != 0:
                kind, detail = "unproved", checked.said[-300:]
    return Outcome(seed, target, done, kind, detail)


def _flip(path: Path, pick: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(pick.choice((1, 2, 8))):
        content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    path.write_bytes(bytes(content[: pick.randrange(len(content))] if pick.random() < 0.2 else content))


def _judged(ended: Ended) -> tuple[str, str]:
    end = ended.said.strip()[-400:]
    if "MemoryError" in ended.said or "bad_alloc" in ended.said:
        return "memory", end
    if ended.killed:
        return "hang", f"{ended.seconds:.1f} s; {end}"
    if ended.code < 0:
        return "crash", f"signal {-ended.code}; {end}"
    if "Traceback" in ended.said:
        return "traceback", end
    if ended.code == 0:
        return "guarded", ""
    lines = ended.said.strip().splitlines()
    if ended.code != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable():
        return "sentence", f"exit code {ended.code}: {end!r}"
    return "refused", lines[0]


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=2000)
    options.add_argument("--first", type=int, default=0, help="seed of the first case")
    options.add_argument("--seed", type=int, help="this case alone")
    options.add_argument("--docs", type=Path, help="write the counts into this page")
    options.add_argument("--keep", type=Path, help="with --seed: copy the case's files here")
    given = options.parse_args()
    prepare()
    seeds = range(given.first, given.first + given.cases) if given.seed is None else range(given.seed, given.seed + 1)
    counted: Counter[str] = Counter()
    by_mutation: Counter[str] = Counter()
    findings: list[Outcome] = []
    started = time.monotonic()
    for number, outcome in enumerate(cases(seeds, given.keep)):
        counted[outcome.kind] += 1
        by_mutation.update(set(outcome.done))
        if not outcome.passed:
            findings.append(outcome)
            print(f"seed {outcome.seed} {outcome.target} {outcome.done}: {outcome.kind}: {outcome.detail}", flush=True)
        elif given.seed is not None:
            print(outcome)
        if number % 200 == 199:
            print(f"{number + 1} cases: {dict(counted)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    asked = f"{sum(counted.values())} cases in {seconds:.0f} s, seeds from {given.first}"
    told = f"{asked}: {dict(counted)}; {len(findings)} findings"
    tell("fuzz", [told, f"by kind of damage: {dict(sorted(by_mutation.items()))}"], given.docs)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
