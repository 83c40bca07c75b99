"""Writing nodes: a small builder that names everything under one prefix and remembers what it wrote.

Names matter here: the prefix `vlmguard/` marks the guard's nodes in the file, and the proof counts by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .dtypes import IR_DTYPES, NUMPY_DTYPES

PREFIX = "vlmguard/"


class NodeBuilder:
    """Collects the nodes and initializers of one part of the guard, then places them.

    Args:
        graph: where the nodes go.
        scope: name below `vlmguard/`, such as `layer_3`.
        properties: `metadata_props` of each node, saying what was done and why.
        home: where initializers are registered, the top graph; default `graph`. The branches of an `If` share them, so
            that a merged decoder has one set of numbers and not two that could differ.
        path: what node names start with below the prefix: "" at the top, `then_branch/` in a branch.
    """

    def __init__(
        self,
        graph: ir.Graph,
        scope: str,
        properties: dict[str, str] | None = None,
        home: ir.Graph | None = None,
        path: str = "",
    ) -> None:
        self.graph = graph
        self.home = home if home is not None else graph
        self.scope = PREFIX + path + scope
        self.weights = PREFIX + scope
        self.properties = properties or {}
        self.nodes: list[ir.Node] = []
        self.initializers: list[str] = []
        self.numbers: list[str] = []  # those of them that `constant` wrote

    def constant(self, name: str, array: np.ndarray, dtype: str | None = None) -> ir.Value:
        """An initializer; `dtype` is a stream dtype, `None` keeps the array's own."""
        array = np.array(array, dtype=None if dtype is None else NUMPY_DTYPES[dtype], order="C")
        self.numbers.append(f"{self.weights}/{name}")
        return self._register(self.numbers[-1], array)

    def integers(self, *numbers: int) -> ir.Value:
        """A 1-D int64 constant (axes, bounds); one per distinct list, shared by the whole guard."""
        name = f"{PREFIX}constants/{'_'.join(map(str, numbers))}"
        return self._register(name, np.array(numbers, dtype=np.int64))

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value | None = None,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add one node with one output, both named `vlmguard/<scope>/<name>`, and return the output.

        Args:
            name: unique in the scope.
            op_type: an ONNX operator.
            inputs: `None` for an omitted input.
            like: a value with the output's type and shape; `None`: not declared.
            attributes: of the node.
        """
        full = f"{self.scope}/{name}"
        output = ir.Value(name=full)
        if like is not None and like.type is not None:  # an unknown type is left out, not written as unknown
            output.type, output.shape = like.type, like.shape
        node = ir.node(op_type, list(inputs), attributes, outputs=[output], name=full)
        node.metadata_props.update(self.properties)
        self.nodes.append(node)
        return output

    def split(
        self, name: str, value: ir.Value, parts: Sequence[str], axis: int, sizes: Sequence[int] | None = None
    ) -> list[ir.Value]:
        """Parts of a value along one axis, by one node; the value itself for one part.

        Args:
            name: of the node.
            value: any tensor.
            parts: names of the parts.
            axis: that is split.
            sizes: of the parts; `None`: equal ones.
        """
        if len(parts) == 1:
            return [value]
        outputs = [ir.Value(name=f"{self.scope}/{part}") for part in parts]
        # from opset 18 on the number of equal parts is written, before it is the number of outputs
        counted = sizes is None and self.home.opset_imports.get("", 18) >= 18
        node = ir.node(
            "Split",
            [value] if sizes is None else [value, self.integers(*sizes)],
            {"axis": axis} | ({"num_outputs": len(parts)} if counted else {}),
            outputs=outputs,
            name=f"{self.scope}/{name}",
        )
        node.metadata_props.update(self.properties)
        self.nodes.append(node)
        return outputs

    def _register(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.home.initializers:  # another branch has written it, or another part of the guard
            known = self.home.initializers[name]
            assert known.const_value is not None and known.const_value.tobytes() == array.tobytes(), name
            return known
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.home.register_initializer(value)
        self.initializers.append(name)
        return value

    def cast(self, name: str, value: ir.Value, dtype: str) -> ir.Value:
        return self.op(name, "Cast", [value], to=int(IR_DTYPES[dtype]))

    def place_before(self, node: ir.Node) -> None:
        self.graph.insert_before(node, self.nodes)

    def place_after(self, node: ir.Node) -> None:
        self.graph.insert_after(node, self.nodes)

    def place_last(self) -> None:
        self.graph.extend(self.nodes)
