"""`GuardSpec`: the guard that a user requests, before a model is opened.

`GuardSpec` is plain data. Which layers exist, which numbers the guard computes with and where it goes in is decided by
`plan_guard`, from a spec, the model's anatomy and a directions file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import GuardError
from .modes import MODES, POSITIONS, Mode, Positions, guard_mode, modes_where

Target = Literal["onnxruntime", "tensorrt"]
Decided = Literal["token", "prompt"]
Supervisor = Literal["input", "rows"]

TARGETS: tuple[str, ...] = get_args(Target)
GATES: tuple[str, ...] = get_args(Decided)
SUPERVISORS: tuple[str, ...] = get_args(Supervisor)
MAX_RANK = 64  # what it costs: docs/method.md, section "Lowerings"
# A threshold beyond it is passed by every score or by none, and in float32 it could be infinite. The sentinel of a
# text-only pass (`reference.NO_SUPERVISOR`, -1e30) must stay below every threshold.
LARGEST_TAU = 1e29


@dataclass(frozen=True)
class GuardSpec:
    """A requested guard. `None` takes the value of the directions file, else the default of the mode.

    Attributes:
        mode: which intervention (docs/method.md): `project`, `steer`, `supervise`, `restore`, `combined`, `align`. `None`
            follows the directions file: calibrated ones mean `restore`, an SSD alone means `project`.
        layers: decoder layers, 0-based: layer `l` is guarded where its output leaves it (`hidden_states[l + 1]` in
            Hugging Face terms). `None` means those of the directions file.
        rank: how many rows of the SSD to use, 1..64. `None` means all that the file has.
        alpha: strength of `steer` and `supervise`; not negative, because a negative strength removes safety.
        tau: gate threshold of every mode but `project` and `align`, for every guarded layer (of `combined`: the readout's).
        positions: `last` edits the last token of each call (the end of the prompt, then each new token); `all` every
            token of the call; `prompt` the end of the prompt and no token of the answer (`supervise`, and always `align`).
        lowering: how the guard is written into the graph; `auto` lets the plan choose; the plan has the reason.
        direction_of: use this layer's SSD in every guarded layer (`project` only); what `fold` needs, because it changes
            the whole stream by one subspace. All layers are then guarded, unless `layers` names some.
        target: the runtime that will run the graph; `auto` takes the cheapest lowering there. Any runtime runs any lowering.
        knobs: strength and threshold offset become inputs with defaults, for an app to set at each call
            (`graphs.runtime_controls`).
        telemetry: one output more, the score of each guarded layer's gate at the last token.
        gate: decided at every `token`, or at the end of the `prompt` and held for the whole answer.
        supervisor: where `align` takes the text-only coordinates from: an `input` of the graph, or paired `rows`: row 2i of
            a batch is the text-only prompt, row 2i + 1 the same prompt with its image (`graphs.pairs`).
    """

    mode: Mode | None = None
    layers: tuple[int, ...] | None = None
    rank: int | None = None
    alpha: float | None = None
    tau: float | None = None
    positions: Positions = "last"
    lowering: str = "auto"
    direction_of: int | None = None
    target: Target = "onnxruntime"
    knobs: bool = False
    telemetry: bool = False
    gate: Decided = "token"
    supervisor: Supervisor = "input"

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise GuardError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.positions not in POSITIONS:
            raise GuardError(f"positions {self.positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if self.target not in TARGETS:
            raise GuardError(f"target {self.target!r} is unknown; choose one of {', '.join(TARGETS)}")
        if self.gate not in GATES:
            raise GuardError(f"gate {self.gate!r} is unknown; choose one of {', '.join(GATES)}")
        if self.supervisor not in SUPERVISORS:
            raise GuardError(f"supervisor {self.supervisor!r} is unknown; choose one of {', '.join(SUPERVISORS)}")
        if self.supervisor == "rows" and self.mode is None:
            raise GuardError(
                "paired rows are read by mode align alone; give --mode align too, or leave --supervisor out"
            )
        if self.knobs and self.target == "tensorrt":
            raise GuardError(
                "knobs are refused for TensorRT: an engine has no inputs with defaults, so every caller would have to feed "
                "them, and any caller could switch the guard off; leave --knobs out"
            )
        if self.mode is not None:
            self.require_runtime_controls(self.mode)
        if self.layers is not None and not self.layers:
            raise GuardError("the list of layers is empty; name at least one layer, or use auto")
        if self.direction_of is not None and self.direction_of < 0:
            raise GuardError(f"direction_of is {self.direction_of}; layers count from 0")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise GuardError(f"rank {self.rank} is out of range; choose 1 to {MAX_RANK}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise GuardError(f"alpha {self.alpha} would remove safety or is not a number; choose 0 or more")
        if self.tau is not None and not abs(self.tau) <= LARGEST_TAU:  # not NaN either
            raise GuardError(f"tau {self.tau} is not a finite number; a gate that never or always opens is not a guard")

    def require_runtime_controls(self, mode: str) -> None:
        """Check that the mode has the gate that is to be output or held, and edits the requested tokens.

        Args:
            mode: the requested one, or that of the directions.

        Raises:
            GuardError: the mode has no such gate, or holds it already, or edits other tokens.
        """
        row = guard_mode(mode)
        if self.positions == "prompt" and "prompt" not in row.positions:
            able = [name for name in sorted(MODES) if "prompt" in guard_mode(name).positions]
            raise GuardError(
                f"mode {mode} cannot leave the answer's tokens out; leave --positions out, or choose {_either(able)}"
            )
        if self.positions == "all" and row.edits_prompt_end_only:
            raise GuardError(f"mode {mode} edits the end of the prompt and no other token; leave --positions out")
        if self.supervisor == "rows" and not row.paired_rows:
            able = modes_where(paired_rows=True)
            raise GuardError(
                f"mode {mode} does not read paired rows; leave --supervisor out, or choose {_either(able)}"
            )
        if self.telemetry and not row.has_threshold:
            what = "gate" if row.gate is None else "threshold"
            raise GuardError(f"mode {mode} has no {what}, so there is no score to output; leave --telemetry out")
        if self.gate == "prompt" and row.edits_prompt_end_only:
            raise GuardError(f"mode {mode} has no gate to hold: it edits the end of the prompt alone; leave --gate out")
        if self.gate == "prompt" and row.decides_by_text:
            raise GuardError(
                f"mode {mode} decides once per request already: its gate reads the text-only coordinates, which stay the "
                "same for the whole answer; leave --gate out"
            )
        if self.gate == "prompt" and not row.has_threshold:
            able = modes_where(has_threshold=True, decides_by_text=False)
            raise GuardError(f"mode {mode} has no gate to hold; leave --gate out, or choose {_either(able)}")


def _either(names: Sequence[str]) -> str:
    """`a, b or c`"""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def parse_layers(text: str) -> tuple[int, ...] | None:
    """`"3,4"`, `"2-4"`, `"0,3-5"` to sorted 0-based layer numbers; `"auto"` to `None`.

    Raises:
        GuardError: the text is none of these.
    """
    if text.strip().lower() == "auto":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if span is None:
            raise GuardError(f"layers {text!r} cannot be read; write them as 3,4 or 2-4 or auto")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first or last > 10_000:
            raise GuardError(f"layers {text!r} cannot be read; a range runs upward, as in 2-4")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))
