"""Coverage-guided fuzzing, with atheris (libFuzzer): the opener and the anatomy, in one process, thousands of cases a minute.

    python tests/hostile/coverage_guided.py --runs 20000 --docs docs/security.md     # a part of `make fuzz`
    python tests/hostile/coverage_guided.py --file build/coverage-guided/crash-...   # one case again

libFuzzer keeps what reaches new code of ours and damages it further. Its cases are graphs that parse: each is damaged by one of
`hostile.mutations`, or as bytes. A case passes if the graph is opened and dissected, or refused by an error of ours. Another
exception, more than `SECONDS`, or more than `MEMORY` MiB: a finding, whose file stays.

atheris has wheels for Linux and macOS alone, so that it comes with `make fuzz` and not with the tests.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS, MEMORY = 10, 3 << 10
KEEP = Path("build/coverage-guided")


def harness(arguments: list[str], marks: bool) -> None:
    """Be the process that libFuzzer drives; it ends the process.

    Args:
        marks: print what became of each case, to be counted.
    """
    import atheris

    with atheris.instrument_imports(include=["vlmguard.graphs"]):
        import vlmguard.graphs.anatomy
        import vlmguard.graphs.package

    import onnx
    from google.protobuf.message import DecodeError
    from hostile.mutations import mutated

    from vlmguard.graphs.errors import GuardError

    folder = Path(tempfile.mkdtemp(prefix="vlmguard-coverage-"))
    path = folder / "model.onnx"

    def opened_and_dissected(content: bytes) -> None:
        path.write_bytes(content)
        try:
            vlmguard.graphs.anatomy.dissect(vlmguard.graphs.graph_io.load_graph(path))
            outcome = b"+"
        except GuardError:
            outcome = b"-"
        if marks:
            sys.stdout.buffer.write(outcome)

    def damage(content: bytes, most: int, seed: int) -> bytes:
        """libFuzzer's own damage to the bytes seldom parses; ours always does."""
        model = onnx.ModelProto()
        try:
            model.ParseFromString(content)
        except DecodeError:
            return atheris.Mutate(content, most)
        damaged, _ = mutated(model, random.Random(seed))
        return damaged if len(damaged) <= most else content

    def crossed(one: bytes, other: bytes, most: int, seed: int) -> bytes:
        """Nodes of one graph in another's."""
        pick, models = random.Random(seed), (onnx.ModelProto(), onnx.ModelProto())
        try:
            for model, content in zip(models, (one, other), strict=True):
                model.ParseFromString(content)
        except DecodeError:
            return one
        for node in models[1].graph.node:
            if pick.random() < 0.1:
                models[0].graph.node.append(node)
        made = models[0].SerializeToString()
        return made if len(made) <= most else one

    try:
        atheris.Setup([sys.argv[0], *arguments], opened_and_dissected, custom_mutator=damage, custom_crossover=crossed)
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(runs: int, seed: int) -> tuple[str, bool]:
    """So many cases from the valid graphs on; what came of them, and whether all passed."""
    from hostile.strategies import decoders

    KEEP.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlmguard-corpus-") as corpus:
        for number, model in enumerate(decoders()):
            (Path(corpus) / str(number)).write_bytes(model.SerializeToString())
        limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY}", "-max_len=1000000", f"-artifact_prefix={KEEP}/"]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--harness", corpus, f"-runs={runs}", f"-seed={seed + 1}", *limits],
            capture_output=True,
        )
        seconds = time.monotonic() - started
        kept = len(list(Path(corpus).iterdir()))
    said = done.stderr.decode("utf-8", "replace")
    if done.returncode:
        print(said[-4000:])
    dissected, refused = done.stdout.count(b"+"), done.stdout.count(b"-")
    covered = re.findall(r"cov: (\d+) ft: (\d+)", said)
    reached = f"{covered[0][0]} -> {covered[-1][0]} edges of graphs/ reached" if covered else "no coverage reported"
    told = f"{dissected + refused} cases in {seconds:.0f} s, seed {seed}: {refused} refused, {dissected} dissected"
    return (
        f"{told}; {reached}, {kept} cases that reached new ones; {bool(done.returncode) + 0} findings",
        not done.returncode,
    )


def main() -> int:
    if sys.argv[1:2] == ["--harness"]:
        harness(sys.argv[2:], marks=True)
        return 0
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--file", type=Path, help="this case alone, with its traceback")
    options.add_argument("--docs", type=Path, help="write the counts into this page")
    asked = options.parse_args()
    if asked.file is not None:
        harness([str(asked.file)], marks=False)
        return 0
    from hostile.told import tell

    told, passed = fuzz(asked.runs, asked.seed)
    tell("coverage-guided", [told], asked.docs)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
