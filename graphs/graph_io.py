"""Graph files on disk and in memory. The only opener and the only writer of graphs.

Files are always opened by absolute path: onnx_ir confines external data to the model's folder, but (seen on 1.1.0) skips
that check for a bare relative name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

import onnx_ir as ir
from onnx_ir.external_data import set_base_dir

from .errors import GuardError, ModelUnreadable, first_line
from .external_weights import trust_places
from .graph_file import LARGEST_FILE, read_graph_file
from .inline_weights import InFile, referring_proto, total, weights_in_files, whole_pieces
from .new_files import new_file
from .read_once import Stamp, stamp_of

GUARD_DATA = ".guard.data"  # suffix of the guard's external data, after the graph's file name
_MOVED_FROM = 1024  # bytes; onnxruntime requires values that shapes depend on inside the graph
_ALIGNED = 64


def load_graph(path: Path, trust_links: bool = False) -> ir.Model:
    """Open a graph by absolute path; external weights are referenced, not read, and checked to be there in full.

    Args:
        path: of the graph.
        trust_links: it is ours (on its way to be proved, or under a manifest's digests): its weights may be links out of the
            folder, as `--data reference` makes them.

    Raises:
        ModelUnreadable: missing, not ONNX, truncated, or it breaks a rule for untrusted files (`graph_file`).
    """
    path = Path(path).absolute()
    proto, places = read_graph_file(path, trust_links)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir has exceptions of its own
        raise ModelUnreadable(f"{path}: is not a valid ONNX model ({first_line(error)}); export it again") from None
    _leave_in_file(model, path, [(proto.graph.initializer[index].name, place) for index, place in places.items()])
    set_base_dir(model.graph, str(path.parent))
    trust_places(model)
    idle = next((node for node in model.graph.all_nodes() if not node.outputs), None)
    if idle is not None:
        raise ModelUnreadable(f"{path}: node {idle.name!r} ({idle.op_type}) has no outputs; export it again")
    return model


def _leave_in_file(model: ir.Model, path: Path, places: Iterable[tuple[str, tuple[int, int]]]) -> None:
    """Large weights inside the file are read from there when their numbers are needed."""
    for name, (offset, length) in places:
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        shape = [size for size in tensor.shape if isinstance(size, int)]  # a tensor's sizes are numbers
        value.const_value = InFile(path, offset, length, tensor.dtype, shape, name)


def external_files(path: Path) -> list[Path]:
    """The external-data files of a graph, absolute, sorted.

    Raises:
        ModelUnreadable: the graph cannot be opened.
    """
    return list(_external_files(path.absolute(), stamp_of(path)))


@lru_cache(maxsize=64)
def _external_files(path: Path, stamp: Stamp | None) -> tuple[Path, ...]:
    """Asked for several times in every export, and the answer costs a parse; `stamp` makes a changed file another one."""
    return tuple(sorted({_data_path(path, tensor) for tensor in _external_tensors(load_graph(path, trust_links=True))}))


def save_graph(model: ir.Model, path: Path, own_data: Collection[str] = ()) -> Path | None:
    """Write a graph; external tensors stay references to files of the same relative name, which the caller provides.

    Args:
        own_data: names of initializers whose numbers go to a file of their own, `<file>.guard.data` beside the graph:
            what was added to a model that keeps its weights outside. Numbers too small to gain from it stay inside.

    Returns:
        That file, or `None` if nothing went there.
    """
    data = path.with_name(f"{path.name}{GUARD_DATA}")
    moved = _move_out(model, own_data, data)
    weights = weights_in_files(model)
    try:
        pieces = whole_pieces(referring_proto(model, weights), weights)
        if total(pieces) > LARGEST_FILE:
            raise ValueError("too large for a protobuf")
    except ValueError:  # protobuf's own 2 GiB limit
        raise GuardError(
            f"{path.name}: the guarded graph passes 2 GiB; save the model with external data first, or choose "
            "--lowering lowrank"
        ) from None
    with new_file(path) as file:
        _write(pieces, file)
    return data if moved else None


def _write(pieces: Iterable[bytes | InFile], file: IO[bytes]) -> None:
    for piece in pieces:
        if isinstance(piece, InFile):
            piece.copy_to(file)
        else:
            file.write(piece)


def _move_out(model: ir.Model, names: Collection[str], data: Path) -> bool:
    """Write these initializers to `data`, one after the other, and refer to them there."""
    offset = 0
    values = [model.graph.initializers[name] for name in sorted(names)]
    chosen = [v for v in values if v.const_value is not None and v.const_value.nbytes >= _MOVED_FROM]
    if not chosen:
        return False
    with new_file(data) as file:
        for value in chosen:
            tensor = value.const_value
            assert tensor is not None
            content = tensor.tobytes()
            file.write(content)
            value.const_value = ir.ExternalTensor(
                data.name,
                offset,
                len(content),
                tensor.dtype,
                name=tensor.name or "",
                shape=ir.Shape(tensor.numpy().shape),
                base_dir=data.parent,
            )
            offset += len(content)
            padding = -offset % _ALIGNED  # so that runtimes can map it
            file.write(bytes(padding))
            offset += padding
    return True


def graph_bytes(model: ir.Model) -> bytes:
    """The serialized graph; external tensors stay references, weights inside a graph file are inline again."""
    weights = weights_in_files(model)
    content = BytesIO()
    _write(whole_pieces(referring_proto(model, weights), weights), content)
    return content.getvalue()


def in_memory(model: ir.Model, folder: Path, maps: bool = True) -> tuple[bytes, Path]:
    """The serialized graph for a session that is opened from memory, and the folder that its external data lies in.

    Weights inside a large graph file of that folder are external data in that file: the runtime maps them, and no copy is
    made. Without `maps` they are in the serialized graph.

    Runtimes refuse external data that a link leads out of the folder (onnxruntime 1.31 does), and Hugging Face's cache is
    made of such links: there the graph refers to the files that the links lead to.

    Raises:
        ModelUnreadable: the links lead to several folders.
    """
    mapped = weights_in_files(model) if maps else {}
    if any(tensor.file.parent != folder for tensor in mapped.values()):
        mapped = {}
    proto = referring_proto(model, mapped)
    entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    real = {entry.value: (folder / entry.value).resolve() for entry in entries}
    if any((folder / name).is_symlink() for name in real):
        homes = {path.parent for path in real.values()}
        if len(homes) > 1:
            raise ModelUnreadable(
                f"{folder}: the links to its external data lead to {len(homes)} folders; copy the model to one, links followed"
            )
        folder = homes.pop()
        for entry in entries:
            entry.value = real[entry.value].name
    return proto.SerializeToString(deterministic=True), folder


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Of initializers, and of what nodes hold themselves."""
    found = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                found.append(attribute.as_tensor())
            elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                found += attribute.as_tensors()
    return [tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)]


def _data_path(path: Path, tensor: ir.ExternalTensor) -> Path:
    return path.absolute().parent / str(tensor.location)
