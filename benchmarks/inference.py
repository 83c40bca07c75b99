"""What the guard costs when the model runs: guard on ALL layers against the unguarded graph, in ONNX Runtime on the CPU.

    python benchmarks/inference.py                      # the default matrix: what the goals name, and each mode
    python benchmarks/inference.py --full               # every mode, rank, lowering, position, gate and phase
    python benchmarks/inference.py --only int4/decode   # one part; the others keep their earlier figures
    python benchmarks/inference.py --profile            # besides: the guard's share of the time in nodes, for the goals alone

`decode` is one token with 128 in the cache, `prefill` a prompt of 256. Every group has the unguarded graph twice: their
ratio should be 1, and its distance from 1 is the error that more pairs of the same sessions do not remove. A part is one
precision and phase; parts are written as they finish.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from decoder_call import Decoder
from guarding import ALWAYS_CLOSED, ALWAYS_OPEN, guarded, write_directions
from measure import QUICK, Budget, Spread, asked, interleaved, ratio, say
from record import parser, read_parts, write_result
from shapes import SHAPES, Precision, Shape, built

from vlmguard.graphs.modes import MODES, Mode, Positions, guard_mode
from vlmguard.graphs.node_builder import PREFIX
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.spec import GuardSpec

RANKS = (1, 4, 8)
PHASES = {"decode": (1, 128), "prefill": (256, 0)}  # tokens of the call, tokens in the cache
# A float32 session of the 0.5B shape holds about 3 GB once its weights are packed, an int4 one a fifth of that.
OPEN_AT_ONCE = {"int4": 4, "fp32": 2}
BUDGETS = {"decode": Budget(least=10, most=500, seconds=25), "prefill": Budget(least=2, most=12, seconds=60)}
# Where a session's weights happen to lie in memory makes up to 2% at decode, so sessions are opened anew: pairs of several
# openings are pooled, in which that is chance and not a constant.
OPENINGS = {"decode": 5, "prefill": 2}
UNGUARDED, AGAIN = "unguarded", "unguarded again"


@dataclass(frozen=True)
class Variant:
    """One guard, as a person would ask for it; `gate` is what it decides here."""

    mode: str
    rank: int
    positions: str
    lowering: str = "lowrank"
    gate: str = "none"

    @property
    def name(self) -> str:
        gate = "" if self.gate == "none" else f" {self.gate}"
        return f"{self.mode} {self.lowering} rank {self.rank} {self.positions}{gate}"

    @property
    def spec(self) -> GuardSpec:
        # A supervised gate reads its input, not the stream; see `supervisor`.
        decided = ALWAYS_OPEN if self.gate == "open" else ALWAYS_CLOSED
        tau = None if not guard_mode(self.mode).has_threshold else 0.0 if self.mode == "supervise" else decided
        return GuardSpec(
            mode=cast(Mode, self.mode),
            rank=self.rank,
            tau=tau,
            alpha=0.1 if self.mode in ("steer", "supervise") else None,
            positions=cast(Positions, self.positions),
            lowering=self.lowering,
        )

    @property
    def supervisor(self) -> float:
        return 0.5 if self.gate == "open" or self.mode == "align" else NO_SUPERVISOR


def gates(mode: str) -> tuple[str, ...]:
    return ("open", "closed") if guard_mode(mode).has_threshold else ("none",)


def goals(phase: str) -> list[Variant]:
    """What the goals name, in the mode with the most arithmetic."""
    positions = ("last",) if phase == "decode" else ("last", "all")
    return [Variant("restore", rank, where, gate="open") for where in positions for rank in RANKS]


def default_matrix(precision: str, phase: str) -> list[Variant]:
    if phase == "prefill":
        return goals(phase) + ([Variant("project", 1, "all", "dense")] if precision == "int4" else [])
    more = [Variant("restore", 4, "last", gate="closed"), Variant("project", 1, "all", "dense")]
    if precision == "int4":
        more += [
            Variant(mode, rank, "last", gate=gates(mode)[0]) for mode in MODES if mode != "restore" for rank in (1, 8)
        ]
        more += [Variant("restore", 1, "last", "rank1", "open"), Variant("restore", 4, "all", gate="open")]
    return goals(phase) + more


def full_matrix() -> list[Variant]:
    return [
        Variant(mode, rank, positions, lowering, gate)
        for mode in MODES
        for rank in RANKS
        for positions in ("last", "all")
        for lowering in (("lowrank", "rank1", "dense") if mode == "project" else ("lowrank", "rank1"))
        for gate in gates(mode)
    ]


def main() -> None:
    options = parser("inference", __doc__)
    options.add_argument("--full", action="store_true", help="every combination; hours")
    options.add_argument("--only", help="one part, such as int4/decode")
    options.add_argument("--resume", action="store_true", help="leave out parts that the result file has")
    options.add_argument("--precision", action="append", choices=tuple(OPEN_AT_ONCE), help="default: int4 and fp32")
    options.add_argument("--profile", action="store_true", help="shares by node, as parts of their own")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    done = read_parts(args.out) if args.resume else {}
    for precision in args.precision or OPEN_AT_ONCE:
        for phase in PHASES:
            part = f"{precision}/{phase}"
            written = f"{part}/nodes" if args.profile else part
            if args.only not in (None, part) or written in done:
                continue
            with _workshop(shape, precision, args.models) as shop:
                found = profile(shop, phase, args) if args.profile else measure(shop, phase, args)
                write_result(args, "inference", found, written)


@dataclass(frozen=True)
class Workshop:
    """An unguarded folder, and a place beside it for guarded copies (beside: so that weights can be linked)."""

    shape: Shape
    precision: Precision
    model: Path
    directions: Path
    copies: Path

    def guarded(self, variant: Variant) -> Path:
        out = self.copies / variant.name.replace(" ", "-")
        if not out.is_dir():
            guarded(self.model, out, self.directions, variant.spec)
        return out / "model.onnx"


@contextmanager
def _workshop(shape: Shape, precision: str, models: Path) -> Iterator[Workshop]:
    model = built(shape, cast(Precision, precision), models)
    directions = model.parent / "directions.safetensors"
    if not directions.is_file():
        write_directions(directions, shape.hidden_size, shape.num_hidden_layers)
    copies = Path(tempfile.mkdtemp(prefix=".guarded-", dir=model.parent))
    try:
        yield Workshop(shape, cast(Precision, precision), model, directions, copies)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def measure(shop: Workshop, phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """All variants of one part, a few sessions at a time, each group with the unguarded graph twice."""
    budget = asked(args, BUDGETS[phase])
    variants = full_matrix() if args.full else default_matrix(shop.precision, phase)
    if args.quick:
        variants = goals(phase)[:: len(RANKS)]  # the first rank, each position
    at_once = OPEN_AT_ONCE[shop.precision]
    groups = [variants[start : start + at_once] for start in range(0, len(variants), at_once)]
    rows = [row for group in groups for row in _group(shop, phase, args.threads, group, budget)]
    tokens, past = PHASES[phase]
    return {
        "shape": shop.shape.told,
        "precision": shop.precision,
        "phase": phase,
        "tokens": tokens,
        "past": past,
        "unguarded_bytes": _size(shop.model / "model.onnx"),
        "rows": rows,
    }


def _group(
    shop: Workshop, phase: str, threads: int, variants: Sequence[Variant], budget: Budget
) -> list[dict[str, Any]]:
    say(f"{shop.precision}/{phase}: {', '.join(variant.name for variant in variants)}")
    paths: dict[str, Path] = {UNGUARDED: shop.model / "model.onnx", AGAIN: shop.model / "model.onnx"}
    paths |= {variant.name: shop.guarded(variant) for variant in variants}
    told = {variant.name: variant.supervisor for variant in variants}
    openings = 1 if budget is QUICK else OPENINGS[phase]
    share = replace(budget, seconds=budget.seconds / openings, most=max(1, budget.most // openings))
    times: dict[str, list[np.ndarray]] = {name: [] for name in paths}
    loads: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(openings):
        order = [*list(paths)[number:], *list(paths)[:number]]  # no subject is always opened first
        sessions = {name: Decoder(paths[name], shop.shape, threads) for name in order}
        calls = {name: session.call(*PHASES[phase], told.get(name, 0.0)) for name, session in sessions.items()}
        for name, taken in interleaved(calls, UNGUARDED, share).items():
            times[name].append(taken)
            loads[name].append(sessions[name].load_seconds)
        del sessions, calls
    pooled = {name: np.concatenate(taken) for name, taken in times.items()}
    rows = [_row({"name": AGAIN}, pooled, times, loads)]
    for variant in variants:
        about = {"name": variant.name, **asdict(variant), "bytes": _size(paths[variant.name])}
        rows.append(_row(about, pooled, times, loads))
        say(f"  {variant.name}: {rows[-1]['ratio']['median']:.4f}x in {rows[-1]['ratio']['count']} pairs")
    return rows


def _row(
    about: dict[str, Any],
    pooled: dict[str, np.ndarray],
    times: dict[str, list[np.ndarray]],
    loads: dict[str, list[float]],
) -> dict[str, Any]:
    name = about["name"]
    by_opening = [ratio({"a": a, "b": b}, "b", "a").median for a, b in zip(times[UNGUARDED], times[name], strict=True)]
    return {
        **about,
        "ratio": ratio(pooled, name, UNGUARDED).to_json(),
        "by_opening": [round(value, 6) for value in by_opening],
        "ms": Spread.of(pooled[name] * 1e3).to_json(),
        "unguarded_ms": Spread.of(pooled[UNGUARDED] * 1e3).to_json(),
        "load_seconds": round(float(np.median(loads[name])), 3),
        "unguarded_load_seconds": round(float(np.median(loads[UNGUARDED])), 3),
    }


def _size(model: Path) -> int:
    """The graph and all data files beside it."""
    return sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))


# By node


def profile(shop: Workshop, phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """The guard's share of all time in nodes, and its nodes by operator.

    Both sides of a share come from one run, so it says something on a machine that is too busy for wall times. It is no
    wall time: what ONNX Runtime spends between nodes is not in it, what its profiler adds to each small node is.
    """
    tokens, past = PHASES[phase]
    rows = []
    for variant in goals(phase):
        session = Decoder(shop.guarded(variant), shop.shape, args.threads, shop.copies / "profile")
        call = session.call(tokens, past, variant.supervisor)
        for _ in range(3 if args.quick or phase == "prefill" else 50):
            call()
        rows.append({"name": variant.name, **shares(Path(session.session.end_profiling()))})
        say(f"  {shop.precision}/{phase} {variant.name}: {rows[-1]['share']:.2%} of node time")
    return {"shape": shop.shape.told, "rows": rows}


def shares(trace: Path) -> dict[str, Any]:
    """From a trace of onnxruntime: microseconds per call, of everything and of the guard.

    Each node counts with the median of its calls: a node of 3 us that was once interrupted would else count with 4 ms.
    """
    events = json.loads(trace.read_text(encoding="utf-8"))
    taken: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            taken.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"])
    medians = {node: float(np.median(times)) for node, times in taken.items()}
    ours = {node: time for node, time in medians.items() if node[0].startswith(PREFIX)}
    by_operator: dict[str, list[float]] = {}
    for (_, operator), time in ours.items():
        by_operator.setdefault(operator, []).append(time)
    total, guard = sum(medians.values()), sum(ours.values())
    return {
        "share": round(guard / (total - guard), 5),
        "all_us": round(total, 1),
        "guard_us": round(guard, 1),
        "guard_nodes": len(ours),
        "nodes": len(medians),
        "by_operator_us": {name: [len(times), round(sum(times), 1)] for name, times in sorted(by_operator.items())},
    }


if __name__ == "__main__":
    main()
