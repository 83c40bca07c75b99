"""Every lowering, in every mode that it can write, equals the numpy reference, at a plain sum and at a fused one.

What a guard did is read where it matters: in the residual sum and in the logits, which are computed behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
from hand_graphs import (
    EPSILON,
    KINDS,
    WIDTH,
    Guarded,
    Kind,
    decoder,
    directions,
    guard_model,
    layer_directions,
    possible,
    run,
    supervisor_input,
    text_model,
    value_called,
)

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.lowerings.table import LOWERINGS, choose_lowering
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode, modes_where
from vlmguard.graphs.plan import COORDINATES_OUTPUT, SUPERVISOR_INPUT
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.reference import NO_SUPERVISOR, LayerGuard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

PAIRS = [(lowering.name, mode) for lowering in LOWERINGS for mode in MODES if mode in lowering.modes]
every_pair = pytest.mark.parametrize(("lowering", "mode"), PAIRS)
# Those that can leave a state as it is, bit for bit: `align` does without a supervisor.
every_gated_pair = pytest.mark.parametrize(
    ("lowering", "mode"), [pair for pair in PAIRS if guard_mode(pair[1]).gate is not None]
)
# Relative to the largest number compared. Seen at most, over all ranks: 5e-7, 1.4e-3, 9e-3.
TOLERANCE = {"float32": 2e-6, "float16": 5e-3, "bfloat16": 3e-2}

# Four prompts of one to five tokens, the longest padded too; `None`: the graph has no mask at all.
LEFT = np.array([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]])
MASKS = {"left": LEFT, "right": LEFT[:, ::-1].copy(), "none": None}
BATCH, SEQUENCE = LEFT.shape
# The prompt whose text opens the gates of `combined`, and only it.
TOLD = 2


@dataclass(frozen=True)
class Case:
    """What one conformance test runs on."""

    kind: Kind
    mode: str
    lowering: str
    positions: str
    dtype: str
    rank: int
    padding: str

    @property
    def spec(self) -> GuardSpec:
        return GuardSpec(mode=self.mode, lowering=self.lowering, positions=self.positions)  # type: ignore[arg-type]

    @property
    def mask(self) -> np.ndarray | None:
        return MASKS[self.padding]

    @property
    def selected(self) -> np.ndarray | None:
        """The tokens that are edited, as the reference takes them."""
        if self.positions == "all":
            return None
        return reference.last_token(np.ones((BATCH, SEQUENCE)) if self.mask is None else self.mask)

    def source(self) -> ir.Model:
        return decoder(self.kind, dtype=self.dtype, mask=self.mask is not None, seed=self.rank)

    def feeds(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(self.rank)
        embeds = random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(NUMPY_DTYPES[self.dtype])
        return {"inputs_embeds": embeds} | ({} if self.mask is None else {"attention_mask": self.mask})

    def supervisor(self) -> np.ndarray | None:
        """Text-only coordinates, `[batch, layers, rank]`: two rows open the gate, two do not (`combined`: only TOLD does); in
        `align` two rows have some."""
        if not guard_mode(self.mode).supervisor:
            return None
        coordinates = np.random.default_rng(self.rank).normal(size=(BATCH, 1, self.rank)).astype(np.float32)
        coordinates[:, 0, 0] = (-0.9, 0.7, 1.5, -0.2)
        if self.mode == "align":
            coordinates[[0, 3]] = NO_SUPERVISOR
        return coordinates


def execute(model: ir.Model, feeds: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """One run. ONNX Runtime's CPU provider has no bfloat16 MatMul, so there ONNX's own evaluator runs the graph."""
    return evaluate(model, feeds) if dtype == "bfloat16" else run(model, feeds)


def evaluate(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return {str(value.name): array for value, array in zip(model.graph.outputs, outputs, strict=True)}


def with_split_gates(case: Case, raw: np.ndarray) -> Directions:
    """Directions whose thresholds lie in the middle of the scores seen, far from each of them: some gates open."""
    layer = layer_directions(case.rank)
    if case.mode in ("project", "align"):
        return directions(rank=case.rank)
    if case.mode == "supervise":
        return directions(rank=case.rank, alpha=0.75)
    scores = raw @ (layer.readout if guard_mode(case.mode).has_readout else layer.ssd[0])
    edits = np.ones((BATCH, SEQUENCE), bool) if case.selected is None else case.selected[..., 0] == 1
    if case.mode == "combined":  # there the text opens all gates; the readout is to split the others
        edits = edits & (np.arange(BATCH) != TOLD)[:, None]
    edited = np.sort(scores[edits])
    middle = edited[len(edited) // 4 : 1 + 3 * len(edited) // 4]
    widest = int(np.diff(middle).argmax())
    threshold = float(np.float32(middle[widest : widest + 2].mean()))
    alpha = 8.0 if case.mode == "steer" else None
    return directions(rank=case.rank, parts={"threshold": threshold, "text_threshold": 1.125}, alpha=alpha)


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def logits_of(model: ir.Model, kind: Kind, hidden: np.ndarray) -> np.ndarray:
    """What the hand-made decoder computes behind its last sum, in float64."""
    weights = {name: v.const_value.numpy().astype(np.float64) for name, v in model.graph.initializers.items()}
    normed = hidden
    if kind == "skip_norm":
        normed = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + EPSILON) * weights["layer_0_gain"]
    if kind == "skip_norm_bias":
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        normed = normed * weights["layer_0_gain"] + weights["layer_0_shift"]
    return normed @ weights["lm_head"]


def assert_conforms(case: Case) -> None:
    source, feeds = case.source(), case.feeds()
    raw = execute(source, feeds, case.dtype)["hidden"].astype(np.float64)
    guarded = guard_model(case.source(), with_split_gates(case, raw), case.spec)
    layer, supervisor = guarded.plan.sites[0].guard, case.supervisor()
    extra = {} if supervisor is None else {supervisor_input(case.mode): supervisor}
    outputs = execute(guarded.model, feeds | extra, case.dtype)
    expected = reference.guard(case.mode, layer, raw, supervisor, case.selected)
    assert outputs["hidden"].dtype == NUMPY_DTYPES[case.dtype]
    assert largest_difference(outputs["hidden"], expected) < TOLERANCE[case.dtype]
    assert largest_difference(outputs["logits"], logits_of(source, case.kind, expected)) < TOLERANCE[case.dtype]
    if supervisor is not None:
        assert_own_coordinates(case, layer, raw, outputs[COORDINATES_OUTPUT])
    assert_says_something(case, layer, raw, expected)


def assert_says_something(case: Case, layer: LayerGuard, raw: np.ndarray, expected: np.ndarray) -> None:
    """Gates both open and closed among the edited tokens, and edits above the tolerance: or the test is idle."""
    edited = np.ones((BATCH, SEQUENCE), bool) if case.selected is None else case.selected[..., 0] == 1
    moved = (raw != expected).any(axis=-1)
    assert not moved[~edited].any()
    assert moved[edited].any()
    assert moved[edited].all() == (case.mode == "project")
    assert largest_difference(raw, expected) > 2 * TOLERANCE[case.dtype]
    if case.mode == "combined":
        assert moved[TOLD][edited[TOLD]].all()
        by_readout = (raw @ layer.readout > layer.threshold)[edited]
        assert by_readout[edited.nonzero()[0] != TOLD].any()


def assert_own_coordinates(case: Case, layer: LayerGuard, raw: np.ndarray, found: np.ndarray) -> None:
    """The supervised graph tells the coordinates that it had at the last token, before any edit."""
    last = reference.last_token(np.ones((BATCH, SEQUENCE)) if case.mask is None else case.mask)
    own = (raw * last).sum(axis=1) @ layer.ssd.T.astype(np.float64)
    assert found.shape == (BATCH, 1, case.rank) and found.dtype == np.float32
    assert largest_difference(found[:, 0], own) < TOLERANCE[case.dtype]


def sampled_ranks(offset: int) -> Iterator[tuple[int, str]]:
    """Three ranks of 1..8, each with another padding; all of them over a few offsets."""
    for step, padding in enumerate(MASKS):
        yield 1 + (3 * step + offset) % 8, padding


@every_pair
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_graph_equals_the_reference(lowering: str, mode: str, positions: str, kind: Kind, dtype: str) -> None:
    for rank, padding in sampled_ranks(KINDS.index(kind)):
        assert_conforms(Case(kind, mode, lowering, positions, dtype, rank, padding))


@every_pair
@pytest.mark.parametrize("positions", POSITIONS)
def test_bfloat16_equals_the_reference(lowering: str, mode: str, positions: str) -> None:
    """At a plain sum; the fused operators are onnxruntime's own, and its CPU provider does not run bfloat16."""
    for rank, padding in ((1, "left"), (4, "right")):
        assert_conforms(Case("add", mode, lowering, positions, "bfloat16", rank, padding))


@every_pair
def test_every_rank_equals_the_reference(lowering: str, mode: str) -> None:
    for rank in range(1, 9):
        assert_conforms(Case("add", mode, lowering, "prompt" if mode == "align" else "all", "float32", rank, "left"))
        assert_conforms(
            Case("skip_norm", mode, lowering, "prompt" if mode == "align" else "last", "float32", rank, "right")
        )


@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
def test_as_many_rows_as_the_width_equal_the_reference(lowering: str) -> None:
    for dtype in ("float32", "float16"):
        assert_conforms(Case("add", "align", lowering, "prompt", dtype, WIDTH, "left"))


def test_the_lowerings_of_a_mode_agree() -> None:
    """The dense projection, the low-rank one and the chain are the same mathematics."""
    feeds = Case("add", "project", "dense", "all", "float32", 3, "left").feeds()
    first, *others = (
        run(guard_model(decoder(), directions(rank=3), GuardSpec(mode="project", lowering=name)).model, feeds)["hidden"]
        for name in (lowering.name for lowering in LOWERINGS)
    )
    assert len(others) == len(LOWERINGS) - 1
    for found in others:
        assert largest_difference(found, first.astype(np.float64)) < TOLERANCE["float32"]


@pytest.mark.parametrize("kind", ["skip_norm", "skip_norm_bias"])
def test_a_fused_sum_that_is_not_a_value_is_guarded_all_the_same(kind: Kind) -> None:
    """The last fused node has no output 3 in real exports: the same logits come out of it."""
    feeds = Case(kind, "restore", "lowrank", "last", "float32", 2, "right").feeds()
    shown, inside = (
        run(guard_model(decoder(kind, hidden=hidden), directions(), GuardSpec(tau=-100.0)).model, feeds)["logits"]
        for hidden in (True, False)
    )
    assert shown.tobytes() == inside.tobytes()
    assert (inside != run(decoder(kind), feeds)["logits"]).any()


# --------------------------------------------------------------------------------------------------------- the closed gate


def guarded_with(
    threshold: float,
    kind: Kind,
    mode: str,
    positions: str,
    dtype: str,
    alpha: float = 1.0,
    lowering: str = "auto",
) -> Guarded:
    found = directions(parts={"threshold": threshold}, alpha=alpha)
    spec = GuardSpec(mode=mode, positions=positions, lowering=lowering)  # type: ignore[arg-type]
    return guard_model(decoder(kind, dtype=dtype), found, spec)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ("logits", "hidden"):
        assert found[name].dtype == expected[name].dtype
        assert found[name].tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "as-written"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@every_gated_pair
def test_a_closed_gate_is_the_identity_bit_for_bit(
    lowering: str, mode: str, positions: str, kind: Kind, dtype: str, optimize: bool
) -> None:
    feeds = Case(kind, mode, lowering, positions, dtype, 2, "left").feeds()
    expected = run(decoder(kind, dtype=dtype), feeds, optimize)
    listening = np.full((BATCH, 1, 2), NO_SUPERVISOR, np.float32)
    extra = {supervisor_input(mode): listening} if guard_mode(mode).supervisor else {}
    # above every score that is possible here; a listening pass needs no such threshold, and in `combined` must not: it is
    # closed where the readout alone would open it
    guarded = guarded_with(
        {"supervise": 0.5, "combined": -1e6}.get(mode, 1e6), kind, mode, positions, dtype, lowering=lowering
    )
    found = run(guarded.model, feeds | extra, optimize)
    assert_same_bits(found, expected)
    forced = guarded_with(-1e6, kind, mode, positions, dtype, lowering=lowering)
    opened = run(forced.model, feeds | _opening(mode), optimize)
    assert opened["hidden"].tobytes() != expected["hidden"].tobytes()


OVERFLOWING = """
    g (float16[B, S, 16] x, int64[B, S] attention_mask) => (float16[B, S, 16] y) <float16 small, float16[16] row> {
        k = Mul(small, row)
        q = Mul(x, k)
        t = Transpose <perm = [0, 2, 1]> (q)
        s = MatMul(q, t)
        p = Softmax <axis = -1> (s)
        a = MatMul(p, q)
        h = Add(x, a)
        y = Mul(h, k)
    }
"""


@pytest.mark.parametrize("positions", POSITIONS)
@every_gated_pair
def test_a_coordinate_beyond_float16_leaves_a_closed_gate_closed(lowering: str, mode: str, positions: str) -> None:
    """Outlier channels of real models: `h . v` overflows to infinity, and infinity times zero is not zero.

    In ONNX's own evaluator, which keeps float16 as engines on a GPU do; ONNX Runtime's CPU provider multiplies in float32.
    """

    def model() -> ir.Model:
        made = text_model(OVERFLOWING)
        small = made.graph.initializers["small"]
        small.const_value = ir.Tensor(np.array(1e-3, np.float16), name="small")
        return made

    feeds = {"x": np.full((2, 3, WIDTH), -3e4, np.float16), "attention_mask": np.ones((2, 3), np.int64)}
    ssd = np.full((1, WIDTH), 0.25, np.float32)
    # in `combined` the readout asks for the edit, and listening alone keeps the gate closed
    readout = -ssd[0] if mode == "combined" else ssd[0]
    found = directions(rank=1, parts={"ssd": ssd, "threshold": 0.5, "readout": readout})
    spec = GuardSpec(mode=mode, positions=positions, lowering=lowering)  # type: ignore[arg-type]
    guarded = guard_model(model(), found, spec).model
    assert np.abs(feeds["x"].astype(np.float64) @ ssd[0]).min() > np.finfo(np.float16).max
    extra = (
        {supervisor_input(mode): np.full((2, 1, 1), NO_SUPERVISOR, np.float32)} if guard_mode(mode).supervisor else {}
    )
    with np.errstate(over="ignore"):
        found_outputs = evaluate(guarded, feeds | extra)
    expected = evaluate(model(), feeds)["y"]
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found_outputs["y"], expected)


def _opening(mode: str) -> dict[str, np.ndarray]:
    return {supervisor_input(mode): np.ones((BATCH, 1, 2), np.float32)} if guard_mode(mode).supervisor else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lowering", [lowering for lowering, mode in PAIRS if mode == "steer"])
def test_zero_strength_is_the_identity_bit_for_bit(lowering: str, positions: str, kind: Kind) -> None:
    feeds = Case(kind, "steer", lowering, positions, "float32", 2, "left").feeds()
    guarded = guarded_with(-1e6, kind, "steer", positions, "float32", alpha=0.0, lowering=lowering)
    assert_same_bits(run(guarded.model, feeds), run(decoder(kind), feeds))


def test_zero_strength_of_supervise_leaves_the_origin() -> None:
    """Not the identity: the supervisor's part is taken out, so the coordinate becomes the origin."""
    guarded = guarded_with(0.0, "add", "supervise", "all", "float32", alpha=0.0)
    feeds = Case("add", "supervise", "lowrank", "all", "float32", 2, "left").feeds()
    hidden = run(guarded.model, feeds | _opening("supervise"))["hidden"]
    layer = guarded.plan.sites[0].guard
    np.testing.assert_allclose(hidden @ layer.ssd.T, np.broadcast_to(layer.origin, (BATCH, SEQUENCE, 2)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_tokens_that_are_not_the_last_are_untouched_bit_for_bit(lowering: str, mode: str, kind: Kind) -> None:
    for padding, dtype in (("left", "float32"), ("right", "float16")):
        case = Case(kind, mode, lowering, "last", dtype, 2, padding)
        feeds, expected = case.feeds(), run(decoder(kind, dtype=dtype), case.feeds())
        guarded = guarded_with(-1e6, kind, mode, "last", dtype, lowering=lowering)
        found = run(guarded.model, feeds | _opening(mode))
        others = case.selected[..., 0] == 0
        assert found["hidden"][others].tobytes() == expected["hidden"][others].tobytes()
        assert found["logits"][others].tobytes() == expected["logits"][others].tobytes()
        assert (found["hidden"][~others] != expected["hidden"][~others]).any(axis=-1).all()


def test_the_gate_is_strict() -> None:
    """At the threshold itself it stays closed: `g = 1 if a > tau`."""
    guarded = guarded_with(0.25, "add", "supervise", "last", "float32")
    feeds = Case("add", "supervise", "lowrank", "last", "float32", 2, "left").feeds()
    supervisor = np.ones((BATCH, 1, 2), np.float32)
    supervisor[:, 0, 0] = (0.25, np.nextafter(np.float32(0.25), np.float32(1)), 0.0, 1.0)
    found = run(guarded.model, feeds | {SUPERVISOR_INPUT: supervisor})["hidden"]
    moved = (found != run(decoder(), feeds)["hidden"]).any(axis=(1, 2))
    assert moved.tolist() == [False, True, False, True]


@pytest.mark.parametrize("lowering", [lowering for lowering, mode in PAIRS if mode == "combined"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_combined_opens_where_the_readout_or_the_text_is_above_its_threshold(lowering: str, dtype: str) -> None:
    """Four prompts: neither, the text alone, the readout alone, both."""
    feeds = Case("add", "combined", lowering, "last", dtype, 2, "left").feeds()
    plain = run(decoder(dtype=dtype), feeds)["hidden"].astype(np.float64)
    last = reference.last_token(LEFT)[..., 0] == 1
    scores = (plain @ layer_directions().readout.astype(np.float64))[last]
    threshold = float(np.sort(scores)[1:3].mean())  # two prompts are above
    above = scores > threshold
    found = directions(parts={"threshold": threshold, "text_threshold": 0.5})
    spec = GuardSpec(mode="combined", lowering=lowering)  # type: ignore[arg-type]
    model = guard_model(decoder(dtype=dtype), found, spec).model

    def moved(told: np.ndarray) -> list[bool]:
        supervisor = np.ones((BATCH, 1, 2), np.float32)
        supervisor[:, 0, 0] = told
        outputs = run(model, feeds | {SUPERVISOR_INPUT: supervisor})
        return (outputs["hidden"].astype(np.float64) != plain).any(axis=(1, 2)).tolist()

    assert sorted(above) == [False, False, True, True]
    text_above = np.zeros(BATCH, bool)
    text_above[[above.argmin(), above.argmax()]] = True  # one of each kind
    assert moved(np.where(text_above, 0.75, 0.25)) == (above | text_above).tolist()
    assert moved(np.zeros(BATCH)) == above.tolist()
    assert moved(np.full(BATCH, -1e6)) == above.tolist()
    assert moved(np.ones(BATCH)) == [True] * BATCH
    assert moved(np.full(BATCH, NO_SUPERVISOR)) == [False] * BATCH


@pytest.mark.parametrize("lowering", [lowering for lowering, mode in PAIRS if mode == "combined"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("threshold", [0.125, -3.0, 40.7])
def test_the_text_of_combined_is_compared_with_the_number_of_the_directions(
    lowering: str, dtype: str, threshold: float
) -> None:
    """On the readout's scale, so within the rounding of one float32 sum; whatever the readout's own threshold is."""
    text_threshold = 0.3
    last = reference.last_token(LEFT)[..., 0] == 1
    feeds = Case("add", "combined", lowering, "last", dtype, 2, "left").feeds()
    plain = run(decoder(dtype=dtype), feeds)["hidden"]
    # a readout whose scores are all 10 below the threshold, so that the text alone decides
    readout = np.linalg.lstsq(plain[last].astype(np.float64), np.full(BATCH, threshold - 10), rcond=None)[0].astype(
        np.float32
    )
    parts = {"threshold": threshold, "text_threshold": text_threshold, "readout": readout}
    spec = GuardSpec(mode="combined", lowering=lowering)  # type: ignore[arg-type]
    guarded = guard_model(decoder(dtype=dtype), directions(parts=parts), spec)
    # three roundings (the threshold's, the shift's, the sum's), each half a unit of the largest number in it
    rounding = 1.5 * float(np.spacing(np.float32(abs(threshold) + text_threshold)))
    supervisor = np.ones((BATCH, 1, 2), np.float32)
    supervisor[:, 0, 0] = text_threshold + rounding * np.array([-2, 2, -1000, 1000])
    found = run(guarded.model, feeds | {SUPERVISOR_INPUT: supervisor})["hidden"]
    assert (found != plain).any(axis=(1, 2)).tolist() == [False, True, False, True]


# ------------------------------------------------------------------------------------------------------------ several layers


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_gets_its_own_row_of_the_supervisor(kind: Kind, positions: str) -> None:
    """Layers 0 and 2 of three: row 1 of the input belongs to layer 2, whatever its number is."""
    model = decoder(kind, layers=3)
    guarded = guard_model(model, directions((0, 2)), GuardSpec(mode="supervise", positions=positions, tau=0.0))  # type: ignore[arg-type]
    feeds = Case(kind, "supervise", "lowrank", positions, "float32", 2, "left").feeds()
    supervisor = np.random.default_rng(1).normal(size=(BATCH, 2, 2)).astype(np.float32)
    supervisor[:, :, 0] = [(-1, 1), (1, -1), (1, 1), (-1, -1)]

    def hidden(rows: np.ndarray) -> np.ndarray:
        return run(guarded.model, feeds | {SUPERVISOR_INPUT: rows})["hidden"]

    plain, found = run(decoder(kind, layers=3), feeds)["hidden"], hidden(supervisor)
    moved = (found != plain).any(axis=(1, 2))
    assert moved.tolist() == [True, True, True, False]
    # row 0 has only layer 2 open: there, and only there, the last layer's coordinates are the supervisor's
    layer, last = guarded.plan.sites[1].guard, reference.last_token(LEFT)[..., 0] == 1
    assert layer.alpha == 1.0
    for row, is_set in ((0, True), (1, False), (2, True)):
        coordinates = (found @ layer.ssd.T)[row][last[row]]
        assert np.allclose(coordinates, supervisor[row, 1], atol=1e-4) == is_set
    swapped = hidden(supervisor[:, ::-1].copy())
    assert (swapped[:2] != found[:2]).any()


@pytest.mark.parametrize("mode", modes_where(supervisor=True))
def test_the_supervised_graph_tells_each_layers_coordinates(mode: str) -> None:
    tau = None if mode == "align" else 0.0
    guarded = guard_model(decoder(layers=2), directions((0, 1)), GuardSpec(mode=mode, tau=tau, layers=(0, 1)))  # type: ignore[arg-type]
    feeds = Case("add", "supervise", "lowrank", "last", "float32", 2, "right").feeds()
    listening = np.full((BATCH, 2, 2), NO_SUPERVISOR, np.float32)
    found = run(guarded.model, feeds | {supervisor_input(mode): listening})[COORDINATES_OUTPUT]
    tapped = decoder(layers=2)
    tapped.graph.outputs.append(value_called(tapped, "layer_0_sum"))
    states = run(tapped, feeds)
    last = reference.last_token(MASKS["right"])
    for row, name in enumerate(("layer_0_sum", "hidden")):
        own = (states[name] * last).sum(axis=1) @ guarded.plan.sites[row].guard.ssd.T
        np.testing.assert_allclose(found[:, row], own, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- how many nodes, pinned as numbers


def lowrank_nodes(mode: str, rank: int, dtype: str) -> int:
    """At a plain sum, all tokens: read, write and the arithmetic between them.

    project: read, delta, guarded
    steer: read, opens, gate, strength, weights, delta, guarded
    restore: read, read_parts, difference, opens, gate, weights, delta, guarded
    combined: those of restore; first_shifted, either, first_capped and score
    supervise: read, centred, wanted, present, difference, weights, delta, guarded
    align: read, difference, weights, delta, guarded
    The gates of supervise and align are shared. From rank 2 on the gate's coordinate is cut out of the state, and in
    `combined` the first text-only coordinate. In a float16 graph the edit is clipped, and behind the read a gate makes all
    float32, one Cast in and one out; `supervise` and `combined` tell coordinates unscaled, and `combined` and `align` scale
    what they were told.
    """
    nodes = {"project": 3, "steer": 7, "restore": 8, "supervise": 8, "combined": 8 + 4, "align": 5}[mode]
    nodes += mode in {"steer", "combined"} and rank > 1
    half = {"project": 1, "steer": 3, "restore": 3, "supervise": 3, "combined": 4, "align": 4}
    return nodes + (dtype == "float16") * half[mode]


def dense_nodes(mode: str, rank: int, dtype: str) -> int:
    """One MatMul; a correction is added (`FUSED_SITE`, `LAST`), and in a float16 graph clipped."""
    return 1 + (dtype == "float16")


def rank1_nodes(mode: str, rank: int, dtype: str) -> int:
    """Per row products, c, w and edit; one Add fewer than rows, and the Add to the stream.

    steer and restore have wanted, and supervise a_centred, a_strength, present and wanted per row; a gate has opens and
    gate, that of restore reads products and score. combined has
    the gate of restore, and first_shifted, either, first_capped and score. From rank 2 on supervise cuts out each row,
    and both the gate's; their coordinates are put together. In a float16 graph: two Casts, and the edit is clipped.
    """
    rows = {"project": 4, "steer": 5, "restore": 5, "supervise": 8, "combined": 5, "align": 5}[mode] * rank + rank
    gate = {
        "project": 0,
        "steer": 2,
        "restore": 4,
        "supervise": 2,
        "combined": 4 + 4,
        "align": 2,
    }[mode]
    columns = {"supervise": rank + 2, "align": rank + 2, "combined": 2}.get(mode, 0) * (rank > 1)
    return rows + gate + columns + (dtype == "float16") * 3


SITE_NODES = {"lowrank": lowrank_nodes, "dense": dense_nodes, "rank1": rank1_nodes}
# A fused node's sum is computed again before it is read; with a bias of the node's own, one Add more.
FUSED_SITE = {"add": 0, "skip_norm": 1, "skip_norm_bias": 2}


def selecting(lowering: str, mode: str, rank: int) -> int:
    """`last`: one Mul with the selection; but in `rank1` without a gate it is the gate, and each row's edit meets it.

    In `lowrank` the selection is part of the gates that all layers share.
    """
    if lowering == "lowrank" and mode != "project":
        return 0
    return rank if (lowering, mode) == ("rank1", "project") else 1


def sharing(lowering: str, mode: str, positions: str, rank: int) -> int:
    """Once per graph, on two layers: what one node cuts into a part for each layer.

    The text-only coordinates; in `lowrank` the gates. Where they read the text: row, thresholds, opens, gates and their parts,
    and first from rank 2 on. Where they read the state: floor, thresholds, levels_selected and their parts. The Cast of the
    selection serves one more Mul by text, and is not needed by state.
    """
    supervisor = 1 if guard_mode(mode).supervisor else 0
    if lowering != "lowrank" or mode == "project":
        return supervisor
    if guard_mode(mode).toward_text:
        return supervisor + 5 + (rank > 1) + (positions != "all")
    return supervisor + (4 - 1) * (positions != "all")


# Once per graph: which token is the last one (19 nodes where a mask says it, 7 without), the selection to write by and its
# Cast to the stream's dtype (positions `last`), the pairs to read by and the coordinates of all layers (with a supervisor):
# layers, last, all_layers, and unscaled where `lowrank` reads float16.
LAST_WITH_MASK, LAST_WITHOUT, SELECTION, PAIRS_AND_COORDINATES = 19, 7, 5 + 1, 4 + 3


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@every_pair
def test_the_nodes_of_a_site_are_counted(lowering: str, mode: str, kind: Kind, dtype: str, rank: int) -> None:
    every = SITE_NODES[lowering](mode, rank, dtype) + FUSED_SITE[kind]
    # `dense` writes `h P` where it can, and else (in float16 too) a correction that has to be added
    last = every + selecting(lowering, mode, rank) + (lowering == "dense" and kind == "add")
    every += lowering == "dense" and (kind != "add" or dtype == "float16")
    last += lowering == "dense" and kind != "add"
    for positions, expected in (("all", every), ("last", last))[mode == "align" :]:
        model = decoder(kind, layers=2, dtype=dtype)
        before = len(model.graph)
        spec = GuardSpec(mode=mode, positions=positions, lowering=lowering, layers=(0, 1))  # type: ignore[arg-type]
        report = guard_model(model, directions((0, 1), rank), spec).report
        assert [len(site.nodes) for site in report.sites] == [expected] * 2
        shared = LAST_WITH_MASK if positions == "last" or guard_mode(mode).supervisor else 0
        shared += SELECTION * (positions == "last") + PAIRS_AND_COORDINATES * (guard_mode(mode).supervisor)
        shared += guard_mode(mode).supervisor and lowering == "lowrank" and dtype == "float16"
        shared += sharing(lowering, mode, positions, rank)
        assert len(report.shared_nodes) == shared
        assert len(model.graph) - before == report.node_count == shared + 2 * expected


def test_without_a_mask_fewer_nodes_find_the_last_token() -> None:
    report = guard_model(decoder(mask=False), directions(), GuardSpec(mode="project")).report
    assert len(report.shared_nodes) == LAST_WITHOUT + SELECTION


INITIALIZERS = {
    # rows, ssd
    ("project", "lowrank"): 2,
    ("project", "dense"): 1,
    # rows, ssd, tau, alpha; three bounds of a Slice are shared by the whole guard
    ("steer", "lowrank"): 4,
    # rows, ssd, tau, target
    ("restore", "lowrank"): 4,
    # two rows; tau, alpha; tau, readout, two targets; tau, alpha, two origins
    ("project", "rank1"): 2,
    ("steer", "rank1"): 2 + 2,
    ("restore", "rank1"): 2 + 4,
    ("supervise", "rank1"): 2 + 4,
    # as restore, and text_shift and hearing
    ("combined", "rank1"): 2 + 4 + 2,
    ("combined", "lowrank"): 4 + 2,
    # rows, ssd, tau, alpha, origin; the index of the layer's row is shared with others that are called the same
    ("supervise", "lowrank"): 5,
    # rows, ssd, tau; two rows and tau
    ("align", "lowrank"): 3,
    ("align", "rank1"): 3,
}


@every_pair
def test_the_initializers_of_a_site_are_counted(lowering: str, mode: str) -> None:
    positions = "prompt" if mode == "align" else "all"
    spec = GuardSpec(mode=mode, lowering=lowering, positions=positions, layers=(0, 1))  # type: ignore[arg-type]
    report = guard_model(decoder(layers=2), directions((0, 1)), spec).report
    for layer in (0, 1):
        own = [name for name in report.initializers if name.startswith(f"vlmguard/layer_{layer}/")]
        assert len(own) == INITIALIZERS[mode, lowering]


def test_no_node_is_one_that_engines_reject() -> None:
    """No If (TensorRT wants static shapes for it), no ScatterND, every operator of the standard domain; and no Where, which
    is an engine layer more, but for one of all layers in `lowrank`, which is not made for engines."""
    used = set()
    for lowering, mode in PAIRS:
        for positions in (positions for positions in POSITIONS if possible(mode, positions)):
            spec = GuardSpec(mode=mode, lowering=lowering, positions=positions)  # type: ignore[arg-type]
            guarded = guard_model(decoder(), directions(), spec)
            wheres = [node.name for node in guarded.model.graph if node.op_type == "Where"]
            assert wheres in ([], ["vlmguard/gates/floor"]) and (not wheres or lowering == "lowrank")
            used |= {
                (node.domain, node.op_type) for node in guarded.model.graph if (node.name or "").startswith("vlmguard/")
            }
    assert {domain for domain, _ in used} == {""}
    assert {op_type for _, op_type in used} == {
        *("Add", "Cast", "Concat", "Equal", "Gather", "GatherND", "Greater", "Less", "MatMul", "Max", "Min"),
        *(
            "Mul",
            "Neg",
            "Range",
            "ReduceMax",
            "ReduceSum",
            "Reshape",
            "Shape",
            "Slice",
            "Split",
            "Sub",
            "Transpose",
            "Unsqueeze",
            "Where",
        ),
    }


# ------------------------------------------------------------------------------------------------------- the numbers' dtypes


def test_the_stream_is_read_in_its_own_dtype_and_the_gate_is_float32() -> None:
    assert dtypes_of("lowrank") == {
        "product_bounded_highest": ir.DataType.FLOAT,
        "product_bounded_lowest": ir.DataType.FLOAT,
        "rows": ir.DataType.FLOAT16,
        "ssd": ir.DataType.FLOAT,
        "tau": ir.DataType.FLOAT,
        "target": ir.DataType.FLOAT,
    }
    assert set(dtypes_of("lowrank", "project").values()) == {ir.DataType.FLOAT16}


def test_the_chain_is_float32_between_its_casts() -> None:
    assert set(dtypes_of("rank1").values()) == {ir.DataType.FLOAT}


def dtypes_of(lowering: str, mode: str = "restore") -> dict[str, ir.DataType | None]:
    spec = GuardSpec(mode=mode, lowering=lowering, positions="all")  # type: ignore[arg-type]
    guarded = guard_model(decoder(dtype="float16"), directions(), spec)
    initializers = guarded.model.graph.initializers
    return {name.rpartition("/")[2]: value.dtype for name, value in initializers.items() if "layer_0/" in name}


# ---------------------------------------------------------------------------------------------------------------- choosing


def test_auto_takes_the_first_of_the_table_that_can() -> None:
    assert [lowering.name for lowering in LOWERINGS] == ["lowrank", "rank1", "dense"]
    for mode in MODES:
        chosen, reason = choose_lowering("auto", mode)
        assert chosen.name == "lowrank"
        assert reason == (
            "auto: two skinny MatMuls per layer, the cheapest on ONNX Runtime, and every mode (on TensorRT rank1 is cheaper)"
        )


def test_many_rows_are_not_written_as_chains() -> None:
    assert choose_lowering("auto", "align", "tensorrt", 8)[0].name == "rank1"
    chosen, reason = choose_lowering("auto", "align", "tensorrt", 9)
    assert chosen.name == "lowrank"
    assert reason == (
        "auto: rank1 writes a chain for each row, too many at rank 9; two skinny MatMuls per layer, the cheapest on ONNX "
        "Runtime, and every mode (on TensorRT rank1 is cheaper)"
    )
    assert choose_lowering("rank1", "align", "tensorrt", 64)[0].name == "rank1"


def test_a_lowering_may_be_named() -> None:
    chosen, reason = choose_lowering("dense", "project")
    assert chosen.name == "dense"
    assert reason == (
        "as requested: the literal h @ (I - V^T V), one d x d MatMul per layer (to compare with; the others cost less)"
    )


@pytest.mark.parametrize(
    ("name", "mode", "sentence"),
    [
        ("sparse", "project", "lowering 'sparse' is unknown; choose one of auto, lowrank, rank1, dense, fold"),
        ("dense", "steer", "lowering 'dense' cannot write mode 'steer'; choose lowrank or rank1"),
        ("dense", "restore", "lowering 'dense' cannot write mode 'restore'; choose lowrank or rank1"),
        ("dense", "supervise", "lowering 'dense' cannot write mode 'supervise'; choose lowrank or rank1"),
        ("dense", "combined", "lowering 'dense' cannot write mode 'combined'; choose lowrank or rank1"),
    ],
)
def test_a_lowering_that_cannot_is_refused(name: str, mode: str, sentence: str) -> None:
    with pytest.raises(GuardError) as refusal:
        choose_lowering(name, mode)
    assert str(refusal.value) == sentence


def test_the_plan_decides_and_the_rewrite_only_does() -> None:
    model = decoder()
    anatomy = dissect(model)
    plan = plan_guard(model, anatomy, directions(), GuardSpec(mode="project", lowering="dense", positions="all"))
    report = rewrite(model, plan)
    assert report.sites[0].nodes == ("vlmguard/layer_0/guarded",)
    assert report.initializers == ("vlmguard/layer_0/projection",)
