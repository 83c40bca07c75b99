"""Calls that a guard is run on by itself: states, masks, supervisors, runtime controls, and all of them as inputs by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ...graphs.call_inputs import GrowingCache
from ...graphs.dtypes import NUMPY_DTYPES
from ...graphs.modes import guard_mode
from ...graphs.plan import SUPERVISOR_INPUTS, GuardPlan, number_of_input
from ...graphs.proof.cut_out import Cut
from ...graphs.reference import (
    call_end,
)
from ...graphs.runtime_controls import (
    OFFSET_INPUT,
    PAST_GATE_INPUT,
    STRENGTH_INPUT,
)
from .limits import TOLERANCE
from .site_states import (
    KINDS,
    Aim,
    Masked,
    masks,
    no_supervisor_row,
    paired_masks,
    site_states,
    supervisor_of,
    whole_masks,
)


@dataclass(frozen=True)
class LocalCall:
    """One call of a cut.

    Attributes:
        mask: of the whole sequence.
        supervisors: by layer, `[KINDS, m]`; empty for modes without one.
        forced: every gate open or closed, by its threshold.
        strength, offset: knobs that are fed.
        held: gates that come in, `[KINDS, layers]`.
    """

    mask: Masked
    supervisors: Mapping[int, np.ndarray] = field(default_factory=dict)
    forced: bool | None = None
    strength: float | None = None
    offset: float | None = None
    held: np.ndarray | None = None


def local_calls(plan: GuardPlan, layers: Sequence[int]) -> Iterator[LocalCall]:
    """Every call of the proof; the graph as it ships first, then with its gates forced."""
    guards = dict(zip(plan.layers, plan.guards, strict=True))
    supervised, gated = plan.takes_supervisor, guard_mode(plan.mode).gate is not None

    def supervisors(turned: int) -> dict[int, np.ndarray]:
        chosen = plan.layers if supervised else ()
        return {number: supervisor_of(number, plan.mode, guards[number], turned) for number in chosen}

    silent, undecided = _silent(plan), _undecided(plan)
    whole, *others = [mask for mask in masks() if _takes(plan, mask)] if plan.mask else masks()[:1]
    others += paired_masks() if plan.paired else whole_masks() if plan.mask and plan.calls == "whole" else []
    plain = LocalCall(whole, supervisors(0), held=undecided)
    yield plain
    for number, mask in enumerate((*others, whole) if supervised else others, start=1):
        yield replace(plain, mask=mask, supervisors=supervisors(number))
    if supervised:
        yield replace(plain, supervisors=silent)
    if plan.knobs:
        yield from (replace(plain, strength=strength) for strength in (0.0, -1.0, 0.5, 3.0))
    if OFFSET_INPUT in plan.knobs:
        yield from (replace(plain, strength=0.5, offset=offset) for offset in (-1e9, 1e9))
        if supervised:  # an offset beyond all bounds does not open a listening pass
            yield replace(plain, supervisors=silent, offset=-3e38)
    if undecided is not None:
        states = np.array([-1, 0, 1, np.nan, 0.5], np.float32)
        turns = np.arange(KINDS)[:, None] + np.arange(len(plan.layers))
        yield from (replace(plain, held=states[(turns + turned) % len(states)]) for turned in range(3))
    if gated:
        yield from (replace(plain, forced=forced, supervisors=supervisors(0)) for forced in (True, False))


def refused_calls(plan: GuardPlan) -> list[LocalCall]:
    """Calls that the graph must answer with an error; none for a graph that takes any call."""
    refused = [mask for mask in masks() if not _takes(plan, mask)] if plan.mask else []
    return [LocalCall(mask, _silent(plan), held=_undecided(plan)) for mask in refused]


def _silent(plan: GuardPlan) -> dict[int, np.ndarray]:
    """The supervisor of a listening pass, by layer; empty for a guard without one."""
    if not plan.takes_supervisor:
        return {}
    return {layer: no_supervisor_row(guard.rank) for layer, guard in zip(plan.layers, plan.guards, strict=True)}


def _undecided(plan: GuardPlan) -> np.ndarray | None:
    """Held gates at the start of a prompt, `[KINDS, layers]`; `None` where no gate is held."""
    return np.full((KINDS, len(plan.layers)), -1, np.float32) if plan.gate == "prompt" else None


def _takes(plan: GuardPlan, masked: Masked) -> bool:
    return plan.calls == "any" or masked.mask.shape[1] == masked.past + masked.tokens


def guard_streams(cut: Cut, plan: GuardPlan) -> dict[str, np.ndarray]:
    """States for every stream that the cut reads; at a skip-norm the summands of such states."""
    limit, found = TOLERANCE, {}
    for site in cut.sites:
        dtype, layer = site.planned.site.dtype, site.planned.guard
        total = site_states(site.done.layer_index, layer, Aim.of(plan.mode, layer, limit[dtype]), dtype)
        if not site.residual:
            found[site.stream] = total
            continue
        shares = np.random.default_rng([site.done.layer_index, 3]).uniform(0.25, 0.75, total.shape)
        found[site.residual] = (total.astype(np.float64) * shares).astype(total.dtype)
        found[site.stream] = _rest(total, found[site.residual])
        if site.bias:
            random = np.random.default_rng([site.done.layer_index, 5])
            found[site.bias] = random.normal(0, 0.01, plan.width).astype(total.dtype)
    return found


def _rest(total: np.ndarray, share: np.ndarray) -> np.ndarray:
    """What a share lacks to a total; a little less where their sum would round to infinity, which no stream holds."""
    rest = (total.astype(np.float64) - share.astype(np.float64)).astype(total.dtype)
    with np.errstate(over="ignore"):
        beyond = ~np.isfinite(share + rest)
    if beyond.any():
        rest[beyond] = np.nextafter(rest[beyond], np.zeros((), rest.dtype))
    return rest


def call_part(states: Mapping[str, np.ndarray], masked: Masked) -> dict[str, np.ndarray]:
    """The rows and tokens of a call; a bias has neither."""
    return {name: v if v.ndim == 1 else v[: masked.rows, : masked.tokens] for name, v in states.items()}


def call_feeds(cut: Cut, plan: GuardPlan, call: LocalCall, states: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of one call of a guard that is cut out.

    Args:
        cut: the guard's graph.
        plan: the guard's plan.
        call: masks, supervisors and runtime controls of the call.
        states: stream inputs by name.
    """
    fed: dict[str, np.ndarray] = {}
    for name, value in cut.inputs.items():
        if name in states:
            fed[name] = states[name]
        elif name in SUPERVISOR_INPUTS:
            fed[name] = np.stack([call.supervisors[number] for number in plan.layers], axis=1)
        elif (number := number_of_input(name)) is not None:
            layer, row = number
            fed[name] = call.supervisors[layer][:, row, None, None]
        elif name == PAST_GATE_INPUT:
            assert call.held is not None
            fed[name] = call.held
        elif name in (STRENGTH_INPUT, OFFSET_INPUT):
            knob = call.strength if name == STRENGTH_INPUT else call.offset
            if knob is not None:
                fed[name] = np.array(knob, np.float32)
        elif cut.calls.mask is not None and name == cut.calls.mask.name:
            fed[name] = call.mask.mask.astype(_numpy(value))
        elif cut.calls.positions is not None and name == cut.calls.positions.name:
            fed[name] = call_positions(call.mask).astype(_numpy(value))
        elif cut.calls.cache is not None and name == cut.calls.cache.value.name:
            fed[name] = _empty_cache(cut.calls.cache, value, call.mask)
        else:  # the first residual, of which only the sizes are read
            sizes = call.mask.rows, call.mask.tokens, plan.width
            fed[name] = np.zeros(sizes, NUMPY_DTYPES[cut.sites[0].planned.site.dtype])
    return fed


def call_positions(masked: Masked) -> np.ndarray:
    """Position ids of the call's tokens, `[rows, tokens]`, as an app counts them."""
    end = call_end(masked.mask, masked.tokens, masked.past)
    return np.maximum(np.cumsum(masked.mask, axis=1) - 1, 0)[:, end - masked.tokens : end]


def _empty_cache(cache: GrowingCache, value: ir.Value, masked: Masked) -> np.ndarray:
    """A cache of so many tokens, of which only the sizes are read; other sizes that are not known are 1."""
    sizes = [int(size) if isinstance(size, int) else 1 for size in value.shape or ()]
    sizes[0], sizes[cache.axis] = masked.rows, masked.past
    return np.zeros(tuple(sizes), _numpy(value))


def _numpy(value: ir.Value) -> np.dtype:
    assert value.dtype is not None
    return value.dtype.numpy()
