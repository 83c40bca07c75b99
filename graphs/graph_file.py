"""Reading an untrusted graph file: every rule is checked on the protobuf, before anything is built from it.

Two readers of one file must see one graph, because the proved file runs elsewhere. So anything that protobuf allows a file
to contain twice (two initializers of one name, two forms of a tensor's values, fields of another version) is rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelUnreadable, first_line
from .external_data import require_external_data
from .inline_weights import read_outline
from .read_once import ReadOnce
from .regular_files import read_regular
from .tensor_size import byte_count, number_count

if TYPE_CHECKING:
    import onnx

LARGEST_FILE = (2 << 30) - 1  # bytes; protobuf's own limit
MOST_NODES = MOST_INITIALIZERS = 1_000_000  # the largest decoders have some ten thousand
DEEPEST = 16  # bodies within bodies; decoders have two
_STANDARD = frozenset({"", "ai.onnx", "com.microsoft"})
_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_ONE_TENSOR, _MANY_TENSORS, _ONE_GRAPH, _MANY_GRAPHS = 4, 9, 5, 10  # onnx.AttributeProto.AttributeType
_EXTERNAL, _STRING = 1, 8  # onnx.TensorProto.DataLocation, .DataType


def read_graph_file(path: Path, trust_links: bool = False) -> tuple[onnx.ModelProto, Mapping[int, tuple[int, int]]]:
    """Parse a graph file without reading its external data. Large weights inside a large file are left in the file.

    Args:
        path: absolute.
        trust_links: follow links out of the folder, which we created (`external_data`).

    Returns:
        The model, and index among the top graph's initializers -> `(offset, length)` of the weights left in the file. In the
        model these are external data in the file itself.

    Raises:
        ModelUnreadable: the file breaks a rule; the message names it.
    """
    parsed = _PARSED.get(path, _parse)
    # Every time: files beside the graph may have changed.
    require_external_data(path, parsed.external, trust_links)
    # A copy: onnx_ir's tensors are views of the protobuf, and renaming one renames it there.
    proto = type(parsed.proto)()
    proto.CopyFrom(parsed.proto)
    return proto, parsed.places


@dataclass(frozen=True)
class _Parsed:
    """A graph file that keeps every rule about its own bytes.

    Attributes:
        proto, places: as `read_graph_file` returns them.
        external: its tensors whose numbers are in other files.
        size: of the protobuf, in bytes.
    """

    proto: onnx.ModelProto
    places: Mapping[int, tuple[int, int]]
    external: Sequence[onnx.TensorProto]
    size: int


# The unguarded graph, those around it, and the guarded one. Large graphs are read again: memory is dearer.
_PARSED: ReadOnce[_Parsed] = ReadOnce(most=4, largest=64 << 20, size=lambda parsed: parsed.size)


def _parse(path: Path) -> _Parsed:
    proto, places, size = _protobuf(path)
    require_readable_once(path, proto)
    for index, (_, length) in places.items():
        _require_length(path, proto.graph.initializer[index], length)
    tensors = list(_tensors(path, proto, places))
    for tensor in tensors:
        if tensor.data_location != _EXTERNAL:
            _require_numbers(path, tensor)
    return _Parsed(proto, places, [tensor for tensor in tensors if tensor.data_location == _EXTERNAL], size)


def _protobuf(path: Path) -> tuple[onnx.ModelProto, Mapping[int, tuple[int, int]], int]:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelUnreadable(f"{path}: no such file; give an ONNX model")
    if path.stat().st_size > LARGEST_FILE:
        raise ModelUnreadable(
            f"{path}: has {path.stat().st_size} bytes, a graph file ends at {LARGEST_FILE}; save its weights as external data"
        )
    try:
        outline = read_outline(path)
        content = read_regular(path, LARGEST_FILE) if outline is None else outline.content
        proto = onnx.ModelProto.FromString(content)
    except DecodeError:  # whose words differ from version to version
        raise ModelUnreadable(f"{path}: is not an ONNX model or is truncated (not a protobuf)") from None
    except OSError as error:
        raise ModelUnreadable(
            f"{path}: cannot be read ({first_line(error)}); check the file and its permissions"
        ) from None
    except Exception as error:  # of protobuf
        raise ModelUnreadable(f"{path}: is not an ONNX model or is truncated ({first_line(error)})") from None
    if not proto.graph.node or not proto.graph.output:
        raise ModelUnreadable(f"{path}: is not an ONNX model or is truncated (no nodes or no outputs)")
    if not proto.opset_import:  # they stand behind the graph: a file that was cut there still parses
        raise ModelUnreadable(f"{path}: is not an ONNX model or is truncated (no operator sets)")
    return proto, {} if outline is None else outline.places, len(content)


def require_readable_once(path: Path, proto: onnx.ModelProto) -> None:
    """Nothing that another reader would take otherwise, and not more than a decoder can need.

    Raises:
        ModelUnreadable: which rule it breaks.
    """
    size = proto.ByteSize()
    proto.DiscardUnknownFields()
    if proto.ByteSize() != size:
        raise ModelUnreadable(
            f"{path}: contains fields that this version of onnx does not define; update onnx, or do not use it"
        )
    _require_text(path, proto)
    if proto.training_info:
        raise ModelUnreadable(f"{path}: holds a training graph too; save it for inference")
    _require_once(path, "operator set", (_domain(entry.domain) for entry in proto.opset_import))
    _require_once(path, "function", ((_domain(f.domain), f.name, f.overload) for f in proto.functions))
    for function in proto.functions:
        if function.domain in _STANDARD:
            raise ModelUnreadable(
                f"{path}: defines its own {function.name!r} in the domain {function.domain!r}, which runtimes define; "
                "do not use it"
            )
    nodes = initializers = 0
    _require_no_settings(path, proto)
    for graph, depth in _graphs(proto):
        _require_one_type(path, graph)
        if depth > DEEPEST:
            raise ModelUnreadable(f"{path}: has subgraphs nested more than {DEEPEST} deep; is it a decoder?")
        nodes, initializers = nodes + len(graph.node), initializers + len(graph.initializer)
        if nodes > MOST_NODES or initializers > MOST_INITIALIZERS:
            raise ModelUnreadable(
                f"{path}: has more than {MOST_NODES} nodes or {MOST_INITIALIZERS} initializers; is it a decoder?"
            )
        if graph.sparse_initializer:
            raise ModelUnreadable(
                f"{path}: keeps weights as sparse_initializer, which cannot be guarded; save them dense"
            )
        _require_once(path, "initializer", (tensor.name for tensor in graph.initializer))
        _require_nodes(path, graph.node)
    for function in proto.functions:
        _require_nodes(path, function.node)


def _require_no_settings(path: Path, proto: onnx.ModelProto) -> None:
    """onnxruntime takes session settings from a model's metadata where its environment allows that."""
    _require_once(path, "metadata", (entry.key for entry in proto.metadata_props))
    if any(entry.key == "ort_config" for entry in proto.metadata_props):
        raise ModelUnreadable(f"{path}: configures onnxruntime by its metadata (ort_config); save it without that")


def _require_one_type(path: Path, graph: onnx.GraphProto) -> None:
    """A value has one declared type: runtimes fold sizes that a file declares."""
    _require_once(path, "value_info", (value.name for value in graph.value_info))
    declared = {value.name: value.type for value in graph.value_info}
    for value in (*graph.input, *graph.output):
        if value.name in declared and not _agree(declared[value.name], value.type):
            raise ModelUnreadable(f"{path}: declares two types of {value.name!r}, and readers differ; save it again")


def _agree(first: onnx.TypeProto, second: onnx.TypeProto) -> bool:
    """Whether one value can be of both types: names of open sizes may differ, element types and fixed sizes may not."""
    if first.WhichOneof("value") != "tensor_type" or second.WhichOneof("value") != "tensor_type":
        return first == second
    a, b = first.tensor_type, second.tensor_type
    if a.elem_type != b.elem_type:
        return False
    if not (a.HasField("shape") and b.HasField("shape")):
        return True
    sizes = [[d.dim_value if d.HasField("dim_value") else None for d in t.shape.dim] for t in (a, b)]
    return len(sizes[0]) == len(sizes[1]) and all(x is None or y is None or x == y for x, y in zip(*sizes, strict=True))


def _require_nodes(path: Path, nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        if node.op_type == "EPContext":
            raise ModelUnreadable(
                f"{path}: node {node.name!r} contains a third-party compiled engine (EPContext); start from the graph"
            )
        if len(node.attribute) > 1:
            _require_once(path, f"attribute of {node.name!r}", (attribute.name for attribute in node.attribute))


def _require_once(path: Path, what: str, names: Iterable[Any]) -> None:
    counted = Counter(names)
    twice = next((name for name, count in counted.items() if count > 1), None)
    if twice is not None:
        raise ModelUnreadable(
            f"{path}: has {what} {twice!r} twice, and readers differ in which they take; do not use it"
        )


def _require_text(path: Path, proto: onnx.ModelProto) -> None:
    """Every name is UTF-8. Protobuf for Python gives bytes where it is not, other readers replace or refuse them."""
    import onnx
    from google.protobuf.message import Message

    waiting: list[Any] = [proto]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):  # not by its fields: raw_data would be copied
            texts = [message.name, message.doc_string]
            waiting += message.external_data
        else:
            texts = []
            for field, value in message.ListFields():
                if field.type == field.TYPE_STRING:
                    texts += [value] if isinstance(value, (str, bytes)) else value
                elif field.type == field.TYPE_MESSAGE:
                    waiting += [value] if isinstance(value, Message) else value
        for text in texts:
            if isinstance(text, bytes):
                raise ModelUnreadable(f"{path}: holds the name {text[:40]!r}, which is no UTF-8; do not use it")


def _require_numbers(path: Path, tensor: onnx.TensorProto) -> None:
    """Require a tensor's values in one form, and as many as its shape."""
    forms = [field for field in _DATA_FIELDS if getattr(tensor, field)]
    if len(forms) > 1 or tensor.external_data or tensor.HasField("segment"):
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has its numbers in several forms, and readers differ; do not use it"
        )
    wanted = number_count(path, tensor)
    held = len(getattr(tensor, forms[0])) if forms else 0
    if forms == ["raw_data"] and tensor.data_type != _STRING:
        fits = held == byte_count(path, tensor)
    else:  # a number of less than a byte shares its place in int32_data with others
        fits = wanted <= held * (8 if forms == ["int32_data"] else 1)
    if not fits:
        unit = "bytes" if forms == ["raw_data"] else "numbers"
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has shape {list(tensor.dims)} but {held} {unit}; it is damaged, do not use it"
        )


def _require_length(path: Path, tensor: onnx.TensorProto, held: int) -> None:
    """Require that a tensor whose bytes stay in the file has them in one form, and as many as its shape."""
    if (
        any(getattr(tensor, field) for field in _DATA_FIELDS)
        or tensor.HasField("segment")
        or tensor.data_type == _STRING
    ):
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has its numbers in several forms, and readers differ; do not use it"
        )
    if held != byte_count(path, tensor):
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has shape {list(tensor.dims)} but {held} bytes; it is damaged, do not use it"
        )


def _graphs(proto: onnx.ModelProto) -> Iterator[tuple[onnx.GraphProto, int]]:
    """The graph and every body in it, those of functions too, each with how deep it lies."""
    waiting = [(proto.graph, 0)]
    waiting += [(body, 1) for function in proto.functions for node in function.node for body in _bodies(node)]
    while waiting:
        graph, depth = waiting.pop()
        yield graph, depth
        waiting += [(body, depth + 1) for node in graph.node for body in _bodies(node)]


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == _ONE_GRAPH:
            yield attribute.g
        elif attribute.type == _MANY_GRAPHS:
            yield from attribute.graphs


def _tensors(path: Path, proto: onnx.ModelProto, left: Collection[int]) -> Iterator[onnx.TensorProto]:
    """Every tensor but the top graph's initializers that were `left` in the file; what nodes hold themselves too."""
    groups = [function.node for function in proto.functions]
    for graph, depth in _graphs(proto):
        yield from (tensor for index, tensor in enumerate(graph.initializer) if depth or index not in left)
        groups.append(graph.node)
    for nodes in groups:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == _ONE_TENSOR:
                    yield attribute.t
                elif attribute.type == _MANY_TENSORS:
                    yield from attribute.tensors


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
