"""Sizes of axes as products of factors, and the whole numbers and sizes that shape computations put together.

A factor is a whole number or a name: the batch, the tokens of this call, the tokens of the past. Exporters compute the second
input of a Reshape from `Shape`, `Gather` and `Concat`; what comes out is known where every part is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import onnx_ir as ir

from .constants import constant

BATCH, TOKENS = "batch", "tokens"
Factor = int | str | None  # `None`: a size that is not known, of an axis of numbers
Axis = tuple[Factor, ...]  # the size of an axis; () is 1
Number = int | Axis | None  # in a shape computation: a whole number, the size of an axis, or not known
_SAME = frozenset({"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"})
_INPUTS = {**dict.fromkeys(("Gather", "Mul", "Div", "Add", "Sub", "Equal"), 2), **dict.fromkeys(("Slice", "Where"), 3)}
_MOST_NUMBERS = 64  # a shape has few


def whole_size(size: object) -> Axis:
    """A whole number as an axis; anything else is not known."""
    return (None,) if not isinstance(size, int) else () if size == 1 else (size,)


class AxisSizes:
    """Evaluates what shape computations give.

    Args:
        axes: the axes of a value, where they are known.
        batch: the signature's names for the first size of text inputs. Exporters read the batch from any input that has it
            (`position_ids`). The number of tokens is not believed of a name: a mask may be longer than the call.
    """

    def __init__(self, axes: Callable[[ir.Value], tuple[Axis, ...] | None], batch: Collection[str] = ()) -> None:
        self._axes, self._batch = axes, batch
        self._seen: dict[ir.Value, tuple[Number, ...] | None] = {}

    def numbers(self, value: ir.Value | None, depth: int = 16) -> tuple[Number, ...] | None:
        """The numbers of a value of rank 0 or 1; `None` where it is not such a computation."""
        if value is None:
            return None
        if value not in self._seen:
            found = self._evaluated(value, depth)
            self._seen[value] = found if found is not None and len(found) <= _MOST_NUMBERS else None
        return self._seen[value]

    def _evaluated(self, value: ir.Value, depth: int) -> tuple[Number, ...] | None:
        tensor = constant(value)
        if tensor is not None:
            small = len(tensor.shape) < 2 and tensor.size <= _MOST_NUMBERS and tensor.dtype.is_integer()
            return tuple(int(n) for n in tensor.numpy().reshape(-1)) if small else None
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or depth == 0:
            return None
        if node.op_type == "Shape":
            return self._shape(node, depth)
        parts = [self.numbers(source, depth - 1) for source in node.inputs]
        if node.op_type in _SAME:
            return parts[0]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        if len(known) < _INPUTS.get(node.op_type, 1):
            return None  # a damaged file
        if node.op_type == "ConstantOfShape":
            return _filled(node, known[0])
        if node.op_type == "Where" and len({len(part) for part in known}) == 1:  # an Expand's sizes: -1 stands for 1
            return tuple(
                b if condition == 1 else c if condition == 0 else None for condition, b, c in zip(*known, strict=True)
            )
        if node.op_type == "Concat":
            return tuple(number for part in known for number in part)
        if node.op_type == "Gather" and all(isinstance(at, int) for at in known[1]):
            picked = (at for at in known[1] if isinstance(at, int))
            return tuple(known[0][at] if -len(known[0]) <= at < len(known[0]) else None for at in picked)
        if node.op_type == "Slice":
            return _sliced(known)
        if node.op_type in ("Mul", "Div", "Add", "Sub", "Equal"):
            first, second = known[:2]
            length = max(len(first), len(second))
            if {len(first), len(second)} <= {1, length}:
                first, second = first * (length // len(first)), second * (length // len(second))
                return tuple(_combined(node.op_type, a, b) for a, b in zip(first, second, strict=True))
        return None

    def of_input(self, value: ir.Value | None) -> tuple[Axis, ...] | None:
        """The axes of a graph input, each size a factor of its own name; `None` for any other value."""
        if value is None or not value.is_graph_input() or value.shape is None:
            return None
        axes: list[Axis] = []
        for place, size in enumerate(value.shape):
            name = size.value if isinstance(size, ir.SymbolicDim) else None
            own = f"{value.name}[{place}]" if name is None else f"[{name}]"
            own = BATCH if place == 0 and name in self._batch else own
            axes.append(whole_size(size) if isinstance(size, int) else (own,))
        return tuple(axes)

    def _is_list(self, value: ir.Value) -> bool:
        """Whether whole numbers that are put together have one axis, and are no single number."""
        node = value.producer()
        if node is None or node.op_type not in ("Concat", "Reshape"):
            return False
        target = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        return node.op_type == "Concat" or (target is not None and target.size == 1)

    def _shape(self, node: ir.Node, depth: int) -> tuple[Number, ...] | None:
        source = node.inputs[0]
        if source is not None and not node.attributes and self._is_list(source):
            numbers = self.numbers(source, depth - 1)  # the shape of a shape
            if numbers is not None:
                return (len(numbers),)
        axes = self._axes(source) if source is not None else None
        axes = axes or self.of_input(source)
        bounds = [node.attributes.get(name) for name in ("start", "end")]
        if axes is None or any(bound is not None and bound.is_ref() for bound in bounds):
            return None
        return axes[slice(*(None if bound is None else bound.as_int() for bound in bounds))]


def joined(first: Axis, second: Axis) -> Axis:
    """The size of two axes behind each other, where each is one open size: the past tokens, and those of this call."""
    names = sorted(factor for factor in (*first, *second) if isinstance(factor, str))
    return (" + ".join(names),) if len(first) == len(second) == 1 and len(names) == 2 else (None,)


def constant_dims(value: ir.Value | None, depth: int = 8) -> tuple[int, ...] | None:
    """The shape of a constant, or of what is made of one, a few steps away, without a look at any input."""
    tensor = constant(value)
    if tensor is not None:
        return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or depth == 0:
        return None
    if node.op_type in ("Cast", "CastLike", "Identity", "DequantizeLinear"):
        return constant_dims(node.inputs[0], depth - 1)
    if node.op_type == "Transpose":
        dims, order = constant_dims(node.inputs[0], depth - 1), node.attributes.get("perm")
        if dims is None or (order is not None and order.is_ref()):
            return None
        return dims[::-1] if order is None else tuple(dims[place] for place in order.as_ints())
    if node.op_type == "ConstantOfShape":
        sizes = AxisSizes(lambda _: None).numbers(node.inputs[0])
        whole = [size for size in sizes or () if isinstance(size, int)]
        return tuple(whole) if sizes is not None and len(whole) == len(sizes) else None
    return None


def reshaped(axes: Sequence[Axis], target: Sequence[Number]) -> tuple[Axis, ...] | None:
    """The axes behind a Reshape, if every one of them is a run of whole factors; else `None`.

    Args:
        axes: before it.
        target: its second input: a size, 0 for the size at the same place, -1 for what is left.
    """
    wanted: list[Axis | None] = []  # `None` for -1
    for place, number in enumerate(target):
        if number is None or (number == 0 and place >= len(axes)) or (isinstance(number, int) and number < -1):
            return None
        wanted.append(None if number == -1 else axes[place] if number == 0 else _as_axis(number))
    factors: list[Factor] = [factor for axis in axes for factor in axis]
    if wanted.count(None) > 1:
        return None
    middle = wanted.index(None) if None in wanted else len(wanted)
    front = [_taken(factors, axis or (), 0) for axis in wanted[:middle]]
    back = [_taken(factors, axis or (), -1) for axis in reversed(wanted[middle + 1 :])]
    found = [*front, *([tuple(factors)] if middle < len(wanted) else []), *reversed(back)]
    if middle == len(wanted) and factors:
        return None
    return None if None in found else tuple(axis for axis in found if axis is not None)


def _taken(factors: list[Factor], axis: Axis, end: int) -> Axis | None:
    """The factors that make up an axis of this size, taken away from one end of the list; `None` if they do not."""
    names, number = [factor for factor in axis if not isinstance(factor, int)], 1
    for factor in axis:
        number *= factor if isinstance(factor, int) else 1
    taken: list[Factor] = []
    while names or number > 1:
        if not factors:
            return None
        factor = factors.pop(end)
        if not isinstance(factor, int):
            if factor is None or factor not in names:
                return None
            names.remove(factor)
        elif number % factor == 0:
            number //= factor
        elif factor % number == 0:
            factors.insert(0 if end == 0 else len(factors), factor // number)
            factor, number = number, 1
        else:
            return None
        taken.append(factor)
    return tuple(taken if end == 0 else reversed(taken))


def _as_axis(number: int | Axis) -> Axis:
    return whole_size(number) if isinstance(number, int) else number


def _sliced(known: Sequence[tuple[Number, ...]]) -> tuple[Number, ...] | None:
    bounds = [part[0] if len(part) == 1 else None for part in known[1:3]]
    step = known[4][0] if len(known) > 4 and len(known[4]) == 1 else 1
    if not all(isinstance(bound, int) for bound in (*bounds, step)) or not step:
        return None
    return known[0][slice(*bounds, step)]  # type: ignore[misc]


def _filled(node: ir.Node, shape: tuple[Number, ...]) -> tuple[Number, ...] | None:
    """What a ConstantOfShape outputs, where that is a short list of whole numbers."""
    attribute = node.attributes.get("value")
    if len(shape) != 1 or not isinstance(shape[0], int) or not 0 <= shape[0] <= _MOST_NUMBERS:
        return None
    if attribute is None or attribute.is_ref() or not attribute.as_tensor().dtype.is_integer():
        return None
    return (int(attribute.as_tensor().numpy().reshape(-1)[0]),) * shape[0]


def _combined(kind: str, a: Number, b: Number) -> Number:
    """Whole numbers are computed with; of sizes with names only products are known."""
    x, y = _integer(a), _integer(b)
    if kind == "Equal":  # no size is -1
        return int(x == y) if x is not None and y is not None else 0 if -1 in (x, y) and a is not None else None
    if x is not None and y is not None:
        if kind == "Div":
            return x // y if y > 0 and x >= 0 else None
        return x * y if kind == "Mul" else x + y if kind == "Add" else x - y
    if kind == "Add" and isinstance(a, tuple) and isinstance(b, tuple):
        return joined(a, b)
    if kind == "Mul" and a is not None and b is not None and a not in (0, -1) and b not in (0, -1):
        return (*_as_axis(a), *_as_axis(b))
    return None


def _integer(number: Number) -> int | None:
    if isinstance(number, tuple):
        product = 1
        for factor in number:
            if not isinstance(factor, int):
                return None
            product *= factor
        return product
    return number
