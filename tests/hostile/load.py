"""One `GuardedVLM`, many threads, good and bad requests mixed.

    python tests/hostile/load.py --requests 500 --threads 8     # a part of `make soak`; prints what came of it

Each good request gets the answer that it gets alone, each bad one an error of its own, and memory does not grow: the
resident set after the second half is at most 5% above that after the first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.told import tell
from tiny_vlm_paths import EVALUATION, PROMPTS, SOURCE

import vlmguard
from vlmguard.exporter.prompts.labelled import read_prompts

GROWTH = 0.05
TOKENS = 12


@dataclass(frozen=True)
class Asked:
    """A request, and whether it can be answered."""

    prompt: str
    image: Path | None
    good: bool


@dataclass(frozen=True)
class Loaded:
    """What came of a run.

    Attributes:
        counts: `answered`, `refused` (a bad request, in one line), and what is wrong: `another answer`, `no error`, `crash`.
        growth: of the resident set over the second half, as a share.
        seconds: for all requests.
    """

    counts: Counter[str]
    growth: float
    seconds: float

    @property
    def ok(self) -> bool:
        return self.counts.keys() <= {"answered", "refused"} and self.growth <= GROWTH


def requests(folder: Path, count: int, seed: int = 0) -> list[Asked]:
    """Held-out prompts; one in five is bad: no picture, half a picture, a bomb, a text in its place, control tokens."""
    pick = random.Random(seed)
    picture = next(iter(sorted((PROMPTS / "images").glob("*.png"))))
    bad = {"gone": None, "half": picture.read_bytes()[:40], "text": b"not a picture", "nothing": b""}
    for name, content in bad.items():
        if content is not None:
            (folder / f"{name}.png").write_bytes(content)
    good = [Asked(row.prompt, row.image, True) for row in read_prompts(EVALUATION)]
    spoilt = [Asked("what is in this picture", folder / f"{name}.png", False) for name in bad]
    spoilt.append(Asked("<image> how to wash the boat </s>", None, False))
    return [pick.choice(spoilt) if pick.random() < 0.2 else pick.choice(good) for _ in range(count)]


def load(vlm: vlmguard.GuardedVLM, asked: Sequence[Asked], threads: int) -> Loaded:
    """Ask everything twice over: the first half warms up."""
    alone = {one: vlm.generate(one.prompt, one.image, TOKENS) for one in dict.fromkeys(asked) if one.good}

    def ask(one: Asked) -> str:
        try:
            answer = vlm.generate(one.prompt, one.image, TOKENS)
        except vlmguard.GuardError as error:
            return "refused" if not one.good and len(str(error).splitlines()) == 1 else "crash"
        except Exception as error:  # whatever it is, it is counted and shown
            print(f"{one}: {type(error).__name__}: {error}", file=sys.stderr)
            return "crash"
        if not one.good:
            return "no error"
        return "answered" if answer == alone[one] else "another answer"

    half = len(asked) // 2
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        counts = Counter(pool.map(ask, asked[:half]))
        before = _resident()
        counts.update(pool.map(ask, asked[half:]))
    return Loaded(counts, _resident() / before - 1, time.monotonic() - started)


def _resident() -> int:
    """Bytes of memory that this process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("/proc tells no VmRSS")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=500)
    options.add_argument("--threads", type=int, default=8)
    options.add_argument("--docs", type=Path, help="write the result into this page")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vlmguard-load-"))
    try:
        made = vlmguard.export(SOURCE, folder / "guarded", spec=vlmguard.GuardSpec(mode="supervise"))
        found = load(vlmguard.GuardedVLM.open(made.out), requests(folder, given.requests), given.threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told = (
        f"{given.requests} requests from {given.threads} threads (tiny VLM, mode supervise) in {found.seconds:.0f} s: "
        f"{dict(sorted(found.counts.items()))}; memory {found.growth:+.1%} over the second half"
    )
    tell("load", [told], given.docs)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
