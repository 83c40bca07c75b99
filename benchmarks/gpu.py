"""What the guard costs on a GPU, and whether it does there what it does on the CPU. One command for any machine that has one.

    python benchmarks/gpu.py                                    # all that is installed, the 0.5B shape, at most 11 minutes
    python benchmarks/gpu.py                                    # again: what is missing; finished parts are kept
    python benchmarks/gpu.py --shape qwen2.5-7b --only rank1    # the large shape; subjects whose name holds `rank1`
    python benchmarks/gpu.py --dry-run --shape tiny --quick     # no GPU: engines are built, ONNX Runtime runs in their place

Install `.[gpu,torch,tensorrt]` (a GPU of compute capability 9.0, such as an H100 or H200, needs plain `tensorrt`; RTX GPUs also
run `.[rtx]`; a driver of CUDA 12 needs `cuda-bindings<13`). What is not installed is left out, and the last lines say what to
install.

The model is a LLaVA with a decoder of that shape, random weights, float16, exported by vlmguard; guard on ALL layers, rank 4.
Per runtime and guard: (1) the guarded decoder gives what ONNX Runtime gives on the CPU, prefill and 16 decode steps, and by
less than what the guard moves; (2) guarded against unguarded, paired, `decode` (one token on a cache of 512) and `prefill`
(256 tokens). TensorRT has one engine for each phase, with the guard and without. PyTorch with forward hooks is a runtime of
its own. A plan that does not run on this GPU at all is a result too, with the runtime's own reason. `report.py` puts the
results into docs/tensorrt.md.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from gpu_subjects import (
    HOOKS,
    RANK,
    STAND_IN,
    SUBJECTS,
    UNGUARDED,
    LeftOut,
    Opened,
    Subject,
    Workshop,
    open_subject,
    open_workshop,
    random_batch,
    random_inputs,
)
from guarding import ALWAYS_OPEN
from measure import QUICK, Budget, Spread, asked, interleaved, ratio, say
from record import parser, read_parts, write_result
from shapes import SHAPES, Shape
from torch_decoder import TorchDecoder

from vlmguard.exporter.engines.verify_engines import rolled, same_outputs
from vlmguard.exporter.proof.limits import TOLERANCE
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.proof.structure import Check
from vlmguard.runtime.decoder import DecoderSession

PHASES = {"decode": (1, 512), "prefill": (256, 0)}  # tokens of the call, tokens in the cache
BUDGET = Budget(least=10, most=300, seconds=8)
RUNTIMES = ("tensorrt", "tensorrt_rtx", "onnxruntime-cuda", "torch")
AGAIN = "unguarded again"
MINUTES = 11.0
OPENING_COORDINATE = 0.5  # fed to a supervised graph for each coordinate; it opens the gate


def main() -> int:
    options = parser("gpu", __doc__)
    options.add_argument(
        "--runtime", action="append", choices=(*RUNTIMES, STAND_IN), help="default: all but the stand-in"
    )
    options.add_argument("--only", default="", help="part of a subject's name")
    options.add_argument(
        "--minutes", type=float, default=MINUTES, help="start nothing that may end later (default: 11)"
    )
    options.add_argument("--again", action="store_true", help="measure finished parts again")
    options.add_argument("--dry-run", action="store_true", help="without a GPU: see above; its times are no results")
    args = options.parse_args()
    shape, deadline = SHAPES[args.shape], Deadline(args.minutes)
    runtimes = args.runtime or RUNTIMES
    missing: list[str] = []
    with open_workshop(shape, args.models) as shop:
        left = dict.fromkeys(runtimes, "")
        for subject in (*SUBJECTS, HOOKS):  # subject by subject: every runtime has the most telling ones first
            for runtime in runtimes:
                wanted = subject is HOOKS if runtime == "torch" else subject is not HOOKS and args.only in subject.name
                if not wanted or left[runtime]:
                    continue
                if not args.again and _is_done(args, runtime, subject):
                    say(f"{runtime}, {subject.name}: kept; --again measures it again")
                elif not deadline.allows_more():
                    missing.append(f"{runtime}, {subject.name}")
                else:
                    with deadline.timing():
                        left[runtime] = _measured(shop, runtime, subject, args)
    for runtime, why in left.items():
        if why:
            say(f"{runtime} was left out: {why}")
    if missing:
        say(f"out of time; run the same command again for {len(missing)} more: {'; '.join(missing)}")
    return 1 if missing else 0


@dataclass
class Deadline:
    """Whether one more part fits, judged by the longest so far."""

    minutes: float
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def allows_more(self) -> bool:
        return time.monotonic() - self.began + self.longest < 60 * self.minutes

    @contextmanager
    def timing(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.longest = max(self.longest, time.monotonic() - start)


def _part(args: argparse.Namespace, runtime: str) -> str:
    return f"{runtime}/{args.shape}"


def _is_done(args: argparse.Namespace, runtime: str, subject: Subject) -> bool:
    part = read_parts(args.out).get(_part(args, runtime), {})
    same = part.get("gpu") == gpu() and part.get("quick") == args.quick and part.get("dry_run") == args.dry_run
    return same and {row["phase"] for row in part.get("rows", ()) if row["name"] == subject.name} == set(PHASES)


def _measured(shop: Workshop, runtime: str, subject: Subject, args: argparse.Namespace) -> str:
    """Measure one subject and add it to the runtime's part of the results; why the runtime is left out, or ""."""
    say(f"{runtime}, {subject.name}, {shop.shape.name}")
    kept = read_parts(args.out).get(_part(args, runtime), {})
    if kept.get("gpu") != gpu() or kept.get("quick") != args.quick or kept.get("dry_run") != args.dry_run:
        kept = {}
    why = ""
    try:
        found = _torch(shop, args) if runtime == "torch" else _measure(shop, runtime, subject, args)
    except (GuardError, LeftOut) as refusal:  # not installed, no such GPU, a plan that it does not run: all are answers
        why = str(refusal)
        say(f"  does not run: {why}")
        found = {"runs": False, "why": why}
        if kept.get("runs"):  # the runtime is there, this guard fails on it
            note = f"does not run: {why}"
            failed = Check("agreement", 0, 0.0, TOLERANCE["float16"], False, note)
            found = {"runs": True, "agreement": [_agreement_row(subject, failed)], "rows": []}
            why = ""
    for name in ("agreement", "rows") if found["runs"] else ():
        others = [row for row in kept.get(name, ()) if row["name" if name == "rows" else "subject"] != subject.name]
        found[name] = [*others, *found[name]]
    about = {"shape": shop.shape.told, "rank": RANK, "gpu": gpu(), "phases": PHASES, "dry_run": args.dry_run}
    write_result(args, "gpu", {**about, **found}, _part(args, runtime))
    return why


# One runtime


def _measure(shop: Workshop, runtime: str, subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    if runtime not in shop.unguarded:
        shop.unguarded[runtime] = open_subject(shop, None, runtime, args)
    opened = open_subject(shop, subject, runtime, args)
    try:
        agreement = _agreement(shop, opened, subject)
        rows = _costs(shop, runtime, opened, subject, args)
    finally:
        opened.session.close()
    return {"runs": True, "agreement": [agreement], "rows": rows}


def _agreement(shop: Workshop, opened: Opened, subject: Subject) -> dict[str, Any]:
    """The guarded decoder here against ONNX Runtime on the CPU, which must also see what the guard does."""
    inputs = random_inputs(shop.shape)
    expected, without = shop.on_the_cpu(subject), shop.on_the_cpu(None)
    check = same_outputs(expected, rolled(opened.session, inputs), without, TOLERANCE["float16"], inputs.origin)
    say(f"  {check.worst:.1e} of {check.limit:.0e}; {'agrees' if check.ok else 'DIFFERS'}")
    return _agreement_row(subject, check)


def _agreement_row(subject: Subject, check: Check) -> dict[str, Any]:
    return {"subject": subject.name, "mode": subject.mode, **asdict(check)}


def _costs(
    shop: Workshop, runtime: str, guard: Opened, subject: Subject, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Guarded against unguarded, phase by phase; the unguarded one twice, which tells the error of the measurement."""
    bare = shop.unguarded[runtime]
    opened = {UNGUARDED: bare, subject.name: guard, AGAIN: bare}
    added = [count - without for without, count in zip(bare.kernels, guard.kernels, strict=True)]
    rows = []
    for phase, (tokens, past) in PHASES.items():
        calls = {name: _call(shop.shape, decoder.session, tokens, past) for name, decoder in opened.items()}
        rows.append({**asdict(subject), **_row(calls, subject.name, UNGUARDED, phase, args), "kernels_added": added})
        say(f"  {phase}: {rows[-1]['ratio']['median']:.4f}x, again {rows[-1]['again']['median']:.4f}x")
    return rows


def _row(
    calls: Mapping[str, Callable[[], object]], name: str, baseline: str, phase: str, args: argparse.Namespace
) -> dict[str, Any]:
    budget = QUICK if args.quick else asked(args, BUDGET)
    times = interleaved(calls, baseline, budget, warm_up=5)
    return {
        "name": name,
        "phase": phase,
        "ratio": ratio(times, name, baseline).to_json(),
        "again": ratio(times, AGAIN, baseline).to_json(),
        "ms": Spread.of(times[name] * 1e3).to_json(),
        "baseline_ms": Spread.of(times[baseline] * 1e3).to_json(),
    }


# What is computed


def _call(shape: Shape, session: DecoderSession, tokens: int, past: int) -> Callable[[], object]:
    """Run `tokens` tokens on a cache of `past`, and wait for the logits; every call does the same again."""
    supervisor = None
    if session.supervised:
        supervisor = np.full((1, *session.supervisor_shape), OPENING_COORDINATE, np.float32)
    prompt = random_batch(shape, past or tokens)
    if not past:
        return lambda: session.last_logits(session.prefill(prompt, supervisor)[0])
    _, state = session.prefill(prompt, supervisor)
    token = random_batch(shape, tokens)
    return lambda: session.last_logits(session.step(replace(state), token.ids, token.embeds))


def _torch(shop: Workshop, args: argparse.Namespace) -> dict[str, Any]:
    """The same decoder in eager PyTorch, with and without a hook per layer."""
    subject = HOOKS
    decoder = TorchDecoder(shop.checkpoint, shop.directions, ALWAYS_OPEN)
    rows = []
    for phase, (tokens, past) in PHASES.items():
        batch, before = random_batch(shop.shape, tokens), random_batch(shop.shape, past) if past else None
        state = None if before is None else decoder.prefill(before.embeds)
        calls: dict[str, Callable[[], object]] = {
            name: lambda hooked=hooked, batch=batch, state=state: decoder.run(batch.embeds, state, hooked)
            for name, hooked in ((UNGUARDED, False), (subject.name, True), (AGAIN, False))
        }
        rows.append({**asdict(subject), **_row(calls, subject.name, UNGUARDED, phase, args)})
        say(f"  {subject.name}, {phase}: {rows[-1]['ratio']['median']:.4f}x")
    return {"runs": True, "agreement": [], "rows": rows}


def gpu() -> str:
    """Name, memory and driver, as the driver tells them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return "; ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")).strip(
            "; "
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"


if __name__ == "__main__":
    raise SystemExit(main())
