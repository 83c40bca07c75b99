"""`trace_some_way`: one part of a model as a graph, traced by transformers' exporter."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import onnx_ir as ir

from ...graphs.decoder_state import COMMUNITY_PAST
from ..families.complex_pairs import complex_as_pairs
from ..families.family import TOTAL
from ..families.gated_delta import delta_rule_by_scan
from ..families.generic_vision import as_written
from ..families.grouped_experts import experts_in_groups
from .parts import Part
from .small_constants import small_constants_kept


def trace_some_way(model: Any, part: Part, opset: int) -> ir.Model:
    """The part traced as it is, or else in the other way that it has; what stopped both is raised for the first."""
    try:
        return trace(model, part, opset)
    except Exception:
        if part.instead is None:
            raise
        with suppress(Exception):
            return trace(model, part.instead, opset)
        raise


def trace(model: Any, part: Part, opset: int) -> ir.Model:
    """One part of the model as transformers' exporter writes it."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    config = OnnxConfig(
        dynamic=True,
        opset_version=opset,
        dynamic_shapes=_dynamic_shapes(part),
        # Else a comparison of two lengths in the model ("is the mask as long as the input?") forbids the sample's own.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with (
        quiet(),
        _runs_as(model, part),
        delta_rule_by_scan(model),
        complex_as_pairs(model),
        experts_in_groups(model),
        as_written(model),
        small_constants_kept(),
    ):
        graph = OnnxExporter().export(model, dict(part.sample), config).program
    if part.finish is not None:
        part.finish(graph.graph)
    return graph


def _dynamic_shapes(part: Part) -> dict[str, Any]:
    """The part's named axes in the format of torch.export: per argument, and per tensor of the cache."""
    from torch.export import Dim

    # torch has no word for a sum of two lengths (of the mask), nor for a multiple of another (patches, four to a token).
    # It finds both by itself, where it is not held to a name; `require_signature` sees to it that it finds no number.
    held = Counter(word for shape in part.inputs.values() for word in shape if word != TOTAL)

    if part.finish is not None:
        behind = {name: sum(isinstance(size, int) for size in shape[1:]) for name, shape in part.inputs.items()}
        return {name: dict.fromkeys(range(t.ndim - behind[name]), Dim.AUTO) for name, t in part.sample.items()}

    def axes(shape: tuple[str | int, ...]) -> dict[int, Any]:
        named = {axis: name for axis, name in enumerate(shape) if isinstance(name, str)}
        return {axis: Dim(name) if part.held and held[name] > 1 else Dim.AUTO for axis, name in named.items()}

    of_cache = [axes(tensor.shape) for tensor in part.state]
    return {name: of_cache if name == COMMUNITY_PAST else axes(part.inputs[name]) for name in part.sample}


@contextmanager
def _runs_as(model: Any, part: Part) -> Iterator[None]:
    """Within, calling the model runs this part of it; weights keep the names they have in the checkpoint."""
    model.forward = lambda **inputs: part.run(model, **inputs)
    try:
        yield
    finally:
        del model.forward  # uncovers the class's own


@contextmanager
def quiet() -> Iterator[None]:
    """torch prints its progress to stdout, which belongs to results here, and both warn about what we do on purpose."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if had_bars:
            transformers_logging.enable_progress_bar()
