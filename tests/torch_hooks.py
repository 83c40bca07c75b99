"""What people do today: the guard as PyTorch forward hooks, in plain torch, sharing no code with the numpy reference.

Two independent readings of one formula that agree are worth more than one that was copied; exported graphs are compared
with both.

    guard = HookedGuard({3: layer}, mode="restore", positions="last")
    with guard.attached(model.model.layers):
        guard.set_call(attention_mask=mask)
        logits = model(input_ids=ids, attention_mask=mask).logits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch


class LayerNumbers(Protocol):
    """`LayerGuard`, or anything with its numbers: float32 arrays, width `d`, rank `m`."""

    @property
    def ssd(self) -> np.ndarray: ...  # [m, d]
    @property
    def origin(self) -> np.ndarray: ...  # [m]
    @property
    def target(self) -> np.ndarray: ...  # [m]
    @property
    def readout(self) -> np.ndarray: ...  # [d]
    @property
    def threshold(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def text_shift(self) -> float: ...


class HookedGuard:
    """Every mode on the outputs of decoder layers.

    The stream keeps its dtype: what is read of it is a matmul in that dtype, then float32 for gate and weights, then
    the stream's dtype again for what is written. So do the exported graphs.

    Attributes:
        coordinates: per guarded layer, `c` of the last token in the latest forward, before this layer's edit,
            `[batch, m]` float32. Those of a text-only pass are the supervisor.
    """

    def __init__(self, layers: Mapping[int, LayerNumbers], mode: str, positions: str = "last") -> None:
        assert mode in ("project", "steer", "supervise", "restore", "combined", "align"), mode
        assert positions in ("all", "last", "prompt"), positions
        self.layers = dict(layers)
        self.mode = mode
        self.positions = positions
        self.coordinates: dict[int, torch.Tensor] = {}
        self._attention_mask: torch.Tensor | None = None
        self._supervisor: Mapping[int, torch.Tensor] | None = None

    def set_call(
        self, attention_mask: torch.Tensor | None = None, supervisor: Mapping[int, torch.Tensor] | None = None
    ) -> None:
        """What the next forward needs to know; call it before each.

        Args:
            attention_mask: `[batch, past + sequence]` or `[batch, sequence]`, 1 for real tokens; `None`: no padding.
            supervisor: per guarded layer, the coordinates of the text-only query, `[batch, m]` (modes that take one); `None`
                closes every gate, so that a text-only pass listens without being changed.
        """
        self._attention_mask = attention_mask
        self._supervisor = supervisor

    @contextmanager
    def attached(self, decoder_layers: torch.nn.ModuleList | Sequence[torch.nn.Module]) -> Iterator[HookedGuard]:
        """Guard `decoder_layers` (a decoder's `ModuleList`) inside the `with` block."""
        with ExitStack() as hooks:
            for number in self.layers:
                handle = decoder_layers[number].register_forward_hook(self._hook(number))
                hooks.callback(handle.remove)
            yield self

    def _hook(self, number: int) -> Any:
        def after_layer(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return self._guarded(number, output)
            return (self._guarded(number, output[0]), *output[1:])  # older layers return (states, ...)

        return after_layer

    def _guarded(self, number: int, h: torch.Tensor) -> torch.Tensor:
        """`h` `[batch, sequence, d]` with this layer's edit."""
        layer = self.layers[number]
        rank = layer.ssd.shape[0]
        last = self._last_positions(h)
        rows = np.concatenate([layer.ssd, layer.readout[None]]) if self.mode in ("restore", "combined") else layer.ssd
        read = (h @ _like(h, rows).T).float()
        coordinates = read[..., :rank]
        self.coordinates[number] = coordinates[torch.arange(h.shape[0]), last].detach()
        weights = self._weights(number, coordinates, read[..., rank:])
        change = weights.to(h.dtype) @ _like(h, layer.ssd)
        if self.positions == "all":
            return h + change
        chosen = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        chosen[torch.arange(h.shape[0]), last] = True
        return torch.where(chosen[..., None], h + change, h)

    def _weights(self, number: int, c: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """How much of each direction to add: `[batch, sequence, m]` float32, exact zeros where the gate is closed."""
        layer = self.layers[number]
        if self.mode == "project":
            return -c
        if self.mode == "steer":
            wanted, gate = layer.alpha * c, c[..., :1] > layer.threshold
        elif self.mode == "restore":
            wanted, gate = _like(c, layer.target) - c, score > layer.threshold
        elif self._supervisor is None:
            return torch.zeros_like(c)
        elif self.mode == "combined":
            told = self._supervisor[number].float()[:, None, :1]
            wanted = _like(c, layer.target) - c
            gate = (score > layer.threshold) | (told + layer.text_shift > layer.threshold)
        elif self.mode == "align":  # the caller gives no supervisor behind the prompt
            return self._supervisor[number].float()[:, None, :] - c
        else:
            text, origin = self._supervisor[number].float()[:, None, :], _like(c, layer.origin)
            wanted = layer.alpha * (text - origin) - (c - origin)
            gate = text[..., :1] > layer.threshold
        return torch.where(gate, wanted, torch.zeros_like(wanted))

    def _last_positions(self, h: torch.Tensor) -> torch.Tensor:
        """`[batch]`: where in this call each row's last real token is."""
        batch, sequence = h.shape[:2]
        if self._attention_mask is None:
            return torch.full((batch,), sequence - 1, device=h.device)
        mask = self._attention_mask
        assert mask.shape[0] == batch and mask.shape[1] >= sequence, (mask.shape, h.shape)
        mask = mask[:, -sequence:]  # the columns before it are the cache's
        return (mask.to(h.device).bool() * torch.arange(1, sequence + 1, device=h.device)).argmax(dim=1)


def _like(tensor: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device)
