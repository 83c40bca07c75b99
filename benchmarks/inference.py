"""What the guard costs when the model runs, against the unguarded graph, in ONNX Runtime on the CPU.

    python benchmarks/inference.py                      # what the goals name: the default guard, few layers, all layers
    python benchmarks/inference.py --full               # every mode, rank, lowering, position, gate and phase
    python benchmarks/inference.py --only int4/decode   # one part; the others keep their earlier figures
    python benchmarks/inference.py --profile            # besides: the guard's share of the time in nodes, for the goals alone

`decode` is one token with 128 in the cache, `prefill` a prompt of 256. Every group has the unguarded graph twice: the
interval of their ratio is the resolution, differences within it mean nothing. A part is one precision and phase; parts are
written as they finish.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from decoder_call import Decoder
from guarding import ALWAYS_CLOSED, ALWAYS_OPEN, guarded, write_directions
from measure import (
    QUICK,
    Budget,
    Opened,
    Spread,
    asked,
    in_huge_pages,
    interleaved,
    opened_anew,
    ratio,
    resolution,
    say,
)
from record import parser, read_parts, write_result
from shapes import SHAPES, Precision, Shape, built

from vlmguard.graphs.modes import MODES, Mode, Positions, guard_mode
from vlmguard.graphs.node_builder import PREFIX
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.spec import GuardSpec

RANKS = (1, 4, 8)
PHASES = {"decode": (1, 128), "prefill": (256, 0)}  # tokens of the call, tokens in the cache
OPENING = "opening"  # of a session, as a part of its own
# A float32 session of the 0.5B shape holds about 3 GB once its weights are packed, an int4 one a fifth of that.
OPEN_AT_ONCE = {"int4": 5, "fp32": 3}
BUDGETS = {
    "decode": Budget(least=100, most=1000, seconds=150),
    "prefill": Budget(least=12, most=60, seconds=200),
    OPENING: Budget(least=10, most=40, seconds=120),
}
# Two openings of one graph differ even in huge pages (fp32: by 2%), so many openings tell more than many pairs of one.
OPENINGS = {"int4": {"decode": 16, "prefill": 4}, "fp32": {"decode": 12, "prefill": 4}}
# The first two int4 sessions of a process are 13% and 2% slower; float32 ones are not, and too large to keep.
UNTIMED = {"int4": 2, "fp32": 0}
UNGUARDED, AGAIN = "unguarded", "unguarded again"


@dataclass(frozen=True)
class Variant:
    """One guard, as a person would ask for it; `gate` is what it decides here."""

    mode: str
    rank: int
    positions: str
    lowering: str = "lowrank"
    gate: str = "none"
    layers: str = "all"

    @property
    def name(self) -> str:
        gate = "" if self.gate == "none" else f" {self.gate}"
        return f"{self.mode} {self.lowering} rank {self.rank} {self.positions}{gate}, {self.layers} layers"

    def layer_numbers(self, count: int) -> tuple[int, ...]:
        """The guarded layers of a decoder of `count` layers, as calibration chooses them."""
        middle = count * 2 // 3
        return {
            "all": tuple(range(count)),
            "the later two thirds of the": tuple(range(count // 3, count)),
            "3": (middle - 2, middle, middle + 2),
            "1": (middle,),
        }[self.layers]

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


# What `vlmguard-export MODEL` writes without options: the mode, rank and layers that calibration checks first.
DEFAULT = Variant("align", 8, "prompt", layers="the later two thirds of the")


def goals() -> list[Variant]:
    """What the goals name: the default, and the mode with the most arithmetic in few layers and in all."""
    few = [Variant("restore", 1, "last", gate="open", layers=layers) for layers in ("1", "3")]
    return [DEFAULT, *few, *(Variant("restore", rank, "last", gate="open") for rank in (1, 8))]


def few_goals() -> list[Variant]:
    """One guard for each goal of the page: the default, and every layer."""
    return goals()[::4]


def full_matrix() -> list[Variant]:
    return [
        Variant(mode, rank, positions, lowering, gate)
        for mode in MODES
        for rank in RANKS
        for positions in [where for where in guard_mode(mode).positions if where != "prompt"] or ["prompt"]
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
        for phase in PHASES if args.profile else (*PHASES, OPENING):
            part = f"{precision}/{phase}"
            written = f"{part}/nodes" if args.profile else part
            if args.only not in (None, part) or written in done:
                continue
            with _workshop(shape, precision, args.models) as shop:
                work = profile if args.profile else measure_opening if phase == OPENING else measure
                found = work(shop, phase, args)
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
            layers = variant.layer_numbers(self.shape.num_hidden_layers)
            guarded(self.model, out, self.directions, replace(variant.spec, layers=layers))
        return out / "model.onnx"

    def subjects(self, variants: Sequence[Variant]) -> dict[str, Path]:
        """Subject -> its graph: the unguarded one twice, then each variant."""
        plain = self.model / "model.onnx"
        return {UNGUARDED: plain, AGAIN: plain} | {variant.name: self.guarded(variant) for variant in variants}


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
    variants = full_matrix() if args.full else few_goals() if args.quick else goals()
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
    paths = shop.subjects(variants)
    told = {variant.name: variant.supervisor for variant in variants}
    opens = {
        name: partial(_opened, path, shop.shape, threads, phase, told.get(name, 0.0)) for name, path in paths.items()
    }
    openings = 1 if budget is QUICK else OPENINGS[shop.precision][phase]
    opened = opened_anew(opens, UNGUARDED, budget, openings, untimed=UNTIMED[shop.precision])
    again = opened.ratio(AGAIN, UNGUARDED)
    say(f"  unguarded against itself: {again.median:.4f}x, resolution {resolution(again):.2%}")
    rows = [_row({"name": AGAIN, "resolution": round(resolution(again), 6)}, opened)]
    for variant in variants:
        about = {"name": variant.name, **asdict(variant), "bytes": _size(paths[variant.name])}
        rows.append(_row(about, opened))
        say(f"  {variant.name}: {rows[-1]['ratio']['median']:.4f}x in {rows[-1]['ratio']['count']} pairs")
    return rows


def _opened(path: Path, shape: Shape, threads: int, phase: str, supervisor: float) -> Callable[[], object]:
    return Decoder(path, shape, threads).call(*PHASES[phase], supervisor)


def _row(about: dict[str, Any], opened: Opened) -> dict[str, Any]:
    name = about["name"]
    by_opening = zip(opened.taken[name], opened.taken[UNGUARDED], strict=True)
    return {
        **about,
        "ratio": opened.ratio(name, UNGUARDED).to_json(),
        "by_opening": [round(float(np.median(mine / other)), 6) for mine, other in by_opening],
        "ms": Spread.of(opened.pooled(name) * 1e3).to_json(),
        "unguarded_ms": Spread.of(opened.pooled(UNGUARDED) * 1e3).to_json(),
    }


def measure_opening(shop: Workshop, phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """Sessions that are opened and closed again, one at a time."""
    variants = few_goals() if args.quick else goals()
    opens = {name: partial(Decoder, path, shop.shape, args.threads) for name, path in shop.subjects(variants).items()}
    times = interleaved(opens, UNGUARDED, asked(args, BUDGETS[phase]), warm_up=1)  # closing is not timed
    rows = []
    for name in opens:
        found = ratio(times, name, UNGUARDED)
        say(f"{shop.precision}/{phase} {name}: {found.median:.4f}x")
        spreads = {"ratio": found.to_json(), "ms": Spread.of(times[name] * 1e3).to_json()}
        rows.append({"name": name, "guarded": name not in (UNGUARDED, AGAIN), **spreads})
    return {"shape": shop.shape.told, "precision": shop.precision, "rows": rows}


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
    for variant in goals():
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
    in_huge_pages()
    main()
