"""The wish: what can be said, and the sentence for everything else."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.modes import MODES, modes_where
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.spec import LARGEST_TAU, GuardSpec, parse_layers

# ------------------------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("3", (3,)),
        ("0", (0,)),
        ("3,4", (3, 4)),
        ("4,3,4", (3, 4)),
        ("2-4", (2, 3, 4)),
        ("2-2", (2,)),
        ("0,3-5,4-6", (0, 3, 4, 5, 6)),
        (" 1 , 2 - 3 ", (1, 2, 3)),
        ("007", (7,)),
        ("10000", (10_000,)),
        ("auto", None),
        (" AUTO ", None),
    ],
)
def test_layers_are_read(text: str, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "3,",
        ",3",
        "3,,4",
        "a",
        "3.0",
        "-1",
        "1--2",
        "1-2-3",
        "1-",
        "-",
        "3 4",
        "3;4",
        "all",
        "auto,3",
        "0x1",
        "1e2",
        "²",
        "9" * 5000,
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(GuardError) as refusal:
        parse_layers(text)
    assert str(refusal.value) == f"layers {text!r} cannot be read; write them as 3,4 or 2-4 or auto"


@pytest.mark.parametrize("text", ["4-2", "3,9-8", "10001", "0-99999"])
def test_a_range_that_runs_downward_or_without_end_is_refused(text: str) -> None:
    with pytest.raises(GuardError) as refusal:
        parse_layers(text)
    assert str(refusal.value) == f"layers {text!r} cannot be read; a range runs upward, as in 2-4"


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=20))
def test_written_layers_are_read_back(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == tuple(sorted(layers))


@given(st.text(max_size=12))
def test_any_text_is_layers_or_one_sentence(text: str) -> None:
    try:
        layers = parse_layers(text)
    except GuardError as refusal:
        assert str(refusal).startswith(f"layers {text!r} cannot be read; ")
    else:
        assert layers is None or list(layers) == sorted(set(layers))


# -------------------------------------------------------------------------------------------------------------- the wish


def test_without_a_word_everything_is_left_to_the_directions() -> None:
    spec = GuardSpec()
    assert (spec.mode, spec.layers, spec.rank, spec.alpha, spec.tau) == (None,) * 5
    assert (spec.positions, spec.lowering) == ("last", "auto")


def test_the_modes_with_a_strength_and_with_a_gate() -> None:
    assert MODES == ("project", "steer", "supervise", "restore", "combined", "align")
    assert modes_where(has_alpha=True) == ("steer", "supervise")
    assert modes_where(has_threshold=False) == ("project", "align")
    assert modes_where(has_readout=True) == ("restore", "combined")
    assert modes_where(supervisor=True) == ("supervise", "combined", "align")


def test_what_is_wanted_does_not_change_later() -> None:
    with pytest.raises(FrozenInstanceError):
        GuardSpec().alpha = 2.0  # type: ignore[misc]


ACCEPTED: list[dict[str, Any]] = [
    *({"mode": mode} for mode in MODES),
    {"positions": "all"},
    {"layers": (0,)},
    {"rank": 1},
    {"rank": 8},
    {"alpha": 0.0},
    {"alpha": 3.5},
    {"tau": -4.0},
    {"tau": 0.0},
]


@pytest.mark.parametrize("wish", ACCEPTED, ids=str)
def test_what_can_be_wished(wish: dict[str, Any]) -> None:
    (name,) = wish
    assert getattr(GuardSpec(**wish), name) == wish[name]


TAU = "is not a finite number; a gate that never or always opens is not a guard"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": "erase"}, "mode 'erase' is unknown; choose one of project, steer, supervise, restore, combined, align"),
    ({"mode": ""}, "mode '' is unknown; choose one of project, steer, supervise, restore, combined, align"),
    ({"positions": "first"}, "positions 'first' is unknown; choose one of all, last, prompt"),
    ({"layers": ()}, "the list of layers is empty; name at least one layer, or use auto"),
    ({"rank": 0}, "rank 0 is out of range; choose 1 to 64"),
    ({"rank": 65}, "rank 65 is out of range; choose 1 to 64"),
    ({"rank": -1}, "rank -1 is out of range; choose 1 to 64"),
    ({"alpha": -0.5}, "alpha -0.5 would remove safety or is not a number; choose 0 or more"),
    ({"alpha": math.nan}, "alpha nan would remove safety or is not a number; choose 0 or more"),
    ({"alpha": math.inf}, "alpha inf would remove safety or is not a number; choose 0 or more"),
    ({"tau": math.nan}, f"tau nan {TAU}"),
    ({"tau": -math.inf}, f"tau -inf {TAU}"),
    ({"tau": 1e39}, f"tau 1e+39 {TAU}"),  # finite here, infinite in the graph's float32
    ({"tau": -1e31}, f"tau -1e+31 {TAU}"),  # below what a listening pass sends, so its gate would open
]


@pytest.mark.parametrize(("wish", "sentence"), REFUSED, ids=[str(wish) for wish, _ in REFUSED])
def test_what_cannot_be_wished(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GuardError) as refusal:
        GuardSpec(**wish)
    assert str(refusal.value) == sentence


def test_the_listening_sentinel_is_below_every_threshold() -> None:
    assert GuardSpec(tau=-LARGEST_TAU).tau > NO_SUPERVISOR
