"""The subjects of `gpu.py`: guards, the folders that they are in, and what opens them on a runtime."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
from engine_profiles import DECODE, PREFILL
from guarding import ALWAYS_OPEN, guarded, write_directions
from shapes import Shape, llava_folder

from vlmguard.exporter.engines.build_engine import BuildOptions, Engine, build_engine, capabilities_of
from vlmguard.exporter.engines.engine_graphs import derive_engine_graph
from vlmguard.exporter.engines.profile import EngineProfile, decoder_shapes
from vlmguard.exporter.engines.verify_engines import Rolled, rolled
from vlmguard.exporter.proof.inputs import ProofInputs
from vlmguard.graphs.extras import install_command
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.modes import MODES, Mode, Positions, guard_mode
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.tensorrt import require_readable, settle_sizes
from vlmguard.runtime.decoder import DecoderSession, open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.guarded import open_guarded_package
from vlmguard.runtime.tensorrt.backend import Backend, find_backend
from vlmguard.runtime.tensorrt.cuda import Cuda
from vlmguard.runtime.tensorrt.decoder_engines import DecoderEngines
from vlmguard.runtime.tensorrt.engine_runner import TensorRTRunner

RANK = 4
STAND_IN = "onnxruntime-cpu"
UNGUARDED = "unguarded"


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
        row = guard_mode(self.mode)
        return GuardSpec(
            mode=cast(Mode, self.mode),
            rank=RANK,
            tau=ALWAYS_OPEN if row.has_threshold else None,
            alpha=0.1 if row.has_alpha else None,
            positions=cast(Positions, self.positions),
            lowering=self.lowering,
        )


# Every mode as `--target tensorrt` writes it; the first are the most telling, should the time run out.
SUBJECTS = (
    *(Subject(mode, "rank1", "last") for mode in ("restore", "supervise")),
    *(Subject(mode, "rank1", "last") for mode in MODES if mode not in ("restore", "supervise")),
    Subject("restore", "rank1", "all"),
    Subject("restore", "lowrank", "last"),
    Subject("project", "dense", "all"),
)
HOOKS = Subject("restore", "hooks", "last")


@dataclass(frozen=True)
class Opened:
    """One decoder, and how many kernels its engine has in each phase."""

    session: DecoderSession
    kernels: tuple[int, ...] = ()


class LeftOut(Exception):
    """A runtime that cannot run on this machine at all."""


@dataclass(frozen=True)
class Workshop:
    """An unguarded folder, and a place beside it for guarded copies (beside: so that weights can be linked)."""

    shape: Shape
    checkpoint: Path
    model: Path
    directions: Path
    copies: Path
    expected: dict[str, Rolled] = field(default_factory=dict)
    unguarded: dict[str, Opened] = field(default_factory=dict)

    def folder(self, subject: Subject | None) -> Path:
        if subject is None:
            return self.model
        out = self.copies / subject.name.replace(" ", "-")
        if not out.is_dir():
            guarded(self.model, out, self.directions, subject.spec)
        return out

    def on_the_cpu(self, subject: Subject | None) -> Rolled:
        """What ONNX Runtime gives on the CPU; once for all runtimes."""
        name = UNGUARDED if subject is None else subject.name
        if name not in self.expected:
            session = open_decoder(open_package(self.folder(subject)), runtime=STAND_IN)
            self.expected[name] = rolled(session, random_inputs(self.shape))
            session.close()
        return self.expected[name]


@contextmanager
def open_workshop(shape: Shape, models: Path) -> Iterator[Workshop]:
    checkpoint, model = llava_folder(shape, models)
    copies = Path(tempfile.mkdtemp(prefix=".guarded-", dir=model.parent))
    try:
        directions = write_directions(
            copies / "directions.safetensors", shape.hidden_size, shape.num_hidden_layers, RANK
        )
        yield Workshop(shape, checkpoint, model, directions, copies)
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def open_subject(shop: Workshop, subject: Subject | None, runtime: str, args: argparse.Namespace) -> Opened:
    package = open_package(shop.folder(subject))
    if not runtime.startswith("tensorrt"):
        return Opened(open_decoder(package, runtime=STAND_IN if args.dry_run else runtime))
    backend = find_backend(runtime)
    device = None if args.dry_run else _usable_device(backend)  # before anything is built
    timings = shop.model.parent / f"{runtime}.timings"  # of every build on this machine: the next ones take seconds
    engines = [
        _built(backend, package, graph, profile, timings)
        for graph, profile in zip(_graphs(package, subject), (PREFILL, DECODE), strict=True)
    ]
    kernels = tuple(engine.layers.of_profile(0).kernels for engine in engines)
    if device is None:
        return Opened(open_decoder(package, runtime=STAND_IN), kernels)
    runners = (
        TensorRTRunner(engine.plan, hashlib.sha256(engine.plan).hexdigest(), backend, device) for engine in engines
    )
    return Opened(DecoderSession(DecoderEngines(*runners), package.kv_heads, package.head_size), kernels)


def _usable_device(backend: Backend) -> Cuda:
    """The GPU.

    Raises:
        LeftOut: the backend builds no engines for it.
    """
    device = Cuda()
    capability, known = ".".join(map(str, device.compute_capability)), capabilities_of(backend)
    if backend.is_rtx and known and capability not in known:
        raise LeftOut(
            f"{backend.name} {backend.version} builds nothing for compute capability {capability} ({device.name}); "
            f"run: {install_command('tensorrt')}"
        )
    return device


def _graphs(package: ModelPackage, subject: Subject | None) -> tuple[ir.Model, ir.Model]:
    """What the builder gets for prefill and for decode steps."""
    prefill, decode = package.load_decoder(), package.load_decoder()
    if subject is not None:
        manifest = read_manifest(package.root)
        folder = package.root, manifest, open_guarded_package(package.root, manifest)
        prompts, steps = derive_engine_graph(*folder, "decoder"), derive_engine_graph(*folder, "decode_step")
        prefill = prefill if prompts is None else prompts.model
        decode = decode if steps is None else steps.model
    for model in (prefill, decode):
        settle_sizes(model)
        require_readable(model, str(package.decoder))
    return prefill, decode


def _built(backend: Backend, package: ModelPackage, model: ir.Model, profile: EngineProfile, timings: Path) -> Engine:
    shapes = decoder_shapes(model.graph, profile, {}, (package.kv_heads, package.head_size))
    return build_engine(backend, model, package.decoder, [shapes], BuildOptions(timing_cache=timings), lambda *_: None)


def random_batch(shape: Shape, tokens: int, rows: int = 1) -> PromptBatch:
    """Random embeddings, the same for the same number of tokens."""
    random = np.random.default_rng(tokens)
    embeds = random.normal(scale=0.05, size=(rows, tokens, shape.hidden_size)).astype(np.float16)
    ids = random.integers(3, shape.vocab_size, size=(rows, tokens))
    return PromptBatch(ids, np.ones_like(ids), embeds)


def random_inputs(shape: Shape) -> ProofInputs:
    """One prompt of random embeddings, and another one as its text-only prompt, toward which some guards edit."""
    return ProofInputs((random_batch(shape, 40),), (random_batch(shape, 24),), "random embeddings")
