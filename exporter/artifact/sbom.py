"""The bill of materials of a guarded folder: every file with its SHA-256, the graphs that it was made from, who made it.

CycloneDX 1.6, JSON, by the library of the CycloneDX project. The same folder gives the same bytes: the serial number is made
of the digests.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ...graphs.clock import Stamp
from ...graphs.errors import ExtraMissing
from ...graphs.extras import install_command

_NAMESPACE = uuid.UUID("8f3c7f0e-5d0b-5c55-9c1e-2502104865aa")  # ours, for serial numbers


def bill_of_materials(
    name: str, files: Mapping[str, str | None], sources: Mapping[str, str], versions: Mapping[str, str], stamp: Stamp
) -> bytes:
    """The content of `sbom.cdx.json`.

    Args:
        name: of the model.
        files: path relative to the folder -> SHA-256, or `None` where it was not hashed.
        sources: name of each unguarded graph -> SHA-256.
        versions: of what wrote the folder.
        stamp: when.

    Raises:
        ExtraMissing: cyclonedx-python-lib is not installed.
    """
    model_of, bom_of, component_of, output = _library()
    kinds = component_of.ComponentType

    def component(path: str, digest: str | None, of: str) -> Any:
        hashes = [model_of.HashType(alg=model_of.HashAlgorithm.SHA_256, content=digest)] if digest is not None else []
        return component_of.Component(name=path, type=kinds.FILE, hashes=hashes, bom_ref=f"{of}:{path}")

    ancestors = [component(path, digest, "source") for path, digest in sorted(sources.items())]
    model = component_of.Component(
        name=name,
        type=kinds.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        properties=[model_of.Property(name="vlmguard:guarded", value="true")],
        pedigree=component_of.Pedigree(ancestors=ancestors),
    )
    tools = [
        component_of.Component(name=tool, version=version, type=kinds.LIBRARY, bom_ref=f"tool:{tool}")
        for tool, version in sorted(versions.items())
    ]
    identity = json.dumps([name, sorted(files.items()), sorted(sources.items()), sorted(versions.items())])
    bom = bom_of.Bom(
        components=[component(path, digest, "file") for path, digest in sorted(files.items())],
        metadata=bom_of.BomMetaData(component=model, timestamp=stamp.created),
        serial_number=uuid.uuid5(_NAMESPACE, identity),
    )
    bom.metadata.tools.components.update(tools)
    bom.register_dependency(model, bom.components)
    return (output.JsonV1Dot6(bom).output_as_string(indent=2) + "\n").encode()


def _library() -> list[Any]:
    """Its modules, untyped: type checkers do not see through the decorators of its classes."""
    try:
        return [import_module(f"cyclonedx.{name}") for name in ("model", "model.bom", "model.component", "output.json")]
    except ImportError:
        raise ExtraMissing(f"a bill of materials needs cyclonedx-python-lib; run: {install_command('sbom')}") from None
