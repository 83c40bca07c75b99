"""Compares everything around a guarded decoder with the unguarded model: external data, encoders, tokenizer, configs.

External data is compared by content: a tensor is the same if it takes the same bytes of a file with the same SHA-256,
whatever the file is called here. So neither a manifest nor a name decides which file stands for which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import prepare
from ...graphs.digests import sha256_files
from ...graphs.directions import DIRECTIONS_FILE
from ...graphs.external_weights import CheckedWeight
from ...graphs.graph_content import is_graph
from ...graphs.graph_io import GUARD_DATA, external_files, load_graph
from ...graphs.inventory import is_read
from ...graphs.manifest import Manifest
from ...graphs.package import SBOM_NAME, ModelPackage
from ...graphs.proof.structure import Check, exact, same_graph
from ..packaging.regenerate import is_left_out, regenerated, restored_graphs


class Contents:
    """Digests of files, each read once; those of the guarded folder are its manifest's, which were compared with the files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        known = {folder / name: record.sha256 for name, record in manifest.files.items()}
        self._digests: dict[Path, str] = {path: digest for path, digest in known.items() if digest is not None}

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """SHA-256 by path."""
        wanted = list(paths)
        self._digests |= sha256_files(path for path in wanted if path not in self._digests)
        return {path: self._digests[path] for path in wanted}

    def refer(self, model: ir.Model, graph: Path) -> None:
        """Let references to external data name what their files hold, in place, to be compared as references."""
        files = self.of(external_files(graph))
        for part in model.graphs():
            for value in part.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = CheckedWeight.of(
                        tensor, files.get(graph.parent / str(tensor.location), str(tensor.location))
                    )


def check_external_data(contents: Contents, original: Path, guarded: Path) -> list[Check]:
    """The files that a guarded graph keeps its weights in are the source's; the guard's own is another matter."""
    before = set(contents.of(external_files(original)).values())
    own = guarded.with_name(f"{guarded.name}{GUARD_DATA}")
    after = {path: digest for path, digest in contents.of(external_files(guarded)).items() if path != own}
    wrong = [
        path.name for path, digest in after.items() if digest not in before and not _is_guards(path, after, before)
    ]
    wrong += ["a file of the source is missing"] if before - set(after.values()) else []
    return [exact("external weights are the source's files", len(before), sorted(wrong))] if before or after else []


def _is_guards(path: Path, files: dict[Path, str], before: set[str]) -> bool:
    """Whether a file that the source lacks is the guard's own under the name of another layout: one more than there were."""
    return len(files) == len(before) + 1 and sum(digest not in before for digest in files.values()) == 1


def check_around(
    folder: Path, manifest: Manifest, package: ModelPackage, original: ModelPackage, contents: Contents
) -> list[Check]:
    """Compare graphs and files beside the decoder with the source: they prepare the decoder's inputs.

    Args:
        folder: its files match the manifest.
        manifest: of the folder.
        package: the opened folder.
        original: the unguarded model.
        contents: digests of files.
    """
    decoders = {record.path for record in manifest.decoders}
    graphs = [name for name in manifest.files if name not in decoders and is_graph(folder / name)]
    data = {_relative(folder, path) for name in (*graphs, *decoders) for path in external_files(folder / name)}
    known = dict(_source_files(original))
    here = _places(package, original)
    restored = restored_graphs(manifest, package)
    wrong, compared = [], 0
    for name in graphs:
        source = here.get(name, known.get(name))
        compared += 1
        if source is None:
            wrong.append(f"{name} is not in the source")
        elif not _same_graph(folder / name, source, contents, restored.get(name)):
            wrong.append(f"{name} is not the source's")
    record = manifest.packaged
    packaged = regenerated(package, original, record.written) if record is not None else {}
    directions = {
        DIRECTIONS_FILE,
        *(record.directions for record in manifest.decoders if record.directions is not None),
    }
    ours = {SBOM_NAME, *directions, *decoders, *graphs, *data}
    if package.layout == "triton":
        ours |= set(manifest.packaged.written) if manifest.packaged is not None else set()  # compared byte for byte
    digests = contents.of(
        [known[name] for name in manifest.files if name in known] + [folder / n for n in manifest.files]
    )
    for name in sorted(manifest.files.keys() - ours):
        compared += 1
        if name in packaged:
            same = (folder / name).read_bytes() == packaged[name]
        elif name in known:
            same = digests[folder / name] == digests[known[name]]
        else:
            wrong.append(f"{name} is not in the source")
            continue
        if not same:
            wrong.append(name)
    wrong += [f"{name} is missing" for name in _missing(manifest, package, original, known)]
    return [exact("files around the decoder are the source's", compared, wrong)] if compared or wrong else []


def _source_files(original: ModelPackage) -> list[tuple[str, Path]]:
    return [(relative, path) for path, relative in original.files()]


def _places(package: ModelPackage, original: ModelPackage) -> dict[str, Path]:
    """Path here -> the source's graph, of the parts that a layout may give another place."""
    pairs = ((package.vision_encoder, original.vision_encoder), (package.embed_tokens, original.embed_tokens))
    found = {_relative(package.root, here): there for here, there in pairs if here is not None and there is not None}
    return found if package.layout != original.layout else {}


def _same_graph(here: Path, there: Path, contents: Contents, restore: Callable[[ir.Model], None] | None) -> bool:
    """Whether a graph is the source's, after `restore` undid what its layout changes in it."""
    files = [*external_files(here), *external_files(there)]
    if not files and restore is None:
        digests = contents.of([here, there])
        return digests[here] == digests[there]
    models = [load_graph(here, trust_links=True), load_graph(there, trust_links=True)]
    if restore is not None:
        restore(models[0])
    for model, path in zip(models, (here, there), strict=True):
        prepare(model)
        contents.refer(model, path)
    same_files = set(contents.of(external_files(here)).values()) == set(contents.of(external_files(there)).values())
    return same_files and same_graph("", models[1], models[0]).ok


def _missing(manifest: Manifest, package: ModelPackage, original: ModelPackage, known: dict[str, Path]) -> list[str]:
    """Files of the source that a runtime reads and the folder lacks. Notes and prompts added to the source are ignored."""
    packaged = manifest.packaged is not None
    graphs = {name for name, path in known.items() if is_graph(path)}
    data = {path for name in graphs for path in external_files(known[name])}
    moved = set(_places(package, original).values())
    gone = []
    for name, path in known.items():
        if name in manifest.files or path in data or path in moved or not is_read(path, name):
            continue
        if packaged and (is_left_out(package.layout, name) or name in graphs):
            continue  # a layout has its own parts; those that it has were compared
        gone.append(name)
    return sorted(gone)


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
