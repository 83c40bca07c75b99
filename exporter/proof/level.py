"""The level of a proof, and the reason for it.

| level | what is run | what it shows |
|---|---|---|
| `full` | the decoder, unguarded and guarded | the guarded model computes what it should on real prompts |
| `local` | each guard alone, cut out of the file | every guard computes what it should, at any state |
| `structure` | nothing | every path passes the guards, nothing else changed |

The structure is part of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import onnx_ir as ir

from ...graphs.errors import GuardError
from ...graphs.lowerings.fold import FOLD
from ...graphs.manifest import Proved
from ...graphs.package import ModelPackage
from ..choices import WantedProof
from .memory import free_bytes, needed_bytes


@dataclass(frozen=True)
class ProofLevel:
    """A decision.

    Attributes:
        level: how much is proved.
        why: the reason, a clause for the table and the manifest.
    """

    level: Proved
    why: str


ENGINES_RUN = ProofLevel("full", "the engines ran")
_ORDER: tuple[Proved, ...] = ("structure", "local", "full")


def is_more(level: Proved, than: Proved) -> bool:
    """Whether one level proves more than the other."""
    return _ORDER.index(level) > _ORDER.index(than)


def without_inputs(wanted: WantedProof, reason: str, lowering: str) -> ProofLevel | None:
    """The level for a model that fits but has no inputs; `None` if the requested proof is impossible."""
    return ProofLevel("local", reason) if wanted == "auto" and lowering != FOLD else None


def choose_level(wanted: WantedProof, decoders: Sequence[tuple[ModelPackage, ir.Model]], lowering: str) -> ProofLevel:
    """The requested level; `auto` is `full` if the model fits into the free memory, else `local`.

    Args:
        wanted: the requested level.
        decoders: the model with each of its decoders first, and that decoder's graph. One runs at a time.
        lowering: the planned lowering.

    Raises:
        GuardError: `local` with a lowering without guard nodes, or an unknown level.
    """
    if wanted not in get_args(WantedProof):
        raise GuardError(f"proof {wanted!r} is unknown; choose one of {', '.join(get_args(WantedProof))}")
    if wanted == "local" and lowering == FOLD:
        raise GuardError("a folded guard has no nodes to cut out; choose --proof full or structure")
    if wanted != "auto":
        return ProofLevel(wanted, "as requested")
    needed, free = max(needed_bytes(package, graph) for package, graph in decoders), free_bytes()
    if free is None:
        return ProofLevel("full", "how much memory is free is not known here")
    if needed <= free:
        return ProofLevel("full", "the memory that is free is enough to run the model")
    why = f"running the model takes about {needed / 1e9:.1f} GB of memory, and less is free"  # how much is no model's fact
    if lowering == FOLD:
        return ProofLevel("structure", f"{why}; a folded guard has no nodes to cut out")
    return ProofLevel("local", why)
