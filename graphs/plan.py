"""The plan: what WILL change, as sorted plain data, with the reason for each choice. Pure; changes nothing.

`--dry-run` prints it, a golden file pins it, the manifest keeps it. `rewrite` makes these changes and no other.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .modes import guard_mode
from .reference import LayerGuard
from .runtime_controls import PAST_GATE_INPUT, PRESENT_GATE_OUTPUT, SCORES_OUTPUT
from .separation import Separation, warnings_of
from .sites import ResidualSite

PLAN_SCHEMA = "vlmguard.plan/1"
SUPERVISOR_INPUT = "vlmguard.supervisor"
# Positions `prompt`: the coordinates go into the call with the prompt's end, `reference.NO_SUPERVISOR` into every other. The
# name differs, because a runner that feeds the coordinates in every call would garble answers.
PROMPT_SUPERVISOR_INPUT = "vlmguard.prompt_supervisor"
SUPERVISOR_INPUTS = (SUPERVISOR_INPUT, PROMPT_SUPERVISOR_INPUT)
# The same coordinates as one input for each number, `[batch, 1, 1]`: no node has to slice them (TensorRT, one token a call).
_NUMBER_INPUT = re.compile(re.escape(SUPERVISOR_INPUT) + r"\.([0-9]{1,9})\.([0-9]{1,9})")
COORDINATES_OUTPUT = "vlmguard.coordinates"
# The calls that a graph takes: any, or those whose mask has a column for each token so far and no more (`engine_plans`).
Calls = Literal["any", "whole"]


def number_input(layer: int, row: int) -> str:
    """Name of the input for one layer's text-only coordinate along one row of its direction."""
    return f"{SUPERVISOR_INPUT}.{layer}.{row}"


def number_of_input(name: str) -> tuple[int, int] | None:
    """`(layer, row)` of an input named by `number_input`; `None` for any other name."""
    match = _NUMBER_INPUT.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def is_supervisor_input(name: str) -> bool:
    """Whether an input carries text-only coordinates, stacked or as single numbers."""
    return name in SUPERVISOR_INPUTS or number_of_input(name) is not None


@dataclass(frozen=True)
class SitePlan:
    """One layer to be guarded: where, and with which numbers."""

    site: ResidualSite
    guard: LayerGuard

    @property
    def layer_index(self) -> int:
        return self.site.layer_index

    def to_json(self, mode: str) -> dict[str, Any]:
        """Readable numbers in full, long arrays as digests of their float32 bytes."""
        shown: dict[str, Any] = {
            "layer": self.layer_index,
            "kind": self.site.kind,
            "body": self.site.body,
            "anchor": self.site.anchor,
            "value": self.site.value,
            "residual": self.site.residual,
            "branch": self.site.branch,
            "dtype": self.site.dtype,
            "rank": self.guard.rank,
            "ssd_sha256": _digest(self.guard.ssd),
        }
        if guard_mode(mode).has_threshold:
            shown["tau"] = self.guard.threshold
        if guard_mode(mode).has_alpha:
            shown["alpha"] = self.guard.alpha
        if "origin" in guard_mode(mode).numbers:
            shown["origin"] = self.guard.origin.tolist()
        if "text_shift" in guard_mode(mode).numbers:
            shown["text_shift"] = self.guard.text_shift
        if guard_mode(mode).has_readout:
            shown["target"] = self.guard.target.tolist()
            shown["readout_sha256"] = _digest(self.guard.readout)
        return shown


@dataclass(frozen=True)
class GuardPlan:
    """Everything that the rewrite will do.

    Attributes:
        mode, positions, lowering: as in `GuardSpec`, decided.
        lowering_reason: why this lowering.
        mask: name of the attention mask that `last` reads, or "" for the last index of each call.
        width: hidden size.
        sites: one per guarded layer and body, by layer; the bodies share one `LayerGuard`.
        notes: notes for the user, each a sentence.
        knobs: names of the inputs with defaults, empty without `--knobs`.
        telemetry, gate: as in `GuardSpec`.
        supervisor: as in `GuardSpec`; or `numbers` for a graph of decode steps: each coordinate is an input of its own, and
            the graph does not output its own coordinates.
        calls: which calls the graph takes. Other than `any`: the graph is for TensorRT alone.
        separation: how well each guarded layer's direction separates harmful from harmless prompts, where that is known.
    """

    mode: str
    positions: str
    lowering: str
    lowering_reason: str
    mask: str
    width: int
    decoder_layers: int
    sites: tuple[SitePlan, ...]
    notes: tuple[str, ...]
    knobs: tuple[str, ...] = ()
    telemetry: bool = False
    gate: str = "token"
    separation: tuple[Separation, ...] = ()
    supervisor: str = "input"
    calls: Calls = "any"

    def with_separation(self, found: tuple[Separation, ...]) -> GuardPlan:
        """The plan with other figures, and the warnings that they give."""
        before = warnings_of(self.separation)
        notes = [note for note in self.notes if note not in before]
        return replace(self, separation=found, notes=(*notes, *warnings_of(found)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The guarded layers, ascending."""
        return tuple(sorted({site.layer_index for site in self.sites}))

    @property
    def bodies(self) -> tuple[str, ...]:
        """Names of the bodies that are guarded: `("",)`, or those of all branches of a merged decoder."""
        return tuple(dict.fromkeys(site.site.body for site in self.sites))

    @property
    def guards(self) -> tuple[LayerGuard, ...]:
        """The numbers of each guarded layer, in the order of `layers`."""
        return tuple(site.guard for site in self.sites if site.site.body == self.bodies[0])

    @property
    def edits_last(self) -> bool:
        """Whether only the last token of a call is edited."""
        return self.positions != "all"

    @property
    def edits_prompt_end(self) -> bool:
        """Whether no token of an answer is edited."""
        return self.positions == "prompt"

    @property
    def paired(self) -> bool:
        """Whether the text-only coordinates come from another row of the batch (`graphs.pairs`)."""
        return self.supervisor == "rows"

    @property
    def takes_supervisor(self) -> bool:
        """Whether the graph takes the text-only coordinates as an input."""
        return guard_mode(self.mode).supervisor and not self.paired

    @property
    def added_inputs(self) -> tuple[str, ...]:
        """In their order; the knobs come last, because they may be left out."""
        supervisor = self.supervisor_inputs if self.takes_supervisor else ()
        return (*supervisor, *((PAST_GATE_INPUT,) if self.gate == "prompt" else ()), *self.knobs)

    @property
    def supervisor_inputs(self) -> tuple[str, ...]:
        """Names of the inputs for the text-only coordinates of a graph that takes them."""
        if self.supervisor != "numbers":
            return (PROMPT_SUPERVISOR_INPUT if self.edits_prompt_end else SUPERVISOR_INPUT,)
        layers = zip(self.layers, self.guards, strict=True)
        return tuple(number_input(layer, row) for layer, guard in layers for row in range(self.text_rows(guard)))

    def text_rows(self, guard: LayerGuard) -> int:
        """How many of a layer's text-only coordinates its guard reads: the gate the first, an edit toward the text all."""
        return 1 if guard_mode(self.mode).has_readout else guard.rank

    @property
    def added_outputs(self) -> tuple[str, ...]:
        """In their order."""
        outputs = {
            COORDINATES_OUTPUT: self.takes_supervisor and self.supervisor != "numbers",
            SCORES_OUTPUT: self.telemetry,
            PRESENT_GATE_OUTPUT: self.gate == "prompt",
        }
        return tuple(name for name, is_added in outputs.items() if is_added)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": PLAN_SCHEMA,
            "mode": self.mode,
            "positions": self.positions,
            "lowering": self.lowering,
            "lowering_reason": self.lowering_reason,
            "mask": self.mask,
            "gate": self.gate,
            "knobs": list(self.knobs),
            "telemetry": self.telemetry,
            "width": self.width,
            "decoder_layers": self.decoder_layers,
            "layers": list(self.layers),
            "added_inputs": list(self.added_inputs),
            "added_outputs": list(self.added_outputs),
            **({"supervisor": self.supervisor} if self.supervisor != "input" else {}),
            **({"calls": self.calls} if self.calls != "any" else {}),
            "sites": [site.to_json(self.mode) for site in self.sites],
            "notes": list(self.notes),
            **({"separation": [one.to_json() for one in self.separation]} if self.separation else {}),
        }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest()
