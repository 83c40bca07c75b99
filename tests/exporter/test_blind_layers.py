"""Layers that cannot see what anchors differ in get no direction; the others do."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.calibration.align_layers import places_of_align
from vlmguard.exporter.extraction.extract import directions_from_states
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.spec import GuardSpec

PAIRS, LAYERS, WIDTH = 20, 5, 16


def states(blind: tuple[int, ...], rounding: float = 0.0, loud: float = 1.0) -> np.ndarray:
    """Harmful and harmless in turns `[2 * pairs, layers, d]`; those of a pair are alike in the blind layers.

    Args:
        blind: layers.
        rounding: by how much they differ there, as a share.
        loud: how much larger than the others one channel is.
    """
    random = np.random.default_rng(0)
    both = random.normal(size=(2 * PAIRS, LAYERS, WIDTH)).astype(np.float32)
    both[0::2, :, 0] += 3
    for layer in blind:
        noise = random.uniform(-rounding, rounding, size=(PAIRS, WIDTH))
        both[0::2, layer] = both[1::2, layer] * (1 + noise)
    both[..., 5] *= loud
    return both


@pytest.mark.parametrize("rounding", [0.0, 1e-6])
@pytest.mark.parametrize("loud", [1.0, 3000.0])
def test_a_layer_that_sees_no_difference_has_no_direction(rounding: float, loud: float) -> None:
    """As the first convolutions of LFM2, which see the template's last tokens alone."""
    directions = directions_from_states(states((0, 1), rounding, loud), range(LAYERS), 4, "svd", None)
    assert list(directions.layers) == [2, 3, 4] == [int(number) for number in directions.evidence]
    places = list(places_of_align(directions, LAYERS, GuardSpec()))
    assert places and all(set(place.layers) <= {2, 3, 4} for place in places)


def test_a_small_difference_beside_a_loud_channel_is_one() -> None:
    both = states((0,), loud=3000.0)
    both[0::2, 0, 1] += 0.01
    assert 0 in directions_from_states(both, range(LAYERS), 4, "svd", None).layers


def test_no_layer_that_sees_a_difference_is_refused() -> None:
    with pytest.raises(GuardError, match="the anchors' hidden states do not differ"):
        directions_from_states(states(tuple(range(LAYERS))), range(LAYERS), 4, "svd", None)
