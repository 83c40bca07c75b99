"""vlmguard: bake VLM-Guard's safety steering (arXiv 2502.10486) into an exported model's graph, and prove it is there.

    import vlmguard

    vlmguard.export("model.onnx", directions="directions.safetensors")
    vlm = vlmguard.GuardedVLM.open("model-guarded")
    print(vlm.generate("What is in this picture?", image="photo.png"))

Importing this imports neither torch nor a runtime: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter.checkpoints.convert import convert_checkpoint
    from .exporter.pipeline import ExportResult, export, extract_directions, inspect
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
    "ExportResult": ".exporter.pipeline",
    "GuardError": ".graphs.errors",
    "GuardSpec": ".graphs.spec",
    "GuardedVLM": ".runtime.guarded",
    "Verification": ".exporter.proof.verify",
    "convert_checkpoint": ".exporter.checkpoints.convert",
    "export": ".exporter.pipeline",
    "extract_directions": ".exporter.pipeline",
    "guard_exported": ".plugins.transformers_exporters",
    "inspect": ".exporter.pipeline",
    "read_directions": ".graphs.directions",
    "verify": ".exporter.proof.verify",
}

__all__ = [
    "DecoderAnatomy",
    "Directions",
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
