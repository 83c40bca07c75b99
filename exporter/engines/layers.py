"""Reads the builder's result: the engine's layers, and the ONNX nodes of each.

Without a GPU an engine cannot be opened and inspected, but the builder logs its layers while it builds
(`profiling_verbosity = DETAILED`). `tensorrt_rtx` 1.7.1 prints one line per layer:

    Name: ..., LayerType: kgen, Inputs: [...], ..., Metadata: [ONNX Layer: l0_sum1][ONNX Layer: vlmguard/layer_0/guarded]

With a GPU the engine's inspector returns the same as JSON. Each optimisation profile has its own layers: those of the
second are marked `[profile 1]`, or are in one compiled subgraph (`..._myl3_7`) with a marked layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...graphs.errors import GuardIncomplete
from ...graphs.node_builder import PREFIX

# Layers that compute sizes on the host and launch nothing.
_BOOKKEEPING = frozenset({"shape_call", "reshape", "cast", "signal", "wait", "NoOp"})
_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+),")
_PROFILE = re.compile(r"\[profile ([0-9]{1,9})\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_GUARD_LAYER = re.compile(re.escape(PREFIX) + r"(?:[^/]+/)?layer_([0-9]{1,9})/")


@dataclass(frozen=True)
class EngineLayer:
    """One layer: its name, its kind in the builder's words, the ONNX nodes that were fused into it, and its profile."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    profile: int = 0

    @property
    def works(self) -> bool:
        """Whether it runs on the device."""
        return self.kind not in _BOOKKEEPING


@dataclass(frozen=True)
class EngineLayers:
    """All layers of an engine."""

    layers: tuple[EngineLayer, ...]

    @property
    def profiles(self) -> tuple[int, ...]:
        return tuple(sorted({layer.profile for layer in self.layers}))

    def of_profile(self, profile: int) -> EngineLayers:
        return EngineLayers(tuple(layer for layer in self.layers if layer.profile == profile))

    @property
    def kernels(self) -> int:
        """Layers that run on the device."""
        return sum(layer.works for layer in self.layers)

    @property
    def nodes(self) -> frozenset[str]:
        """Every ONNX node that is in some layer."""
        return frozenset(node for layer in self.layers for node in layer.nodes)

    def guard_nodes(self) -> dict[int, frozenset[str]]:
        """The guard's nodes that are in the engine, by the decoder layer that they guard."""
        found: dict[int, set[str]] = {}
        for node in self.nodes:
            if (match := _GUARD_LAYER.match(node)) is not None:
                found.setdefault(int(match[1]), set()).add(node)
        return {layer: frozenset(found[layer]) for layer in sorted(found)}

    def kinds(self) -> dict[str, int]:
        return dict(sorted(Counter(layer.kind for layer in self.layers).items()))

    def to_json(self) -> dict[str, Any]:
        """A summary for the manifest: per profile how many layers, and how many nodes of the guard by decoder layer."""
        return {"kinds": self.kinds(), "profiles": [self.of_profile(profile)._summary() for profile in self.profiles]}

    def _summary(self) -> dict[str, Any]:
        return {
            "layers": len(self.layers),
            "kernels": self.kernels,
            "guard_nodes": {str(layer): len(nodes) for layer, nodes in self.guard_nodes().items()},
            "layers_with_guard": sum(any(node.startswith(PREFIX) for node in layer.nodes) for layer in self.layers),
        }


def layers_from_log(texts: Iterable[str]) -> EngineLayers:
    """The layers that the builder printed, one line each."""
    return _layers(
        (match["name"], match["kind"].strip(), line)
        for text in texts
        for line in text.splitlines()
        if (match := _LINE.match(line)) is not None
    )


def layers_from_inspector(text: str) -> EngineLayers:
    """The layers as `IEngineInspector.get_engine_information(JSON)` gives them."""
    content = json.loads(text)
    layers = content.get("Layers", []) if isinstance(content, dict) else []
    return _layers(
        (str(one.get("Name", "")), str(one.get("LayerType", "")), json.dumps(one))
        for one in layers
        if isinstance(one, dict)
    )


def _layers(found: Iterable[tuple[str, str, str]]) -> EngineLayers:
    """Layers of `(name, kind, further text)`."""
    rows = list(found)
    of_subgraph: dict[str, int] = {}
    for name, _, said in rows:
        if (subgraph := _SUBGRAPH.search(name)) is not None and (profile := _PROFILE.search(said)) is not None:
            of_subgraph[subgraph[1]] = int(profile[1])
    layers = []
    for name, kind, said in rows:
        subgraph, own = _SUBGRAPH.search(name), _PROFILE.search(said)
        profile = int(own[1]) if own is not None else of_subgraph.get(subgraph[1], 0) if subgraph is not None else 0
        layers.append(EngineLayer(name, kind, tuple(_NODE.findall(said)), profile))
    return EngineLayers(tuple(layers))


def require_guard(layers: EngineLayers, nodes: Sequence[str], profiles: int, where: str) -> None:
    """Require every node of the guard in every profile of the engine; if the builder dropped a node, the guard is incomplete.

    Args:
        layers: the engine's layers.
        nodes: the guard's nodes in the graph.
        profiles: number of profiles of the engine.
        where: the file, for messages.

    Raises:
        GuardIncomplete: one is missing, or the builder showed no layers at all.
    """
    if not layers.layers:
        raise GuardIncomplete(f"{where}: the builder showed no layers, so nothing shows the guard; nothing was written")
    if not nodes:
        raise GuardIncomplete(
            f"{where}: the graph has no guard nodes for an engine to show; export with --lowering rank1"
        )
    for profile in range(profiles):
        shown = layers.of_profile(profile).nodes
        missing = [node for node in nodes if node not in shown]
        if missing:
            raise GuardIncomplete(
                f"{where}: {len(missing)} of {len(nodes)} guard nodes are not in the engine's profile {profile}, the first is "
                f"{missing[0]!r}; nothing was written"
            )
