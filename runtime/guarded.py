"""`GuardedVLM`: opens a guarded folder only if its files match its manifest, and runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..graphs.anatomy import guarded_layers
from ..graphs.errors import GuardError, ManifestMismatch
from ..graphs.layouts import open_package, variant_of
from ..graphs.lowerings.fold import FOLD, folded_weights
from ..graphs.manifest import Manifest, read_manifest, require_intact
from ..graphs.package import ModelPackage
from .defaults import MAX_NEW_TOKENS
from .generation import Request, Sampling
from .images.open_picture import Picture
from .knobs import Knobs
from .runner_protocol import Runner
from .telemetry import ScoredAnswer, scored
from .vlm import OpenPart, VisionLanguageModel


class GuardedVLM(VisionLanguageModel):
    """A guarded vision-language model (or text decoder).

    In mode `supervise` every answer takes a text-only pass first; nothing of that shows here.

    Attributes:
        manifest: the folder's `guard.json`; the first of its decoders is the one that runs here.
    """

    def __init__(
        self,
        package: ModelPackage,
        manifest: Manifest,
        runtime: str = "onnxruntime",
        open_part: OpenPart | None = None,
        pads: bool | None = None,
    ) -> None:
        if open_part is None:
            require_guard(package, manifest)
        # an engine's graph cannot be read
        pairs = None if open_part is None else manifest.plan.get("supervisor") == "rows"
        super().__init__(package, runtime=runtime, open_part=open_part, pads=pads, pairs=pairs)
        self.manifest = manifest

    def __repr__(self) -> str:
        plan = self.manifest.plan
        return f"GuardedVLM({str(self.package.root)!r}, {plan['mode']} on layers {plan['layers']})"

    @classmethod
    def open(cls, folder: Path | str, runtime: str | None = None, variant: str | None = None) -> GuardedVLM:
        """Open a guarded folder, of graphs or of engines.

        Args:
            folder: output of `vlmguard-export` or `vlmguard engine`.
            runtime: runtime for graphs, a row of the table in `runners`; default `onnxruntime`. Engines run in the runtime
                that built them.
            variant: precision variant of an onnx-community folder, by its file's suffix; default: the one that runs.

        Raises:
            ManifestMismatch: there is no manifest, a file's digest differs from it, the decoder lacks the recorded guard, or
                the guard was never run.
            GuardError: the folder holds engines and `runtime` names another runtime.
        """
        return _open(cls, Path(folder).absolute(), runtime, proved_only=True, variant=variant)

    @classmethod
    def open_unproved(cls, folder: Path | str) -> GuardedVLM:
        """Open a folder whose guard has not been run yet, for the proof that runs it; everything else is checked."""
        return _open(cls, Path(folder).absolute(), None, proved_only=False)

    def generate(
        self,
        prompt: str,
        image: Picture | Sequence[Picture] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        strength: float | None = None,
        threshold_offset: float | None = None,
    ) -> str:
        """One answer.

        Args:
            prompt: text of the question.
            image: path or bytes of a file, a Pillow image, or an array `[height, width]` or `[height, width, 3 or 4]` of
                uint8; several as a list or tuple; `None` for text only.
            max_new_tokens: longest answer, in tokens.
            temperature: 0 is greedy; above, softmax(logits / temperature) is sampled.
            top_p: total probability of the likeliest tokens that are sampled among.
            seed: random seed for sampling.
            strength: of a guard with knobs: 0 only measures, 1 is as calibrated, 2 is the highest.
            threshold_offset: offset to the gate thresholds of a guard with knobs.

        Raises:
            GuardError: the graph has no such knob, or the prompt, the picture or a number cannot be taken.
        """
        pieces = self.generate_stream(
            prompt, image, max_new_tokens, temperature, top_p, seed, strength, threshold_offset
        )
        return "".join(pieces)

    def generate_stream(
        self,
        prompt: str,
        image: Picture | Sequence[Picture] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        strength: float | None = None,
        threshold_offset: float | None = None,
    ) -> Iterator[str]:
        """One answer, in pieces as they come; errors as for `generate`.

        Args:
            prompt: text of the question.
            image: path or bytes of a file, a Pillow image, or an array `[height, width]` or `[height, width, 3 or 4]` of
                uint8; several as a list or tuple; `None` for text only.
            max_new_tokens: longest answer, in tokens.
            temperature: 0 is greedy; above, softmax(logits / temperature) is sampled.
            top_p: total probability of the likeliest tokens that are sampled among.
            seed: random seed for sampling.
            strength: of a guard with knobs: 0 only measures, 1 is as calibrated, 2 is the highest.
            threshold_offset: offset to the gate thresholds of a guard with knobs.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        yield from self.stream(Request(prompt, image), sampling, Knobs(strength, threshold_offset))

    def generate_scored(
        self,
        prompt: str,
        image: Picture | Sequence[Picture] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        strength: float | None = None,
        threshold_offset: float | None = None,
    ) -> ScoredAnswer:
        """One answer, and what the gates compared while it was made.

        Args:
            prompt: text of the question.
            image: path or bytes of a file, a Pillow image, or an array `[height, width]` or `[height, width, 3 or 4]` of
                uint8; several as a list or tuple; `None` for text only.
            max_new_tokens: longest answer, in tokens.
            temperature: 0 is greedy; above, softmax(logits / temperature) is sampled.
            top_p: total probability of the likeliest tokens that are sampled among.
            seed: random seed for sampling.
            strength: of a guard with knobs: 0 only measures, 1 is as calibrated, 2 is the highest.
            threshold_offset: offset to the gate thresholds of a guard with knobs.

        Raises:
            GuardError: as for `generate`, or the graph has no telemetry.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return scored(self, self.manifest.plan, Request(prompt, image), sampling, Knobs(strength, threshold_offset))


def _open(
    cls: type[GuardedVLM], folder: Path, runtime: str | None, proved_only: bool, variant: str | None = None
) -> GuardedVLM:
    manifest = open_manifest(folder, proved_only)
    if manifest.engines:
        if variant is not None:
            raise GuardError(f"{folder}: holds engines, which have no variants; leave the variant out")
        return _open_engines(cls, folder, manifest, runtime)
    return cls(*open_variant(folder, manifest, variant), runtime or "onnxruntime")


def open_variant(folder: Path, manifest: Manifest, variant: str | None) -> tuple[ModelPackage, Manifest]:
    """The graphs of a guarded folder and its manifest, both seen from the decoder of one precision.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        variant: suffix of the decoder's file, "" for the plain one; `None`: the decoder that runs.

    Raises:
        ManifestMismatch: the folder holds other decoders than the manifest.
        ModelUnreadable: the folder has no such variant.
    """
    package = open_guarded_package(folder, manifest)
    if variant is None:
        return package, manifest
    package = variant_of(package, variant)
    return package, manifest.seen_from(package.decoder.relative_to(folder).as_posix())


def open_manifest(folder: Path, proved_only: bool = True, besides: str = "") -> Manifest:
    """Read a guarded folder's manifest and check the folder's files against it.

    Args:
        folder: the guarded folder.
        proved_only: require that the guard was run, in the model or on its own.
        besides: as for `require_intact`.

    Raises:
        ManifestMismatch: there is no manifest, a file differs from it, or the guard was never run.
    """
    manifest = read_manifest(folder)
    require_intact(folder, manifest, again=False, besides=besides)
    if proved_only and manifest.proved == "structure":
        raise ManifestMismatch(
            f"{folder}: only the structure of its guard was proved, nothing was run; run "
            "`vlmguard verify --run` with --source first"
        )
    return manifest


def package_of(folder: Path, manifest: Manifest) -> ModelPackage:
    """The graphs of a guarded folder, or the engines in their place."""
    if not manifest.engines:
        return open_guarded_package(folder, manifest)
    parts = {engine.role: folder / engine.path for engine in manifest.engines}
    vision, embed = parts.get("vision_encoder"), parts.get("embed_tokens")
    return ModelPackage(folder, parts["decoder"], "engines", vision_encoder=vision, embed_tokens=embed)


def _open_engines(cls: type[GuardedVLM], folder: Path, manifest: Manifest, runtime: str | None) -> GuardedVLM:
    """Engines are opened by their own backend, each against the digest that it was built with."""
    from .tensorrt.backend import find_backend
    from .tensorrt.cuda import Cuda
    from .tensorrt.decoder_engines import DecoderEngines
    from .tensorrt.engine_runner import TensorRTRunner

    decoder = next(engine for engine in manifest.engines if engine.role == "decoder")
    if runtime not in {None, decoder.backend}:
        raise GuardError(
            f"{folder}: holds engines of {decoder.backend}, {runtime} cannot run them; leave the runtime out"
        )
    backend, device = find_backend(decoder.backend), Cuda()  # one device: a part reads what another left there

    package = package_of(folder, manifest)
    step = next((folder / engine.path for engine in manifest.engines if engine.role == "decode_step"), None)

    def open_engine(path: Path) -> TensorRTRunner:
        digest = manifest.files[path.relative_to(folder).as_posix()].sha256
        assert digest is not None  # an engine never goes unhashed
        return TensorRTRunner(path, digest, backend, device)

    def open_part(path: Path) -> Runner:
        opened = open_engine(path)
        return DecoderEngines(opened, open_engine(step)) if path == package.decoder and step is not None else opened

    return cls(package, manifest, decoder.backend, open_part, decoder.pads)


def require_guard(package: ModelPackage, manifest: Manifest) -> None:
    """Every decoder graph carries the guard that the manifest promises."""
    records = {record.path: record for record in manifest.decoders}
    for view in package.views():
        record = records[view.decoder.relative_to(view.root).as_posix()]
        graph, promised = view.load_decoder().graph, tuple(record.plan.get("layers", ()))
        if record.plan.get("lowering") == FOLD:  # no node bears a layer's number: the weights are counted
            complete = len(folded_weights(graph)) == record.report.get("initializers")
            found = promised if complete and folded_weights(graph) else ()
        else:
            found = guarded_layers(graph)
        if found != promised or not found:
            raise ManifestMismatch(
                f"{view.decoder}: carries a guard on layers {found}, the manifest promises {promised}; export again"
            )


def open_guarded_package(folder: Path, manifest: Manifest) -> ModelPackage:
    """The package around the decoders that the manifest names, in its order.

    Raises:
        ManifestMismatch: the folder holds others, or graphs beside them that its layout has no place for.
    """
    package = open_package(folder, trust_links=True)
    views = {view.decoder.relative_to(view.root).as_posix(): view for view in package.views()}
    listed = [record.path for record in manifest.decoders]
    if sorted(views) != sorted(listed):
        raise ManifestMismatch(
            f"{folder}: holds the decoders {', '.join(sorted(views))}, the manifest lists {', '.join(listed)}; export again"
        )
    if package.left_out:
        raise ManifestMismatch(
            f"{folder}: holds {package.left_out[0]} beside its decoders, a graph that no proof is about; remove it, or export "
            "again"
        )
    return replace(views[listed[0]], others=tuple(views[name].decoder for name in listed[1:]))
