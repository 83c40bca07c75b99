"""What the two ways of mode `align` cost: a text-only pass of its own (`input`), or paired rows in one call (`rows`).

    python benchmarks/supervisors.py            # fp32, a prompt of 32 text tokens with an image of 224

`prefill` is everything until the first token of the answer: the unguarded prompt; a text-only call, then the prompt; one call
of two rows of the prompt's length. `decode` is one token of the answer, one row, on a cache of the prompt's length.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from decoder_call import session_options, token_ids
from guarding import guarded, write_directions
from measure import Budget, Spread, asked, interleaved, ratio, say
from record import parser, write_result
from shapes import SHAPES, Shape, built

from vlmguard.graphs.plan import COORDINATES_OUTPUT, PROMPT_SUPERVISOR_INPUT
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.spec import GuardSpec, Supervisor

RANK = 8
BUDGETS = {"prefill": Budget(least=10, most=120, seconds=150), "decode": Budget(least=30, most=500, seconds=60)}
UNGUARDED, AGAIN = "unguarded", "unguarded again"


def main() -> None:
    options = parser("supervisors", __doc__)
    options.set_defaults(shape="gemma-270m")
    options.add_argument("--text", type=int, default=32, help="tokens of the text-only prompt")
    options.add_argument("--image", type=int, default=224, help="tokens of the image")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    model = built(shape, "fp32", args.models)
    directions = model.parent / "directions.safetensors"
    if not directions.is_file():
        write_directions(directions, shape.hidden_size, shape.num_hidden_layers)
    copies = Path(tempfile.mkdtemp(prefix=".guarded-", dir=model.parent))
    try:
        for phase in BUDGETS:
            write_result(args, "supervisors", measure(args, shape, model, directions, copies, phase), phase)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def measure(
    args: argparse.Namespace, shape: Shape, model: Path, directions: Path, copies: Path, phase: str
) -> dict[str, Any]:
    """One phase: every subject in turns with the unguarded graph."""
    say(f"{phase}: {args.text} tokens of text, {args.image} of an image")
    prompt = args.text + args.image
    plain, again = (Session(model / "model.onnx", shape, args.threads) for _ in range(2))
    ways: dict[str, Session] = {}
    for way in ("input", "rows"):
        out = copies / way
        if not out.is_dir():
            guarded(model, out, directions, GuardSpec(mode="align", rank=RANK, supervisor=cast(Supervisor, way)))
        ways[way] = Session(out / "model.onnx", shape, args.threads)
    if phase == "decode":
        calls = {UNGUARDED: plain.call(1, prompt), AGAIN: again.call(1, prompt)}
        calls |= {way: session.call(1, prompt) for way, session in ways.items()}
    else:
        calls = {UNGUARDED: plain.call(prompt), AGAIN: again.call(prompt)}
        calls |= {"input": ways["input"].two_passes(args.text, prompt), "rows": ways["rows"].call(prompt, rows=2)}
    times = interleaved(calls, UNGUARDED, asked(args, BUDGETS[phase]))
    rows = [
        {
            "name": name,
            "ratio": ratio(times, name, UNGUARDED).to_json(),
            "ms": Spread.of(times[name] * 1e3).to_json(),
        }
        for name in calls
        if name != UNGUARDED
    ]
    return {
        "shape": shape.told,
        "rank": RANK,
        "text": args.text,
        "image": args.image,
        "unguarded_ms": Spread.of(times[UNGUARDED] * 1e3).to_json(),
        "rows": rows,
    }


class Session:
    """A graph on the CPU, whose calls are bound once."""

    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        self.shape = shape
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=providers)

    def call(
        self, tokens: int, past: int = 0, rows: int = 1, supervisor: float = NO_SUPERVISOR
    ) -> Callable[[], object]:
        """`tokens` tokens of `rows` rows on a cache of `past`."""
        binding = self.bound(tokens, past, rows, supervisor)
        return lambda: self.session.run_with_iobinding(binding)

    def two_passes(self, text: int, prompt: int) -> Callable[[], object]:
        """The text-only prompt, whose coordinates go into the prompt's call."""
        first, second = self.bound(text, 0, 1, NO_SUPERVISOR), self.bound(prompt, 0, 1, NO_SUPERVISOR)
        names = [port.name for port in self.session.get_outputs()]

        def run() -> None:
            self.session.run_with_iobinding(first)
            told = first.get_outputs()[names.index(COORDINATES_OUTPUT)]
            second.bind_ortvalue_input(PROMPT_SUPERVISOR_INPUT, told)
            self.session.run_with_iobinding(second)

        return run

    def bound(self, tokens: int, past: int, rows: int, supervisor: float) -> onnxruntime.IOBinding:
        binding = self.session.io_binding()
        for port in self.session.get_inputs():
            sizes = [size if isinstance(size, int) else 1 for size in port.shape]
            values = {
                "input_ids": np.tile(token_ids(self.shape, tokens), (rows, 1)),
                "attention_mask": np.ones((rows, past + tokens), np.int64),
                "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
                PROMPT_SUPERVISOR_INPUT: np.full((rows, *sizes[1:]), supervisor, np.float32),
            }.get(port.name)
            if values is None:  # the cache
                random = np.random.default_rng(len(port.name))
                heads, size = self.shape.num_key_value_heads, self.shape.head_dim
                values = random.normal(0, 0.5, (rows, heads, past, size)).astype(np.float32)
            binding.bind_cpu_input(port.name, np.ascontiguousarray(values))
        for port in self.session.get_outputs():
            binding.bind_output(port.name, "cpu")
        return binding


if __name__ == "__main__":
    main()
