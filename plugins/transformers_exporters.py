"""Guards the output of transformers' own ONNX exporter: the result is a guarded folder that transformers loads.

    inputs = processor(text=..., images=..., return_tensors="pt", padding=True)
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
    vlmguard.guard_exported(exported, "guarded", processor=processor, inputs=inputs, directions="directions.safetensors")
    ExportedModel.from_pretrained("guarded")(**inputs)

A folder written by `save_pretrained` is an ordinary model folder (`vlmguard-export FOLDER OUT`). It lacks what the exporter
does not write: tokenizer, processor, and example inputs for a graph that takes more than tokens. A vision-language model in
one graph takes `pixel_values`, and only the exporting code knows their format.

transformers' runner feeds the inputs that the graph was traced with, and no others. Graphs of the modes `supervise` and
`combined` also take the text-only coordinates, so run those with `GuardedVLM` or your own code.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..exporter.export_result import ExportResult
from ..exporter.pipeline import export
from ..exporter.prompts.labelled import Sources
from ..graphs.errors import ExtraMissing, GuardError
from ..graphs.extras import install_command
from ..graphs.graph_io import load_graph
from ..graphs.layouts import open_package
from ..graphs.progress import ProgressCallback, ignore_progress
from ..graphs.spec import GuardSpec

if TYPE_CHECKING:
    from transformers.exporters.base import ExportedModel
    from transformers.processing_utils import ProcessorMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def guard_exported(
    exported: ExportedModel | Path | str,
    out: Path | str,
    *,
    processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Any] | None = None,
    spec: GuardSpec | None = None,
    config: Path | str | None = None,
    directions: Path | str | None = None,
    anchors: Sources | None = None,
    calibration: Sources | None = None,
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Guard the output of transformers' ONNX exporter, prove the guard, write the guarded folder.

    Args:
        exported: the result of `OnnxExporter().export(...)` or `.export_for_generation(...)`, or the folder it was saved to.
        out: the folder to write.
        processor: tokenizer or processor, saved beside the graphs; extraction and the proof on prompts need it.
        inputs: the second argument of the exporter's `export`: the proof runs on it. For a model in one graph; required if
            that graph takes more than tokens.
        spec: the guard to write; default: chosen as in `vlmguard.export`.
        config: a `guard.toml` file in place of `spec`.
        directions: a directions file; default: extracted from `anchors`.
        anchors: sources of anchor pairs; default: the built-in pairs.
        calibration: sources of labelled prompts; default: held-out anchors.
        force: replace `out`.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
        ExtraMissing: transformers is not installed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vlmguard-") as temporary,
        _folder(exported, processor, temporary) as folder,
    ):
        proof_inputs = [_inputs_file(folder, inputs, Path(temporary) / "inputs.npz")] if inputs is not None else []
        return export(
            folder,
            out,
            spec=spec,
            config=config,
            directions=directions,
            anchors=anchors,
            calibration=calibration,
            proof_inputs=proof_inputs,
            force=force,
            report_progress=report_progress,
        )


@contextlib.contextmanager
def _folder(exported: Any, processor: Any, temporary: str) -> Iterator[Path]:
    """The export on disk."""
    if isinstance(exported, Path | str):
        if processor is not None:
            raise GuardError(
                f"{exported}: is a folder already, a processor is for a model in memory; save it there with save_pretrained"
            )
        yield Path(exported)
        return
    if str(getattr(exported, "export_format", None)) != "onnx":
        raise GuardError(
            f"a {type(exported).__name__} of format {getattr(exported, 'export_format', None)} was given, the guard goes into "
            "ONNX; export with OnnxExporter, or name the folder"
        )
    folder = Path(temporary) / "exported"
    exported.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    yield folder


def _inputs_file(folder: Path, inputs: Mapping[str, Any], path: Path) -> Path:
    """The inputs as the graph names them, in a file for the proof.

    Raises:
        GuardError: there are several decoder graphs, each with inputs of its own.
    """
    try:
        from transformers.exporters.utils import onnx_inputs
    except ImportError:
        raise ExtraMissing(
            "inputs of a transformers export are named by transformers, which is not installed; "
            f"run: {install_command('torch')}"
        ) from None
    package = open_package(folder)
    if package.others:
        graphs = ", ".join(sorted(path.name for path in (package.decoder, *package.others)))
        raise GuardError(f"inputs are for a model in one graph, this export has {graphs}; leave them out")
    names = [value.name or "" for value in load_graph(package.decoder).graph.inputs]
    arrays: dict[str, Any] = {name: _array(tensor) for name, tensor in onnx_inputs(names, dict(inputs)).items()}
    np.savez(path, **arrays)
    return path


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()  # numpy has no bfloat16
