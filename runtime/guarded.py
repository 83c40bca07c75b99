"""`GuardedVLM`: a guarded folder, opened only if it is what its manifest says, and run as any app would run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..graphs.anatomy import guarded_layers
from ..graphs.errors import ManifestMismatch
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
        found, promised = guarded_layers(package.load_decoder().graph), tuple(manifest.plan.get("layers", ()))
        if found != promised or not found:
            raise ManifestMismatch(
                f"{package.decoder}: carries a guard on layers {found}, the manifest promises {promised}; export again"
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
        require_intact(folder, manifest)
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
    """The package around the decoder that the manifest names."""
    package = open_package(folder / manifest.decoder)
    if package.layout == manifest.layout:
        return package
    return open_package(folder)
