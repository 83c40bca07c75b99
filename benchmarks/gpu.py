"""What the guard costs on a GPU, and whether it does there what it does on the CPU. One script for any machine that has one.

    python benchmarks/gpu.py                                    # every backend that is installed, the 0.5B shape
    python benchmarks/gpu.py --shape qwen2.5-7b --only rank1    # the large shape; subjects whose name holds `rank1`
    python benchmarks/gpu.py --runtime onnxruntime-cpu --shape tiny --quick     # no GPU: shows that the script runs

The model is a LLaVA with a decoder of that shape, random weights, float16, exported by vlmguard; guard on ALL layers, rank 4.
Per runtime: (1) the guarded decoder gives what ONNX Runtime gives on the CPU, prefill and 16 decode steps, in every mode, and
by less than what the guard moves; (2) guarded against unguarded, paired, `decode` (one token on a cache of 512) and `prefill`
(256 tokens), `rank1`, `lowrank` and `dense` side by side. PyTorch with forward hooks is a runtime of its own. A plan that
does not run on this GPU at all is a result too, with the runtime's own reason. Each runtime is a part of the result file;
`report.py` puts them into docs/tensorrt.md.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from guarding import ALWAYS_OPEN, guarded, write_directions
from measure import QUICK, Budget, Spread, asked, interleaved, ratio, say
from record import parser, write_result
from shapes import SHAPES, Shape, llava_folder
from torch_decoder import TorchDecoder

from vlmguard.exporter.engines.build_engine import BuildOptions, build_engine
from vlmguard.exporter.engines.engine_folder import plan_parts
from vlmguard.exporter.engines.profile import EngineProfile, Span
from vlmguard.exporter.engines.verify_engines import rolled, same_outputs
from vlmguard.exporter.proof.inputs import ProofInputs
from vlmguard.exporter.proof.limits import TOLERANCE
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES, Mode, Positions
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.tensorrt import settle_sizes
from vlmguard.runtime.decoder import DecoderSession, open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.tensorrt.backend import find_backend
from vlmguard.runtime.tensorrt.cuda import Cuda
from vlmguard.runtime.tensorrt.engine_runner import TensorRTRunner

RANK = 4
PHASES = {"decode": (1, 512), "prefill": (256, 0)}  # tokens of the call, tokens in the cache
BUDGET = Budget(least=10, most=300, seconds=20)
RUNTIMES = ("tensorrt", "tensorrt_rtx", "onnxruntime-cuda", "torch")
STAND_IN = "onnxruntime-cpu"
UNGUARDED, AGAIN = "unguarded", "unguarded again"
PROFILES = (
    EngineProfile("prefill", Span(1, 1, 1), Span(1, 256, 512), Span(0, 0, 0)),
    EngineProfile("decode", Span(1, 1, 1), Span(1, 1, 1), Span(1, 512, 1024)),
)
OPENING_COORDINATE = 0.5  # fed to a supervised graph for each coordinate; it opens the gate


@dataclass(frozen=True)
class Subject:
    """One guard, its gate open, so that the edit is really made."""

    mode: str
    lowering: str
    positions: str

    @property
    def name(self) -> str:
        return f"{self.mode} {self.lowering} {self.positions}"

    @property
    def spec(self) -> GuardSpec:
        tau = None if self.mode == "project" else 0.0 if self.mode == "supervise" else ALWAYS_OPEN
        return GuardSpec(
            mode=cast(Mode, self.mode),
            rank=RANK,
            tau=tau,
            alpha=0.1 if self.mode in ("steer", "supervise") else None,
            positions=cast(Positions, self.positions),
            lowering=self.lowering,
        )


# Agreement: every mode as `--target tensorrt` writes it. Time: the lowerings side by side where all can, and each mode.
PROVED = tuple(Subject(mode, "rank1", "last") for mode in MODES)
TIMED = (
    *(Subject("project", lowering, "all") for lowering in ("rank1", "lowrank", "dense")),
    *(Subject("restore", lowering, where) for lowering in ("rank1", "lowrank") for where in ("all", "last")),
    *(Subject(mode, "rank1", "last") for mode in ("steer", "supervise")),
)


@dataclass(frozen=True)
class Opened:
    """One decoder, and how many kernels its engine has in each profile."""

    session: DecoderSession
    kernels: tuple[int, ...] = ()


def main() -> None:
    options = parser("gpu", __doc__)
    options.add_argument(
        "--runtime", action="append", choices=(*RUNTIMES, STAND_IN), help="default: all but the stand-in"
    )
    options.add_argument("--only", default="", help="part of a subject's name")
    args = options.parse_args()
    shape = SHAPES[args.shape]
    with _workshop(shape, args.models) as shop:
        for runtime in args.runtime or RUNTIMES:
            say(f"{runtime}, {shape.name}")
            try:
                found = _torch(shop, args) if runtime == "torch" else _measure(shop, runtime, args)
            except GuardError as refusal:  # not installed, no such GPU, a plan that it does not run: all are answers
                say(f"  does not run: {refusal}")
                found = {"runs": False, "why": str(refusal)}
            about = {"shape": shape.told, "rank": RANK, "gpu": gpu(), "phases": PHASES}
            write_result(args, "gpu", {**about, **found}, f"{runtime}/{shape.name}")


@dataclass(frozen=True)
class Workshop:
    """An unguarded folder, and a place beside it for guarded copies (beside: so that weights can be linked)."""

    shape: Shape
    checkpoint: Path
    model: Path
    directions: Path
    copies: Path

    def package(self, subject: Subject | None) -> ModelPackage:
        if subject is None:
            return open_package(self.model)
        out = self.copies / subject.name.replace(" ", "-")
        if not out.is_dir():
            guarded(self.model, out, self.directions, subject.spec)
        return open_package(out)


@contextmanager
def _workshop(shape: Shape, models: Path) -> Iterator[Workshop]:
    checkpoint, model = llava_folder(shape, models)
    copies = Path(tempfile.mkdtemp(prefix=".guarded-", dir=model.parent))
    try:
        directions = write_directions(
            copies / "directions.safetensors", shape.hidden_size, shape.num_hidden_layers, RANK
        )
        yield Workshop(shape, checkpoint, model, directions, copies)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


# One runtime


def _measure(shop: Workshop, runtime: str, args: argparse.Namespace) -> dict[str, Any]:
    agreement = [_agreement(shop, runtime, subject) for subject in PROVED if args.only in subject.name]
    rows = [row for subject in TIMED if args.only in subject.name for row in _costs(shop, runtime, subject, args)]
    return {"runs": True, "agreement": agreement, "rows": rows}


def _agreement(shop: Workshop, runtime: str, subject: Subject) -> dict[str, Any]:
    """The guarded decoder here against ONNX Runtime on the CPU, which must also see what the guard does."""
    package, bare = shop.package(subject), shop.package(None)
    inputs = _inputs(shop.shape)
    expected, without = (rolled(open_decoder(of, runtime=STAND_IN), inputs) for of in (package, bare))
    found = rolled(_open(package, runtime).session, inputs)
    check = same_outputs(expected, found, without, TOLERANCE["float16"], inputs.origin)
    say(f"  {subject.name}: {check.worst:.1e} of {check.limit:.0e}; {'agrees' if check.ok else 'DIFFERS'}")
    return {"mode": subject.mode, **asdict(check)}


def _costs(shop: Workshop, runtime: str, subject: Subject, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Guarded against unguarded, phase by phase; the unguarded one twice, which tells the error of the measurement."""
    opened = {UNGUARDED: _open(shop.package(None), runtime), subject.name: _open(shop.package(subject), runtime)}
    opened[AGAIN] = opened[UNGUARDED]
    added = [b - a for a, b in zip(opened[UNGUARDED].kernels, opened[subject.name].kernels, strict=True)]
    rows = []
    for phase, (tokens, past) in PHASES.items():
        calls = {name: _call(shop.shape, one.session, tokens, past) for name, one in opened.items()}
        rows.append({**asdict(subject), **_row(calls, subject.name, UNGUARDED, phase, args), "kernels_added": added})
        say(f"  {subject.name}, {phase}: {rows[-1]['ratio']['median']:.4f}x, again {rows[-1]['again']['median']:.4f}x")
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


def _open(package: ModelPackage, runtime: str) -> Opened:
    if not runtime.startswith("tensorrt"):
        return Opened(open_decoder(package, runtime=runtime))
    backend, device = find_backend(runtime), Cuda()  # no GPU is known before anything is built
    (part,) = (part for part in plan_parts(package, PROFILES, {}) if part.role == "decoder")
    model = load_graph(part.path)
    settle_sizes(model)
    shapes = [shapes for _, shapes in part.profiles]
    engine = build_engine(backend, model, part.path, shapes, BuildOptions(), lambda *_: None)
    kernels = tuple(engine.layers.of_profile(number).kernels for number in range(len(shapes)))
    runner = TensorRTRunner(engine.plan, hashlib.sha256(engine.plan).hexdigest(), backend, device)
    return Opened(DecoderSession(runner, package.kv_heads, package.head_size), kernels)


# What is computed


def _batch(shape: Shape, tokens: int, rows: int = 1) -> PromptBatch:
    random = np.random.default_rng(tokens)
    embeds = random.normal(scale=0.05, size=(rows, tokens, shape.hidden_size)).astype(np.float16)
    ids = random.integers(3, shape.vocab_size, size=(rows, tokens))
    return PromptBatch(ids, np.ones_like(ids), embeds)


def _inputs(shape: Shape) -> ProofInputs:
    prompts = tuple(_batch(shape, tokens) for tokens in (24, 40))
    return ProofInputs(prompts, prompts, "random embeddings")


def _call(shape: Shape, session: DecoderSession, tokens: int, past: int) -> Callable[[], object]:
    """Run `tokens` tokens on a cache of `past`, and wait for the logits; every call does the same again."""
    supervisor = None
    if session.supervised:
        supervisor = np.full((1, *session.supervisor_shape), OPENING_COORDINATE, np.float32)
    prompt = _batch(shape, past or tokens)
    if not past:
        return lambda: session.last_logits(session.prefill(prompt, supervisor)[0])
    _, state = session.prefill(prompt, supervisor)
    token = _batch(shape, tokens)
    return lambda: session.last_logits(session.step(replace(state), token.ids, token.embeds))


def _torch(shop: Workshop, args: argparse.Namespace) -> dict[str, Any]:
    """The same decoder in eager PyTorch, with and without a hook per layer."""
    subject = Subject("restore", "hooks", "last")
    decoder = TorchDecoder(shop.checkpoint, shop.directions, ALWAYS_OPEN)
    rows = []
    for phase, (tokens, past) in PHASES.items():
        batch, before = _batch(shop.shape, tokens), _batch(shop.shape, past) if past else None
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
    main()
