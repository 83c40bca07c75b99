"""Inputs of a decoder call: a batch of prompts, the state between calls, masks and empty caches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ..graphs.decoder_state import StatePair
from ..graphs.errors import GuardError
from ..graphs.plan import SUPERVISOR_INPUTS
from ..graphs.roles import TOKEN_TYPES, TOKENS, InputRoles, input_roles
from ..graphs.runtime_controls import PAST_GATE_INPUT
from .device import DeviceTensor, Tensor
from .images.deepstack import is_embeds
from .images.prompt_images import PromptImages
from .runner_protocol import Port

# Further inputs of merged decoders: the branch of their `If` (optimum), and the number of logits to return (older transformers;
# 0 returns all).
CACHE_BRANCH, KEPT_LOGITS = "use_cache_branch", "num_logits_to_keep"
SWITCHES = frozenset({CACHE_BRANCH, KEPT_LOGITS})
# Inputs that a guard adds; knobs are not among them, because they have defaults.
GUARD_INPUTS = frozenset({*SUPERVISOR_INPUTS, PAST_GATE_INPUT})
# Embeddings of the tokens for every layer, `[batch, sequence, layers, size]`, which the embedding graph gives too (Gemma 4).
PER_LAYER = "per_layer_inputs"


class FurtherInputs(Protocol):
    """Values for inputs that no prompt fills."""

    def between(self, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """Inputs by name for the call with the tokens `start` to `stop`."""
        ...


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for a decoder.

    Attributes:
        ids: token ids `[batch, sequence]` int64, padded on the left.
        mask: 1 for tokens, 0 for padding, `[batch, sequence]` int64.
        embeds: `[batch, sequence, d]` in the graph's dtype, where the decoder takes `inputs_embeds`.
        images: inputs other than embeddings that depend on images; `None` for text, and for most models.
        given: all inputs of the graph by name, if the caller prepared them; `ids` and `mask` then only mark which positions
            are tokens.
        further: inputs of every call that do not depend on the prompt.
    """

    ids: np.ndarray
    mask: np.ndarray
    embeds: np.ndarray | None = None
    images: PromptImages | None = None
    given: Mapping[str, np.ndarray] | None = None
    further: FurtherInputs | None = None

    @property
    def size(self) -> int:
        return self.ids.shape[0]


@dataclass
class DecoderState:
    """State of one generation between calls.

    The cache, the supervisor's coordinates and held gates stay on the runner's device, if it has one.

    Attributes:
        ids, mask: tokens so far and their mask, `[batch, tokens so far]` int64.
        embeds: embeddings so far, where the decoder takes embeddings.
        cache: the cache inputs of the next call, by name.
        supervisor: the text-only coordinates `[batch, layers, m]`, for a supervised graph.
        images, further: as in `PromptBatch`.
        runtime_controls: guard inputs that are the same in every call, by name: knobs, and gates once the prompt decided them.
    """

    ids: np.ndarray
    mask: np.ndarray
    embeds: np.ndarray | None
    cache: dict[str, Tensor] = field(default_factory=dict)
    supervisor: Tensor | None = None
    images: PromptImages | None = None
    further: FurtherInputs | None = None
    runtime_controls: dict[str, Tensor] = field(default_factory=dict)


def mask_for(mask: np.ndarray, tokens: int, port: Port, keeps_size: bool) -> np.ndarray:
    """The attention mask in the shape and dtype of the graph's input.

    Args:
        mask: `[batch, tokens so far]`.
        tokens: number of tokens in this call.
        port: the graph's input. If its number of columns is fixed, the mask is padded with zeros. A port of rank 4 takes a
            causal mask.
        keeps_size: whether the cache is a buffer of fixed size: zeros then follow the tokens, else they precede them.
    """
    columns = port.shape[-1]
    if columns is not None and columns > mask.shape[1]:
        missing = columns - mask.shape[1]
        mask = np.pad(mask, ((0, 0), (0, missing) if keeps_size else (missing, 0)))
    if len(port.shape) != 4:
        return mask.astype(port.dtype)
    total = mask.shape[1]
    first = total - tokens
    sees = np.arange(total)[None, :] <= np.arange(first, total)[:, None]
    allowed = sees[None, None] & (mask != 0)[:, None, None, :]
    if port.dtype.kind not in "fV":
        return allowed.astype(port.dtype)
    return np.where(allowed, 0.0, -1e4).astype(port.dtype)


def needs_more(inputs: Iterable[str], roles: InputRoles, embedded: Collection[str] = ()) -> list[str]:
    """The inputs that no prompt fills, in their order.

    Args:
        embedded: inputs besides `inputs_embeds` that the embedding graph gives.
    """
    known = {
        *embedded,
        roles.embeds,
        roles.tokens,
        TOKENS,
        roles.mask,
        roles.positions,
        *roles.pasts,
        *SWITCHES,
        TOKEN_TYPES,
        *GUARD_INPUTS,
    }
    return [name for name in inputs if name not in known and not is_embeds(name)]


def can_pad(graph: ir.Graph) -> bool:
    """Whether rows of different lengths may share a batch: a graph that reads no mask would take padding for text.

    GroupQueryAttention derives positions from the mask's sum: rows padded on the left would be misread.
    """
    roles = input_roles(graph)
    text = next((value for value in graph.inputs if value.name == roles.text), None)
    if text is not None and text.shape is not None and len(text.shape) > 1 and str(text.shape[1]) == "1":
        return False  # one token a call: a row would begin with padding alone, and attend to nothing
    return bool(roles.mask) and not any(node.op_type == "GroupQueryAttention" for node in graph.all_nodes())


def float_coordinates(supervisor: Tensor) -> Tensor:
    """As graphs take them, in float32; what a graph itself gave is already that, and stays on its device."""
    if isinstance(supervisor, DeviceTensor) and supervisor.dtype == np.float32:
        return supervisor
    return np.asarray(supervisor).astype(np.float32)


def empty_state(port: Port, pair: StatePair, batch: int, kv_heads: int | None, head_size: int | None) -> np.ndarray:
    """The cache before the first token.

    Args:
        port: the cache input.
        pair: the state that the input belongs to.
        batch: rows.
        kv_heads, head_size: from the config; used where the port does not fix them.

    Returns:
        Zeros `[batch, kv_heads, 0, head_size]`; for a recurrent or convolutional layer and a ring cache the full state.

    Raises:
        GuardError: neither the graph nor a config has the sizes.
    """
    sizes, empty = [batch, *port.shape[1:]], pair.capacity or 0
    if pair.axis is not None:
        sizes[pair.axis] = empty
    if None in sizes and len(sizes) == 4:
        heads = [batch, kv_heads, empty, head_size]
        sizes = [size if size is not None else other for size, other in zip(sizes, heads, strict=True)]
    if None in sizes:
        raise GuardError(
            f"cache input {port.name!r} has shape {port.shape} and no config has the number and size of heads; put the "
            "model's config.json beside it"
        )
    return np.zeros(tuple(size or 0 for size in sizes), port.dtype)
