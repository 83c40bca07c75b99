"""vlmguard: bake VLM-Guard's safety steering (arXiv 2502.10486) into an exported model's graph, and prove that it is there.

    import vlmguard

    result = vlmguard.export("model-folder", "guarded", mode="restore", layers="2-4")
    vlm = vlmguard.GuardedVLM.open("guarded")
    print(vlm.generate("What is in this picture?", image="photo.png"))

Guard a model
    export              plan, rewrite, prove, write a guarded folder; returns an ExportResult
    extract_directions  safety steering directions from the model itself; returns Directions
    convert_checkpoint  a Hugging Face checkpoint as ONNX, without a guard
    guard_exported      the same as export for what transformers' ONNX exporter made
    inspect             the decoder's residual stream; returns a DecoderAnatomy
    GuardSpec           the guard, as one value: mode, layers, strength, threshold and so on
    ExportOptions       the export, as one value: directions, calibration, precision, proof, output

Use it
    GuardedVLM          open a guarded folder, generate answers
    verify              redo the proof from the files; returns a Verification
    Directions          read_directions(path), Directions.from_arrays(...), .save(path); docs/directions.md

Errors of the request or its files are GuardError: one line with what is wrong and what to do. Pictures are paths, bytes of
files, Pillow images or uint8 arrays. Importing vlmguard imports neither torch nor a runtime: each name is loaded when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter.checkpoints.convert import convert_checkpoint
    from .exporter.export_result import ExportResult
    from .exporter.extract_directions import extract_directions
    from .exporter.opened_decoder import inspect
    from .exporter.options import ExportOptions
    from .exporter.pipeline import export
    from .exporter.proof.verify import Verification, verify
    from .graphs.anatomy import DecoderAnatomy
    from .graphs.directions import Directions, read_directions
    from .graphs.errors import GuardError
    from .graphs.spec import GuardSpec
    from .plugins.transformers_exporters import guard_exported
    from .runtime.guarded import GuardedVLM

__version__ = "0.1.0"

# public name -> module that has it
_PUBLIC = {
    "DecoderAnatomy": ".graphs.anatomy",
    "Directions": ".graphs.directions",
    "ExportOptions": ".exporter.options",
    "ExportResult": ".exporter.export_result",
    "GuardError": ".graphs.errors",
    "GuardSpec": ".graphs.spec",
    "GuardedVLM": ".runtime.guarded",
    "Verification": ".exporter.proof.verify",
    "convert_checkpoint": ".exporter.checkpoints.convert",
    "export": ".exporter.pipeline",
    "extract_directions": ".exporter.extract_directions",
    "guard_exported": ".plugins.transformers_exporters",
    "inspect": ".exporter.opened_decoder",
    "read_directions": ".graphs.directions",
    "verify": ".exporter.proof.verify",
}

__all__ = [
    "DecoderAnatomy",
    "Directions",
    "ExportOptions",
    "ExportResult",
    "GuardError",
    "GuardSpec",
    "GuardedVLM",
    "Verification",
    "convert_checkpoint",
    "export",
    "extract_directions",
    "guard_exported",
    "inspect",
    "read_directions",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vlmguard' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
