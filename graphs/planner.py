"""Planning: which layers are guarded, with which numbers, in which lowering, and why. Pure; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from .anatomy import DecoderAnatomy
from .call_inputs import hides_later_padding, mask_input, readable_mask
from .directions import Directions, LayerDirections
from .errors import DirectionMismatch, GuardError
from .layer_numbers import layer_guard
from .lowerings.fold import find_writers
from .lowerings.table import FOLDED, choose_lowering
from .modes import guard_mode
from .node_builder import PREFIX
from .pairs import require_pairs
from .plan import GuardPlan, SitePlan
from .runtime_controls import knobs_of, notes_on, require_knobs
from .separation import Separation, recorded_separations, warnings_of
from .side_paths import described
from .sites import ResidualSite, find_node
from .spec import MAX_RANK, GuardSpec
from .subgraphs import find_bodies

OLDEST_OPSET = 13  # Unsqueeze and Squeeze take their axes as inputs from here on


def plan_guard(model: ir.Model, anatomy: DecoderAnatomy, directions: Directions, spec: GuardSpec) -> GuardPlan:
    """Plan what will change.

    Args:
        model: the unguarded decoder graph; it is not changed.
        anatomy: its residual stream.
        directions: the directions file's content.
        spec: the requested guard.

    Raises:
        DirectionMismatch: the directions do not fit the decoder or lack what the mode needs.
        GuardError: this graph cannot carry the requested guard.
    """
    require_unguarded(model)
    require_fitting(directions, anatomy)
    mode, notes = _mode(spec, directions)
    layers, why_layers = _layers(spec, directions, anatomy, mode)
    notes += why_layers
    ranks = [layer.ssd.shape[0] for number, layer in directions.layers.items() if number in layers]
    rank = spec.rank or max(ranks, default=1)
    lowering, reason = choose_lowering(spec.lowering, mode, spec.target, rank)
    spec.require_runtime_controls(mode)
    knobs = knobs_of(mode) if spec.knobs else ()
    if knobs:
        require_knobs(model, lowering.name, lowering.supports_runtime_controls)
    directions = _one_direction(spec, directions, layers, mode, notes)
    guards = {  # whatever order, and how often, the directions name them
        number: layer_guard(number, directions, spec, mode, notes) for number in sorted(set(layers))
    }
    sites = tuple(SitePlan(s, guards[s.layer_index]) for s in anatomy.sites if s.layer_index in guards)
    separation = () if spec.direction_of is not None else _recorded(directions, tuple(guards))
    mask = _mask(model, spec, mode)
    _require_expressible(model, sites, mode)
    if spec.supervisor == "rows":
        notes.append(require_pairs(model.graph, mask))
    if lowering is FOLDED:
        notes += _require_foldable(model, anatomy, sites, spec)
    notes += _quantized_behind(model, sites)
    notes += described(anatomy.side_paths)
    notes += notes_on(knobs, spec.gate)
    if spec.positions != "all" and not mask:
        notes.append("no attention_mask input: the last index of each call is edited, so pad on the left")
    if spec.positions != "all" and mask and hides_later_padding(model.graph):
        notes.append(
            "the KV cache has a fixed size and there are no position_ids: where a prompt is fed in parts, do not pad the later "
            "ones on the right, or their last token is not edited"
        )
    notes += warnings_of(separation)
    return GuardPlan(
        mode=mode,
        positions="prompt" if guard_mode(mode).edits_prompt_end_only else spec.positions,
        lowering=lowering.name,
        lowering_reason=reason,
        mask=mask,
        width=anatomy.width,
        decoder_layers=anatomy.layer_count,
        sites=sites,
        notes=tuple(dict.fromkeys(notes)),
        knobs=knobs,
        telemetry=spec.telemetry,
        gate=spec.gate,
        separation=separation,
        supervisor=spec.supervisor,
    )


def _recorded(directions: Directions, layers: tuple[int, ...]) -> tuple[Separation, ...]:
    """Separation of harmful and harmless anchors per layer, recorded in the directions file."""
    source = (directions.anchors or {}).get("source", "anchors")
    return recorded_separations(directions.evidence, directions.pairs, layers, source)


def _mask(model: ir.Model, spec: GuardSpec, mode: str) -> str:
    """Name of the mask that marks the last token, or ""; an unreadable mask is an error only where the guard reads it."""
    is_read = spec.positions != "all" or spec.telemetry or spec.gate == "prompt" or guard_mode(mode).supervisor
    if not is_read:
        return readable_mask(model.graph)
    mask = mask_input(model.graph)
    return "" if mask is None else mask.name or ""


def _one_direction(
    spec: GuardSpec, directions: Directions, layers: tuple[int, ...], mode: str, notes: list[str]
) -> Directions:
    """The directions, with the SSD of layer `direction_of` in every guarded layer if that is set."""
    number = spec.direction_of
    if number is None:
        return directions
    if mode != "project":
        raise GuardError(f"--direction-of is for mode project, {mode} reads each layer's own; leave it out")
    if number not in directions.layers:
        raise DirectionMismatch(
            f"the directions have no layer {number} for --direction-of, only layers "
            f"{_spell(tuple(directions.layers))}; extract them for that layer too"
        )
    notes.append(f"the direction of layer {number} in every guarded layer, as requested")
    return replace(directions, layers={layer: LayerDirections(directions.layers[number].ssd) for layer in layers})


def _require_foldable(
    model: ir.Model, anatomy: DecoderAnatomy, sites: tuple[SitePlan, ...], spec: GuardSpec
) -> list[str]:
    """Notes on the folded weights; an error if the layers differ or a writer is not linear."""
    if spec.positions != "all":
        raise GuardError("fold changes weights, so every token; use --positions all, or choose --lowering lowrank")
    absent = [number for number in range(anatomy.layer_count) if number not in {s.layer_index for s in sites}]
    if absent:
        raise GuardError(
            f"fold changes the whole stream, layer {absent[0]} is not among the requested layers; guard all of them with "
            "one direction (--direction-of N), or choose --lowering lowrank"
        )
    if any(not np.array_equal(site.guard.ssd, sites[0].guard.ssd) for site in sites):
        raise GuardError(
            "fold projects the whole stream by one direction, the layers have different ones; name the layer whose "
            "direction all of them take (--direction-of N), or choose --lowering lowrank"
        )
    writers = find_writers(model, last_sites(anatomy), anatomy.width)
    weights = {writer.weight: writer for writer in writers}
    kept = [weight.name for weight in weights if len(weight.uses()) > sum(w.weight is weight for w in writers)]
    notes = [f"fold: {len(weights)} weights write the stream, and are written again without the direction"]
    if kept:
        notes.append(f"fold: {', '.join(map(str, kept))} has other readers too (a tied head) and stays beside its copy")
    return notes


def _quantized_behind(model: ir.Model, sites: tuple[SitePlan, ...]) -> list[str]:
    """Static int8 graphs (onnxruntime's QDQ) round each sum to the range that calibration saw, and so the guarded one."""
    graphs = {body.name: body.graph for body in find_bodies(model, list({site.site.body for site in sites}))}
    layers = []
    for planned in sites:
        node = find_node(graphs[planned.site.body], planned.site.anchor)
        readers = [reader for output in node.outputs for reader in output.consumers()] if node is not None else []
        if any(reader.op_type == "QuantizeLinear" for reader in readers):
            layers.append(planned.layer_index)
    if not layers:
        return []
    return [
        f"layers {_spell(tuple(layers))}: the guarded sum is rounded to int8 right behind the guard; an edit beyond the "
        "range that the model was quantized for is cut short, so evaluate it"
    ]


def last_sites(anatomy: DecoderAnatomy) -> tuple[ResidualSite, ...]:
    """The end of the stream: the last layer's site, one per body."""
    return tuple(stream.sites[-1] for stream in anatomy.streams)


def require_unguarded(model: ir.Model) -> None:
    """Refuse a graph that already carries a guard.

    Raises:
        GuardError: some node or initializer is called `vlmguard/...`, or the metadata says that there is a guard.
    """
    names = [node.name or "" for node in model.graph.all_nodes()] + list(model.graph.initializers)
    if any(name.startswith(PREFIX) for name in names):
        raise GuardError("this decoder already carries a guard; start again from the unguarded model")
    if any(key.startswith("vlmguard.") for key in model.metadata_props):
        raise GuardError("this decoder's metadata shows a guard; start from the unguarded model")


def require_layers(spec: GuardSpec, anatomy: DecoderAnatomy) -> None:
    """Check that the requested layers are layers of the decoder.

    Raises:
        GuardError: one of them is not.
    """
    beyond = [number for number in spec.layers or () if number >= anatomy.layer_count]
    if beyond:
        raise GuardError(
            f"the decoder has no layer {beyond[0]}, only layers 0 to {anatomy.layer_count - 1}; layers count from 0"
        )


def require_fitting(directions: Directions, anatomy: DecoderAnatomy) -> None:
    """The directions have the decoder's width, and no layer that it has not.

    Raises:
        DirectionMismatch: they belong to another model.
    """
    if directions.width != anatomy.width:
        raise DirectionMismatch(
            f"the directions have width {directions.width}, the decoder has {anatomy.width}; "
            "were they extracted from another model?"
        )
    beyond = [number for number in directions.layers if number >= anatomy.layer_count]
    if beyond:
        raise DirectionMismatch(
            f"the directions are for layer {beyond[0]}, the decoder has layers 0 to {anatomy.layer_count - 1}; "
            "were they extracted from another model?"
        )


def _mode(spec: GuardSpec, directions: Directions) -> tuple[str, list[str]]:
    calibrated = directions.calibrated_layers
    if spec.mode is None:
        if directions.mode is not None:
            if guard_mode(directions.mode).edits_prompt_end_only:
                return directions.mode, [f"mode {directions.mode}: that of the directions"]
            return directions.mode, [f"mode {directions.mode}: what the directions were calibrated for"]
        if calibrated:
            return "restore", ["mode restore: the directions carry readout, target and threshold"]
        return "project", [
            "mode project: the directions carry an SSD alone; an uncalibrated projection may over-refuse or do nothing, "
            "so evaluate it, or calibrate (give --anchors too)"
        ]
    if spec.mode == "project" and directions.mode is None and not calibrated:
        return "project", [
            "mode project as requested: an uncalibrated projection may over-refuse or do nothing; evaluate it"
        ]
    if (
        guard_mode(spec.mode).has_threshold
        and spec.tau is None
        and _calibrated_for(directions) not in (None, spec.mode)
    ):
        raise DirectionMismatch(
            f"the directions' thresholds were calibrated for {directions.mode}, not for {spec.mode}; give --tau, or "
            "calibrate again with --anchors"
        )
    return spec.mode, [f"mode {spec.mode} as requested"]


def _calibrated_for(directions: Directions) -> str | None:
    """The mode that the thresholds of a directions file are for."""
    return directions.mode if directions.mode is not None and guard_mode(directions.mode).is_calibrated else None


def _layers(
    spec: GuardSpec, directions: Directions, anatomy: DecoderAnatomy, mode: str
) -> tuple[tuple[int, ...], list[str]]:
    require_layers(spec, anatomy)
    if spec.direction_of is not None:
        chosen = tuple(sorted(set(spec.layers))) if spec.layers is not None else tuple(range(anatomy.layer_count))
        return chosen, [
            f"layers {_spell(chosen)}: {'as requested' if spec.layers is not None else 'all of the decoder'}"
        ]
    if spec.layers is not None:
        absent = [number for number in spec.layers if number not in directions.layers]
        if absent:
            raise DirectionMismatch(
                f"the directions have no layer {absent[0]}, only layers {_spell(tuple(directions.layers))}; "
                "extract them for that layer too"
            )
        return tuple(sorted(set(spec.layers))), [f"layers {_spell(spec.layers)} as requested"]
    # layers chosen for another mode's edit are no guide for this mode
    if not guard_mode(mode).is_calibrated and not (directions.mode == mode and directions.recommended_layers):
        return _later_layers(directions, anatomy.layer_count)
    if directions.recommended_layers:
        chosen = directions.recommended_layers
        why = "what calibration chose" if not guard_mode(mode).edits_prompt_end_only else "chosen with the directions"
        return chosen, [f"layers {_spell(chosen)}: {why}"]
    if guard_mode(mode).has_readout and directions.calibrated_layers:
        chosen = directions.calibrated_layers
        return chosen, [f"layers {_spell(chosen)}: those that the directions calibrate"]
    chosen = tuple(directions.layers)
    return chosen, [f"layers {_spell(chosen)}: those of the directions file"]


def later_layers(numbers: Iterable[int], count: int, last: bool = False) -> tuple[tuple[int, ...], str]:
    """The layers that `align` guards without a calibration, and a description: the later two thirds without the last layer.

    Edits of the last layer bypass every other layer. On a real model they restored fewer refusals and refused more borderline
    prompts (docs/method.md).

    Args:
        numbers: of the layers that have directions.
        count: layers of the decoder.
        last: whether the last layer counts too.
    """
    available = tuple(numbers)
    later = tuple(number for number in available if number >= -(-count // 3))
    inner = tuple(number for number in later if number < count - 1)
    if inner and not last:
        return inner, "the later two thirds of the decoder without its last layer"
    return (later, "the later two thirds of the decoder") if later else (available, "those of the directions file")


def _later_layers(directions: Directions, count: int) -> tuple[tuple[int, ...], list[str]]:
    chosen, which = later_layers(directions.layers, count)
    return chosen, [f"layers {_spell(chosen)}: {which}; nothing is calibrated in mode align"]


def _require_expressible(model: ir.Model, sites: tuple[SitePlan, ...], mode: str) -> None:
    opset = model.graph.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise GuardError(
            f"the graph has opset {opset}, the guard needs {OLDEST_OPSET} or later; convert it with onnx.version_converter"
        )
    ranks = {site.guard.rank for site in sites}
    if guard_mode(mode).supervisor and len(ranks) > 1:
        raise GuardError(f"{mode} needs one rank in all layers, found {sorted(ranks)}; give --rank {min(ranks)}")
    for site in sites:
        assert 1 <= site.guard.rank <= MAX_RANK


def _spell(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
