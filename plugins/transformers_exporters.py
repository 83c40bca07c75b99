"""A step behind transformers' own exporter: what `OnnxExporter` made becomes a guarded folder that transformers loads.

    inputs = processor(text=..., images=..., return_tensors="pt", padding=True)
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
    vlmguard.guard_exported(exported, "guarded", processor=processor, inputs=inputs, directions="directions.safetensors")
    ExportedModel.from_pretrained("guarded")(**inputs)

A folder that `save_pretrained` wrote is a model folder like any other (`vlmguard-export FOLDER OUT`); what is missing there is
what the exporter does not write: tokenizer and processor, and inputs for a graph that takes more than tokens (a whole
vision-language model in one graph takes `pixel_values`, and only the exporting code defines their form).

transformers' runner gives a graph the inputs that it was traced with and no other: modes `supervise` and `combined`, whose
graphs want the text-only coordinates too, are run by `GuardedVLM` or another app.
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
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.exporters.base import ExportedModel


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
    """Guard what transformers' ONNX exporter made, prove the guard, write the guarded folder.

    Args:
        exported: what `OnnxExporter().export(...)` or `.export_for_generation(...)` gave, or the folder it was saved to.
        out: the folder to write.
        processor: tokenizer or processor, saved beside the graphs: with it anchors can be read and prompts be proved on.
        inputs: what the model was exported with, `export`'s second argument: the proof runs on it. For a model in one graph;
            needed where that takes more than tokens.
        spec: what is wanted; default: chosen as `vlmguard.export` does.
        config: a `guard.toml` instead.
        directions: a directions file; default: extracted from anchors.
        anchors: anchor pairs to extract from; default: the built-in ones.
        calibration: labelled prompts to calibrate on; default: anchors that are kept back.
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
        given = [_inputs_file(folder, inputs, Path(temporary) / "inputs.npz")] if inputs is not None else []
        return export(
            folder,
            out,
            spec=spec,
            config=config,
            directions=directions,
            anchors=anchors,
            calibration=calibration,
            proof_inputs=given,
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
