"""`GuardedVLM`: a guarded folder, opened only if it is what its manifest says, and run as any app would run it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..graphs.anatomy import guarded_layers
from ..graphs.errors import ManifestMismatch
from ..graphs.fold import FOLD, folded_weights
from ..graphs.manifest import Manifest, read_manifest, require_intact
from ..graphs.package import ModelPackage, open_package
from .vlm import Request, Sampling, VisionLanguageModel


class GuardedVLM(VisionLanguageModel):
    """A guarded vision-language model (or text decoder).

    In mode `supervise` every answer takes a text-only pass first; nothing of that shows here.

    Attributes:
        manifest: the folder's `guard.json`.
    """

    def __init__(self, package: ModelPackage, manifest: Manifest, runtime: str = "onnxruntime") -> None:
        for view, record in zip(package.views(), manifest.decoders, strict=True):
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
        if manifest.proved != "full":
            raise ManifestMismatch(
                f"{package.root}: only the structure of its guard was proved, nothing was run; run "
                "`vlmguard verify --run` with --source first"
            )
        super().__init__(package, runtime=runtime)
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path | str, runtime: str = "onnxruntime") -> GuardedVLM:
        """Open a guarded folder.

        Raises:
            ManifestMismatch: no manifest, any file's digest differs from it, or the decoder carries no such guard.
        """
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        require_intact(folder, manifest, again=False)
        return cls(open_guarded_package(folder, manifest), manifest, runtime)

    def generate(
        self,
        prompt: str,
        image: Image.Image | Path | str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """One answer."""
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return self.answer([Request(prompt, image)], sampling)[0]

    def generate_stream(
        self,
        prompt: str,
        image: Image.Image | Path | str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """One answer, in pieces as they come."""
        yield from self.stream(Request(prompt, image), Sampling(max_new_tokens, temperature, top_p, seed))


def open_guarded_package(folder: Path, manifest: Manifest) -> ModelPackage:
    """The package around the decoders that the manifest names, in its order.

    Raises:
        ManifestMismatch: the folder holds others.
    """
    views = {view.decoder.relative_to(view.root).as_posix(): view for view in open_package(folder).views()}
    listed = [record.path for record in manifest.decoders]
    if sorted(views) != sorted(listed):
        raise ManifestMismatch(
            f"{folder}: holds the decoders {', '.join(sorted(views))}, the manifest lists {', '.join(listed)}; export again"
        )
    return replace(views[listed[0]], others=tuple(views[name].decoder for name in listed[1:]))
