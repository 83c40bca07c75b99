"""What a text-only pass costs: one of its own (`input`), or paired rows in one call (`rows`).

    python benchmarks/supervisors.py                 # fp32, a prompt of 32 text tokens with an image of 224
    python benchmarks/supervisors.py --only request  # one part; the others keep their earlier figures

`prefill` is everything until the first token of the answer: the unguarded prompt; a text-only call, then the prompt; one call
of two rows of the prompt's length. `decode` is one token of the answer, one row, on a cache of the prompt's length. `request`
is a whole one: 32 tokens of text, an image of 576, 64 tokens of answer, in both modes that have a text-only pass.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from decoder_call import session_options, token_ids
from guarding import guarded, write_directions
from measure import QUICK, Budget, Spread, asked, in_huge_pages, opened_anew, say
from record import parser, write_result
from shapes import SHAPES, Shape, built

from vlmguard.graphs.modes import Mode
from vlmguard.graphs.plan import COORDINATES_OUTPUT, PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUT, SUPERVISOR_INPUTS
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.spec import GuardSpec, Supervisor

RANK = 8
BUDGETS = {
    "prefill": Budget(least=10, most=120, seconds=150),
    "decode": Budget(least=30, most=500, seconds=60),
    "request": Budget(least=8, most=40, seconds=200),
}
OPENINGS = 4
IMAGE_OF_REQUEST, STEPS = 576, 64
SUPERVISOR_PORTS = {"align": PROMPT_SUPERVISOR_INPUT, "supervise": SUPERVISOR_INPUT}
UNGUARDED, AGAIN = "unguarded", "unguarded again"
_PAST, _PRESENT = "past_key_values.", "present."


def main() -> None:
    options = parser("supervisors", __doc__)
    options.set_defaults(shape="gemma-270m")
    options.add_argument("--text", type=int, default=32, help="tokens of the text-only prompt")
    options.add_argument("--image", type=int, default=224, help="tokens of the image")
    options.add_argument("--only", choices=tuple(BUDGETS), help="one part")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    model = built(shape, "fp32", args.models)
    directions = model.parent / "directions.safetensors"
    if not directions.is_file():
        write_directions(directions, shape.hidden_size, shape.num_hidden_layers)
    copies = Path(tempfile.mkdtemp(prefix=".guarded-", dir=model.parent))
    try:
        for phase in [args.only] if args.only else BUDGETS:
            write_result(args, "supervisors", measure(args, shape, model, directions, copies, phase), phase)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def measure(
    args: argparse.Namespace, shape: Shape, model: Path, directions: Path, copies: Path, phase: str
) -> dict[str, Any]:
    """One phase: every subject in turns with the unguarded graph."""
    image = IMAGE_OF_REQUEST if phase == "request" else args.image
    say(f"{phase}: {args.text} tokens of text, {image} of an image")
    prompt, budget = args.text + image, asked(args, BUDGETS[phase])
    steps = 2 if budget is QUICK else STEPS
    plain = model / "model.onnx"

    def opens(path: Path, work: Callable[[Session], Callable[[], object]]) -> Callable[[], Callable[[], object]]:
        return lambda: work(Session(path, shape, args.threads))

    def guard(mode: Mode, way: Supervisor) -> Path:
        # `align` in the layers that an export without options guards, `supervise` in all
        layers = tuple(range(shape.num_hidden_layers // 3 if mode == "align" else 0, shape.num_hidden_layers))
        out = copies / f"{mode}-{way}"
        if not out.is_dir():
            tau = 0.0 if mode == "supervise" else None
            alpha = 0.1 if mode == "supervise" else None
            spec = GuardSpec(mode=mode, rank=RANK, supervisor=way, layers=layers, tau=tau, alpha=alpha)
            guarded(model, out, directions, spec)
        return out / "model.onnx"

    if phase == "request":
        request = partial(Session.request, text=args.text, prompt=prompt, steps=steps)
        subjects = {name: opens(plain, request) for name in (UNGUARDED, AGAIN)}
        subjects |= {mode: opens(guard(mode, "input"), partial(request, mode=mode)) for mode in ("align", "supervise")}
    elif phase == "decode":
        step = partial(Session.call, tokens=1, past=prompt)
        subjects = {name: opens(plain, step) for name in (UNGUARDED, AGAIN)}
        subjects |= {way: opens(guard("align", way), step) for way in ("input", "rows")}
    else:
        whole = partial(Session.call, tokens=prompt)
        subjects = {name: opens(plain, whole) for name in (UNGUARDED, AGAIN)}
        subjects["input"] = opens(guard("align", "input"), lambda session: session.two_passes(args.text, prompt))
        subjects["rows"] = opens(guard("align", "rows"), partial(whole, rows=2))
    opened = opened_anew(subjects, UNGUARDED, budget, 1 if budget is QUICK else OPENINGS)
    rows = [
        {
            "name": name,
            "ratio": opened.ratio(name, UNGUARDED).to_json(),
            "ms": Spread.of(opened.pooled(name) * 1e3).to_json(),
        }
        for name in subjects
        if name != UNGUARDED
    ]
    for row in rows:
        say(f"  {row['name']}: {row['ratio']['median']:.4f}x in {row['ratio']['count']} pairs")
    return {
        "shape": shape.told,
        "rank": RANK,
        "text": args.text,
        "image": image,
        "steps": steps,
        "unguarded_ms": Spread.of(opened.pooled(UNGUARDED) * 1e3).to_json(),
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

    def request(self, text: int, prompt: int, steps: int, mode: str = "") -> Callable[[], object]:
        """A prompt and its answer, the cache handed on without a copy; with a mode, the text-only pass comes first."""
        names = [port.name for port in self.session.get_outputs()]
        port = SUPERVISOR_PORTS.get(mode, "")
        first = self.bound(text, 0, 1, NO_SUPERVISOR) if mode else None
        whole = self.bound(prompt, 0, 1, NO_SUPERVISOR)
        calls = [self.bound(1, prompt + number, 1, NO_SUPERVISOR, cache=False) for number in range(steps)]

        def run() -> None:
            told = None
            if first is not None:
                self.session.run_with_iobinding(first)
                told = first.get_outputs()[names.index(COORDINATES_OUTPUT)]
                whole.bind_ortvalue_input(port, told)
            self.session.run_with_iobinding(whole)
            made = whole.get_outputs()
            for binding in calls:
                for name, value in zip(names, made, strict=True):
                    if name.startswith(_PRESENT):
                        binding.bind_ortvalue_input(_PAST + name.removeprefix(_PRESENT), value)
                if told is not None and mode == "supervise":  # `align` edits the prompt alone
                    binding.bind_ortvalue_input(port, told)
                self.session.run_with_iobinding(binding)
                made = binding.get_outputs()

        return run

    def bound(self, tokens: int, past: int, rows: int, supervisor: float, cache: bool = True) -> onnxruntime.IOBinding:
        """Inputs and outputs in place.

        Args:
            tokens: of the call, of each row.
            past: tokens in the cache.
            rows: of the batch.
            supervisor: every text-only coordinate.
            cache: bind one of random numbers; else the caller binds it.
        """
        binding = self.session.io_binding()
        for port in self.session.get_inputs():
            if port.name.startswith(_PAST) and not cache:
                continue
            sizes = [size if isinstance(size, int) else 1 for size in port.shape]
            values = {
                "input_ids": np.tile(token_ids(self.shape, tokens), (rows, 1)),
                "attention_mask": np.ones((rows, past + tokens), np.int64),
                "position_ids": np.tile(np.arange(past, past + tokens), (rows, 1)),
                **{name: np.full((rows, *sizes[1:]), supervisor, np.float32) for name in SUPERVISOR_INPUTS},
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
    in_huge_pages()
    main()
