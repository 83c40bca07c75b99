"""Rotations that transformers computes with complex numbers (Llama 4), with pairs of real ones, which ONNX has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pairs:
    """Complex numbers as a real tensor `[..., 2]`, with what models do to them between `view_as_complex` and `view_as_real`."""

    parts: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the axis of the two parts."""
        return tuple(self.parts.shape[:-1])

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return self.parts.ndim - 1

    @property
    def device(self) -> Any:
        """Of the parts."""
        return self.parts.device

    def to(self, *args: Any, **named: Any) -> Pairs:
        """On another device."""
        return Pairs(self.parts.to(*args, **named))

    def view(self, *shape: int) -> Pairs:
        """The same numbers in another shape."""
        return Pairs(self.parts.reshape(*shape, 2))

    def unsqueeze(self, axis: int) -> Pairs:
        """With an axis of length 1."""
        return Pairs(self.parts.unsqueeze(axis if axis >= 0 else axis - 1))

    def __getitem__(self, index: Any) -> Pairs:
        index = index if isinstance(index, tuple) else (index,)
        return Pairs(self.parts[(*index, slice(None))] if Ellipsis in index else self.parts[index])

    def __mul__(self, other: Any) -> Pairs:
        import torch

        if not isinstance(other, Pairs):  # a real factor
            return Pairs(self.parts * other)
        real, imaginary = self.parts.unbind(-1)
        other_real, other_imaginary = other.parts.unbind(-1)
        return Pairs(
            torch.stack(
                [real * other_real - imaginary * other_imaginary, real * other_imaginary + imaginary * other_real], -1
            )
        )


@contextmanager
def complex_as_pairs(model: Any) -> Iterator[None]:
    """Within, complex numbers of the model are pairs of real ones."""
    import torch

    def polar(size: torch.Tensor, angle: torch.Tensor) -> Pairs:
        return Pairs(torch.stack([size * angle.cos(), size * angle.sin()], -1))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "polar", polar))
        stack.enter_context(mock.patch.object(torch, "view_as_complex", Pairs))
        stack.enter_context(mock.patch.object(torch, "view_as_real", lambda pairs: pairs.parts))
        for part in model.modules():
            for name, table in [*part._buffers.items()]:
                if table is not None and table.is_complex():
                    stack.enter_context(
                        _in_place_of_buffer(part, name, Pairs(torch.stack([table.real, table.imag], -1)))
                    )
        yield


@contextmanager
def _in_place_of_buffer(part: Any, name: str, pairs: Pairs) -> Iterator[None]:
    buffer = part._buffers.pop(name)
    vars(part)[name] = pairs
    try:
        yield
    finally:
        del vars(part)[name]
        part._buffers[name] = buffer
