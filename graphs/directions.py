"""Safety steering directions on disk: one safetensors file, schema `vlmguard.directions/1`.

Tensors (float32, `d` = the decoder's width, `m` = the rank, 1..64), per layer `l` (0-based):

    layers.{l}.ssd        [m, d]  orthonormal rows, + means harmful
    layers.{l}.origin     [m]     optional: where the coordinates start
    layers.{l}.target     [m]     optional: the level of harmful text
    layers.{l}.readout    [d]     optional: what the gate of `restore` reads
    layers.{l}.threshold  [1]     optional: the gate opens above it
    layers.{l}.text_threshold [1] optional: so does that of `combined`, in the text-only query's coordinate

Metadata (strings, as safetensors has them): `schema`, `width`, `layers` (comma-separated); optionally `model_sha256`
(the decoder that they were extracted from), `pairs`, `anchors` (JSON: which), `estimator`, `evidence` (JSON, per layer),
`mode`, `recommended_layers`, `alpha`. Everything is checked here, once, before first use.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from .errors import DirectionMismatch, first_line
from .modes import MODES
from .places import DIRECTIONS, require_file
from .spec import LARGEST_TAU, MAX_RANK
from .strict_json import from_strict_json, to_strict_json

SCHEMA = "vlmguard.directions/1"
DIRECTIONS_FILE = "directions.safetensors"  # in a guarded folder, and beside a model with its own directions
ORTHONORMAL_WITHIN = 1e-4
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(ssd|origin|target|readout|threshold|text_threshold)")
_THRESHOLDS = frozenset({"threshold", "text_threshold"})
_LARGEST_FILE = 4 << 30  # bytes; 8 rows x 16384 x 256 layers is 0.13 GB, so anything near this is not directions


@dataclass(frozen=True)
class LayerDirections:
    """The file's data of one layer; arrays as in the module's docstring."""

    ssd: np.ndarray
    origin: np.ndarray | None = None
    target: np.ndarray | None = None
    readout: np.ndarray | None = None
    threshold: float | None = None
    text_threshold: float | None = None

    def __repr__(self) -> str:
        rank, width = self.ssd.shape
        return f"LayerDirections(rank {rank}, width {width}{', calibrated' if self.calibrated else ''})"

    @property
    def calibrated(self) -> bool:
        """Whether `restore` can run on it as it is."""
        return self.target is not None and self.readout is not None and self.threshold is not None


@dataclass(frozen=True)
class Directions:
    """The SSD of each layer, with its evidence.

    Attributes:
        width: `d`.
        layers: 0-based layer number to its directions, ascending.
        model_sha256: digest of the decoder file that they were extracted from, if recorded.
        pairs: how many anchor pairs they come from, if recorded.
        anchors: which: `{"source": their name, "fingerprints": one per distinct prompt}`, if recorded.
        evidence: per layer (as a string): mean, standard deviation and AUC of the anchors along row 1, and more.
        mode: the mode that thresholds and targets were calibrated for, if any.
        recommended_layers: the layers that calibration chose, if any.
        alpha: the strength that calibration chose, if any.
        estimator: what row 1 of each SSD was estimated with, if recorded.
    """

    width: int
    layers: dict[int, LayerDirections]
    model_sha256: str | None = None
    pairs: int | None = None
    anchors: dict[str, Any] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    recommended_layers: tuple[int, ...] | None = None
    alpha: float | None = None
    estimator: str | None = None

    def __post_init__(self) -> None:
        _validate(self, "directions")

    def __repr__(self) -> str:
        ranks = sorted({layer.ssd.shape[0] for layer in self.layers.values()})
        mode = f", calibrated for {self.mode}" if self.mode is not None else ""
        return (
            f"Directions(layers {', '.join(map(str, self.layers))}; width {self.width}, rank "
            f"{' or '.join(map(str, ranks))}{mode})"
        )

    @classmethod
    def from_arrays(
        cls,
        layers: Mapping[int, Any],
        *,
        mode: str | None = None,
        recommended_layers: Iterable[int] | None = None,
        alpha: float | None = None,
        pairs: int | None = None,
        evidence: Mapping[str, Any] | None = None,
        model_sha256: str | None = None,
    ) -> Directions:
        """Create directions from arrays; `save` writes them (docs/directions.md).

        Args:
            layers: layer number, from 0, to its direction: an array `[d]`, which is scaled to length 1, or `[m, d]` with
                orthonormal rows, or a mapping with the key `ssd` (such an array) and, if calibrated, `origin`, `target`,
                `readout`, `threshold`, `text_threshold`. Along the rows, + means harmful.
            mode: the mode of the thresholds and targets.
            recommended_layers: default layers to guard.
            alpha: strength of `steer` and `supervise`.
            pairs: number of anchor pairs behind the arrays.
            evidence: measurements per layer, with the layer number as text; kept, and shown by the report.
            model_sha256: digest of the decoder file; other files are then rejected.

        Raises:
            DirectionMismatch: a key is missing or unknown, or an array has the wrong shape or values.
        """
        if not isinstance(layers, Mapping) or not layers:
            raise DirectionMismatch("layers is no mapping with a layer in it; give {layer number: array, ...}")
        directions = {}
        for number in sorted(layers, key=str):
            if isinstance(number, bool) or not hasattr(number, "__index__") or int(number) < 0:
                raise DirectionMismatch(f"layer {number!r} is no layer number; give whole numbers from 0")
            directions[int(number)] = _layer_of_arrays(int(number), layers[number])
        directions = dict(sorted(directions.items()))
        return cls(
            width=next(iter(directions.values())).ssd.shape[1],
            layers=directions,
            model_sha256=model_sha256,
            pairs=pairs,
            evidence=dict(evidence or {}),
            mode=mode,
            recommended_layers=tuple(sorted(recommended_layers)) if recommended_layers is not None else None,
            alpha=alpha,
        )

    def save(self, path: Path | str, force: bool = False) -> Path:
        """Write the file; its absolute path.

        Args:
            path: the file to write, by custom `directions.safetensors`.
            force: replace a file that exists.

        Raises:
            OutputRefused: it exists, or cannot be written.
        """
        from .staging import require_writable_file, write_file

        path = Path(path).absolute()
        require_writable_file(path, force)
        write_file(path, directions_bytes(self))
        return path

    @property
    def calibrated_layers(self) -> tuple[int, ...]:
        return tuple(number for number, layer in self.layers.items() if layer.calibrated)


def read_directions(path: Path | str) -> Directions:
    """Read and validate a directions file.

    Raises:
        DirectionMismatch: unreadable, of another schema, or any number in it is not what the schema promises.
    """
    path = Path(path)
    tensors, metadata = _read_file(path)
    for key, value in (("schema", SCHEMA), ("width", "the decoder's hidden size"), ("layers", "numbers such as '3,4'")):
        if key not in metadata:
            raise DirectionMismatch(f"{path}: metadata has no key {key!r}; write {value} there (docs/directions.md)")
    if metadata["schema"] != SCHEMA:
        raise DirectionMismatch(
            f"{path}: schema is {metadata['schema']!r}, this version reads {SCHEMA!r}; extract them again"
        )
    if not tensors:
        raise DirectionMismatch(f"{path}: holds no tensors; extract the directions again")
    grouped: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise DirectionMismatch(f"{path}: tensor {name!r} is not part of schema {SCHEMA}; remove it")
        if tensor.dtype != np.float32:
            raise DirectionMismatch(f"{path}: {name} is {tensor.dtype}, expected float32")
        grouped.setdefault(int(match[1]), {})[match[2]] = tensor
    layers = {number: _layer(path, number, grouped[number]) for number in sorted(grouped)}
    listed = _numbers(path, metadata, "layers")
    if listed != tuple(layers):
        raise DirectionMismatch(f"{path}: metadata lists layers {listed}, the tensors are for layers {tuple(layers)}")
    recommended = _numbers(path, metadata, "recommended_layers") if "recommended_layers" in metadata else None
    try:
        directions = Directions(
            width=int(metadata.get("width", "")),
            layers=layers,
            model_sha256=metadata.get("model_sha256"),
            pairs=int(metadata["pairs"]) if "pairs" in metadata else None,
            anchors=from_strict_json(metadata["anchors"]) if "anchors" in metadata else None,
            evidence=from_strict_json(metadata.get("evidence", "{}")),
            mode=metadata.get("mode"),
            recommended_layers=recommended,
            alpha=float(metadata["alpha"]) if "alpha" in metadata else None,
            estimator=metadata.get("estimator"),
        )
    except (ValueError, RecursionError) as error:
        raise DirectionMismatch(f"{path}: metadata cannot be read ({error}); extract the directions again") from None
    except DirectionMismatch as error:
        raise DirectionMismatch(f"{path}: {error}") from None
    return directions


def directions_bytes(directions: Directions) -> bytes:
    """The file's content; the same directions give the same bytes."""
    tensors: dict[str, np.ndarray] = {}
    for number, layer in directions.layers.items():
        parts = {
            "ssd": layer.ssd,
            "origin": layer.origin,
            "target": layer.target,
            "readout": layer.readout,
            **{
                name: None if (value := getattr(layer, name)) is None else np.array([value])
                for name in sorted(_THRESHOLDS)
            },
        }
        for part, value in parts.items():
            if value is not None:
                tensors[f"layers.{number}.{part}"] = np.ascontiguousarray(value, dtype=np.float32)
    metadata = {
        "schema": SCHEMA,
        "width": str(directions.width),
        "layers": ",".join(map(str, directions.layers)),
        "evidence": to_strict_json(directions.evidence, sort_keys=True),
    }
    optional = {
        "model_sha256": directions.model_sha256,
        "pairs": directions.pairs,
        "anchors": directions.anchors and to_strict_json(directions.anchors, sort_keys=True),
        "mode": directions.mode,
        "alpha": directions.alpha,
        "estimator": directions.estimator,
        "recommended_layers": directions.recommended_layers and ",".join(map(str, directions.recommended_layers)),
    }
    metadata |= {key: str(value) for key, value in optional.items() if value is not None}
    return _sorted_header(safetensors_bytes(tensors, metadata))


def _sorted_header(content: bytes) -> bytes:
    """The same file with its JSON header sorted: safetensors keeps metadata in a hash map, in another order each run."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header = {"__metadata__": header.pop("__metadata__"), **header}
    text = json.dumps(header | {"__metadata__": dict(sorted(header["__metadata__"].items()))}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    require_file(path, DIRECTIONS, DirectionMismatch)
    if path.stat().st_size > _LARGEST_FILE:
        raise DirectionMismatch(f"{path}: {path.stat().st_size} bytes is too large for directions; is it a checkpoint?")
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DirectionMismatch(
            f"{path}: is not a safetensors file ({first_line(error)}); extract the directions again"
        ) from None


def _numbers(path: Path, metadata: dict[str, str], key: str) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(number) for number in metadata[key].split(",")))
    except (KeyError, ValueError):
        found = metadata.get(key, "nothing")
        raise DirectionMismatch(f"{path}: metadata {key!r} is {found!r}, expected numbers such as '3,4'") from None


def _layer(path: Path, number: int, parts: dict[str, Any]) -> LayerDirections:
    if "ssd" not in parts:
        others = ", ".join(f"layers.{number}.{name}" for name in sorted(parts))
        raise DirectionMismatch(
            f"{path}: has no tensor 'layers.{number}.ssd', only {others}; add it (docs/directions.md)"
        )
    for name in _THRESHOLDS & parts.keys():
        if parts[name].shape != (1,):
            raise DirectionMismatch(f"{path}: layers.{number}.{name} has shape {parts[name].shape}, expected (1,)")
        parts[name] = float(parts[name][0])
    return LayerDirections(**parts)


def _layer_of_arrays(number: int, given: Any) -> LayerDirections:
    """One layer of `Directions.from_arrays`."""
    parts = dict(given) if isinstance(given, Mapping) else {"ssd": given}
    known = [field.name for field in fields(LayerDirections)]
    for name in parts:
        if name not in known:
            raise DirectionMismatch(f"layer {number} has a key {name!r}; the keys are {', '.join(known)}")
    if "ssd" not in parts:
        raise DirectionMismatch(
            f"layer {number} has no key 'ssd', only {', '.join(parts) or 'none'}; add the direction"
        )
    try:
        arrays = {
            name: float(np.asarray(value).reshape(())) if name in _THRESHOLDS else np.array(value, np.float32)
            for name, value in parts.items()
            if value is not None
        }
    except (TypeError, ValueError) as error:
        raise DirectionMismatch(
            f"layer {number} holds something that is no array of numbers ({first_line(error)})"
        ) from None
    ssd = arrays["ssd"]
    if isinstance(ssd, np.ndarray) and ssd.ndim == 1:
        length = float(np.linalg.norm(ssd))
        if not 0 < length < math.inf:
            raise DirectionMismatch(f"layers.{number}.ssd is all zeros, or holds NaN or infinity; give a direction")
        arrays["ssd"] = (ssd / length)[None]
    return LayerDirections(**arrays)  # pyright: ignore[reportArgumentType]


def _validate(directions: Directions, what: str) -> None:
    """Each promise of the schema, once: layer numbers, shapes, finite numbers, orthonormal rows, known mode."""
    if not directions.layers:
        raise DirectionMismatch(f"{what} hold no layers; extract them again")
    if directions.width < 1:
        raise DirectionMismatch(f"{what} have width {directions.width}; expected the decoder's hidden size")
    for number, layer in directions.layers.items():
        _validate_layer(number, layer, directions.width)
    if directions.mode is not None and directions.mode not in MODES:
        raise DirectionMismatch(f"mode {directions.mode!r} is unknown; expected one of {', '.join(MODES)}")
    unknown = set(directions.recommended_layers or ()) - set(directions.layers)
    if unknown:
        raise DirectionMismatch(f"layers {sorted(unknown)} are recommended but have no ssd")
    if len(set(directions.recommended_layers or ())) < len(directions.recommended_layers or ()):
        raise DirectionMismatch(
            f"layers {directions.recommended_layers} are recommended, one of them twice; name it once"
        )
    if directions.alpha is not None and not (math.isfinite(directions.alpha) and directions.alpha >= 0):
        raise DirectionMismatch(f"alpha {directions.alpha} is not a strength; expected 0 or more")
    if not _names_anchors(directions.anchors):
        raise DirectionMismatch("the record of the anchors cannot be read; extract the directions again")
    if not isinstance(directions.evidence, dict):
        raise DirectionMismatch("evidence is not a table per layer; extract the directions again")


def _names_anchors(record: Any) -> bool:
    if record is None:
        return True
    if not isinstance(record, dict) or record.keys() != {"source", "fingerprints"}:
        return False
    prints = record["fingerprints"]
    return isinstance(record["source"], str) and isinstance(prints, list) and all(isinstance(p, str) for p in prints)


def _validate_layer(number: int, layer: LayerDirections, width: int) -> None:
    if layer.ssd.ndim != 2 or not 1 <= layer.ssd.shape[0] <= MAX_RANK or layer.ssd.shape[1] != width:
        raise DirectionMismatch(
            f"layers.{number}.ssd has shape {layer.ssd.shape}, expected 1 to {MAX_RANK} rows of width {width}"
        )
    rank = layer.ssd.shape[0]
    expected = {"origin": (rank,), "target": (rank,), "readout": (width,)}
    arrays = {"ssd": layer.ssd} | {name: getattr(layer, name) for name in expected if getattr(layer, name) is not None}
    for name, array in arrays.items():
        if name in expected and array.shape != expected[name]:
            raise DirectionMismatch(f"layers.{number}.{name} has shape {array.shape}, expected {expected[name]}")
        if not np.isfinite(array).all():
            raise DirectionMismatch(f"layers.{number}.{name} holds NaN or infinity; extract the directions again")
    for name in sorted(_THRESHOLDS):
        value = getattr(layer, name)
        if value is not None and not abs(value) <= LARGEST_TAU:  # not NaN either
            raise DirectionMismatch(f"layers.{number}.{name} is {value}; calibrate again")
    if layer.readout is not None and not layer.readout.any():
        raise DirectionMismatch(f"layers.{number}.readout is all zeros, its gate would never move; calibrate again")
    rows = layer.ssd.astype(np.float64)
    worst = float(np.abs(rows @ rows.T - np.eye(rank)).max())
    if worst > ORTHONORMAL_WITHIN:
        raise DirectionMismatch(
            f"layers.{number}.ssd is not orthonormal (off by {worst:.1e}, limit {ORTHONORMAL_WITHIN:.0e}); "
            "extract the directions again"
        )
