"""What the taps cost: hidden states of every layer for 200 prompts in one tapped pass, against the bare forward passes.

    python benchmarks/extraction.py                  # both models
    python benchmarks/extraction.py --only tiny-vlm  # one of them

Batch by batch, each batch tapped and bare in turn (A B B A), over all prompts: the bare side is the same `prefill` of the same
batches by the unguarded model, so tokenisation and copies of outputs count on both. The SVD that follows is timed apart. Here
ONNX Runtime takes its own default of threads, all cores, as `vlmguard directions` does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import Spread, say, turns
from record import parser, write_result
from shapes import SHAPES, built

from vlmguard.exporter.extraction.extract import collect_states, tapped
from vlmguard.exporter.opened_decoder import dissect_decoder
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

TINY_VLM = Path(__file__).parents[1] / "examples" / "tiny_vlm" / "onnx-community"
PROMPTS, BATCH = 200, 16
# Lengths in characters, which are tokens here. Few different ones: a graph with GroupQueryAttention cannot be padded.
LENGTHS = (24, 32)
_WORDS = ("how", "do", "I", "wash", "paint", "sink", "the", "old", "small", "boat", "door", "tree", "today")


def main() -> None:
    options = parser("extraction", __doc__)
    options.add_argument("--only", choices=("tiny-vlm", "decoder"))
    args = options.parse_args()
    if args.only in (None, "tiny-vlm"):
        write_result(args, "extraction", _measure(TINY_VLM, "the tiny VLM of examples/tiny_vlm", args), "tiny-vlm")
    if args.only in (None, "decoder"):
        shape = SHAPES[args.shape]
        found = _measure(built(shape, "int4", args.models), f"{shape.told}; int4 build", args)
        write_result(args, "extraction", found, "decoder")


def _measure(folder: Path, what: str, args: argparse.Namespace) -> dict[str, Any]:
    package = open_package(folder)
    anatomy = dissect_decoder(package, package.load_decoder())
    bare = VisionLanguageModel(package)
    tapping = tapped(bare, anatomy)
    prompts = [Request(text) for text in _prompts(2 * BATCH if args.quick else PROMPTS)]
    batches = [[prompts[index] for index in indices] for indices in bare.groups(prompts, BATCH)]
    say(f"extraction: {what}, {len(prompts)} prompts in {len(batches)} batches")
    bare_seconds, tapped_seconds = [], []
    states = []
    for number, batch in enumerate([batches[0], *batches]):  # the first once more, to warm up
        taken = turns(lambda: bare.prefill(batch), lambda: states.append(collect_states(tapping, batch, BATCH)))  # noqa: B023
        if number > 0:
            bare_seconds.append(taken[0])
            tapped_seconds.append(taken[1])
            say(f"  batch {number} of {len(batches)}: {taken[1] / taken[0]:.3f}x")
    collected = np.concatenate(states[2::2])  # one of each batch's two
    assert collected.shape == (len(prompts), anatomy.layer_count, anatomy.width), collected.shape
    began = time.perf_counter()
    for layer in range(anatomy.layer_count):
        np.linalg.svd(collected[0::2, layer] - collected[1::2, layer], full_matrices=False)
    return {
        "model": what,
        "prompts": len(prompts),
        "batches": len(batches),
        "tokens": sorted({len(bare.chat.encode(request.prompt)) for request in prompts}),
        "layers": anatomy.layer_count,
        "bare_seconds": round(sum(bare_seconds), 3),
        "tapped_seconds": round(sum(tapped_seconds), 3),
        "svd_seconds": round(time.perf_counter() - began, 3),
        "total_ratio": round(sum(tapped_seconds) / sum(bare_seconds), 4),
        "ratio": Spread.of(np.array(tapped_seconds) / np.array(bare_seconds)).to_json(),
    }


def _prompts(count: int) -> list[str]:
    """Seeded nonsense of a few lengths; what it says does not matter to the clock."""
    random = np.random.default_rng(0)
    return [
        " ".join(random.choice(_WORDS, size=20))[: LENGTHS[number % len(LENGTHS)]].strip() for number in range(count)
    ]


if __name__ == "__main__":
    main()
