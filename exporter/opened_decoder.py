"""Decoder graphs in memory with their anatomy, and `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..graphs.anatomy import DecoderAnatomy, dissect
from ..graphs.errors import AnatomyNotFound, ModelUnreadable
from ..graphs.operators import hidden_decoder, uncertain_layers
from ..graphs.package import ModelPackage
from ..graphs.planner import require_unguarded
from ..graphs.progress import ProgressCallback, ignore_progress
from .requests import require_path
from .sources import opened


@dataclass(frozen=True)
class OpenedDecoder:
    """A decoder graph in memory.

    Attributes:
        view: the model seen from this graph.
        graph: as the file contains it, until it is rewritten.
        anatomy: of the graph.
    """

    view: ModelPackage
    graph: ir.Model
    anatomy: DecoderAnatomy


def open_decoder_graph(view: ModelPackage) -> OpenedDecoder:
    """Read and dissect an unguarded decoder graph.

    Raises:
        GuardError: the graph is guarded already, or `dissect_decoder` fails.
    """
    graph = view.load_decoder()
    require_unguarded(graph)  # before directions are looked for: a guarded folder has some beside it
    return OpenedDecoder(view, graph, dissect_decoder(view, graph))


def dissect_decoder(package: ModelPackage, graph: ir.Model) -> DecoderAnatomy:
    """The anatomy of a package's decoder; a failure names the file.

    Args:
        package: its config declares the number of layers.
        graph: of the decoder.

    Raises:
        AnatomyNotFound: no residual stream, not the config's, or one whose layers an unknown operator makes uncertain.
        ModelUnreadable: the graph has a cycle, or functions that cannot be inlined.
    """
    try:
        anatomy = dissect(graph, package.declared_layers)
    except AnatomyNotFound as error:
        raise AnatomyNotFound(f"{package.decoder}: {hidden_decoder(graph, str(error)) or error}") from None
    except ModelUnreadable as error:
        raise ModelUnreadable(f"{package.decoder}: {error}") from None
    if package.expected_layers is None and (why := uncertain_layers(graph, anatomy.layer_count)) is not None:
        raise AnatomyNotFound(f"{package.decoder}: {why}")
    return anatomy


def require_alike(decoders: Sequence[OpenedDecoder]) -> None:
    """All decoder graphs of one folder are the same decoder, so one guard fits all of them.

    Raises:
        AnatomyNotFound: their layers or widths differ.
    """
    first = decoders[0]
    for other in decoders[1:]:
        shapes = [(decoder.anatomy.layer_count, decoder.anatomy.width) for decoder in (first, other)]
        if shapes[0] != shapes[1]:
            raise AnatomyNotFound(
                f"{other.view.decoder}: has {shapes[1][0]} layers of width {shapes[1][1]}, {first.view.decoder.name} in "
                f"the same folder {shapes[0][0]} of width {shapes[0][1]}; move it to a folder of its own"
            )


def inspect(
    model: Path | str,
    variant: str | None = None,
    report_progress: ProgressCallback = ignore_progress,
    cache: bool = True,
) -> DecoderAnatomy:
    """The residual stream of a model's decoder; a checkpoint is exported first.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        variant: precision variant of an onnx-community folder; `None` takes the one that runs.
        report_progress: called with `(stage, done, total)`.
        cache: take a checkpoint's export from the user's cache, and keep it there.

    Raises:
        GuardError: the model cannot be opened, or no residual stream was found, with the reason.
    """
    require_path(model, "model")
    with opened(model, variant, report_progress, cache=cache) as source:
        return dissect_decoder(source.package, source.package.load_decoder())
