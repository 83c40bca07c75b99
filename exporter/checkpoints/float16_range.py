"""Does the residual stream of a checkpoint fit into float16? Measured in torch, layer by layer, before its graphs are trusted.

A state beyond 65,504 becomes infinite in float16, and everything after it NaN. Some runtimes hide that on a CPU, where they
compute float16 graphs in float32, so a comparison of answers is no test of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graphs.errors import AnatomyNotFound
from ..proof.headroom import LARGEST


@dataclass(frozen=True)
class Peak:
    """The largest |h| that a decoder layer gave out.

    Attributes:
        layer: its number, from 0.
        value: |h|; infinite where a state was not finite.
        channel: of the `d` numbers of the state.
        token: id of the token that had it.
    """

    layer: int
    value: float
    channel: int
    token: int


def decoder_layers(decoder: Any, count: int) -> Any | None:
    """The list of `count` layers of a decoder in torch, whatever it is called; `None` if there is none."""
    from torch.nn import ModuleList

    lists = (module for module in decoder.modules() if isinstance(module, ModuleList))
    return next((found for found in lists if len(found) == count), None)


@contextmanager
def recorded_peaks(model: Any, ids: np.ndarray, mask: np.ndarray, peaks: list[Peak]) -> Iterator[None]:
    """In this context, each decoder layer of the model appends the peak of its output to `peaks`.

    Args:
        model: a transformers model.
        ids: token ids `[batch, sequence]`.
        mask: 1 for tokens, 0 for padding; only tokens count.
        peaks: the list to append to.

    Raises:
        AnatomyNotFound: the model has no list of layers.
    """
    text = model.config.get_text_config()
    decoder = model.get_decoder()
    layers = decoder_layers(decoder, text.num_hidden_layers)
    if layers is None:
        raise AnatomyNotFound(f"{type(decoder).__name__} has no list of {text.num_hidden_layers} layers")

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if state.shape[:2] != mask.shape:
                return  # a later call, of one token
            size = np.abs(state.detach().float().numpy())[mask == 1]
            size[~np.isfinite(size)] = np.inf
            at, channel = np.unravel_index(int(size.argmax()), size.shape)
            peaks.append(Peak(number, float(size[at, channel]), int(channel), int(ids[mask == 1][at])))

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(watch(number)).remove)
        yield


def why_not_float16(peaks: Sequence[Peak]) -> str | None:
    """Names the state that float16 cannot hold; `None` if it can hold all."""
    beyond = [peak for peak in peaks if peak.value > LARGEST]
    if not beyond:
        return None
    first, worst = beyond[0], max(beyond, key=lambda peak: peak.value)
    return (
        f"its hidden states pass float16's range of 65,504 from layer {first.layer} on: layer {worst.layer} reaches "
        f"{worst.value:,.0f} in channel {worst.channel}, at token {worst.token}"
    )
