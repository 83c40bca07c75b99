"""The bundled tiny VLM, guarded in each mode from one calibration."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import cast, get_args

import vlmguard
from vlmguard.exporter.proof.recorded_plan import plan_again
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.modes import Mode, guard_mode
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.spec import GuardSpec

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny_vlm"
SOURCE, CHECKPOINT, PROMPTS = EXAMPLE / "onnx-community", EXAMPLE / "checkpoint", EXAMPLE / "prompts"
CALIBRATION = [PROMPTS / "calibration.jsonl", PROMPTS / "calibration-typographic.jsonl"]
MODES = cast(tuple[Mode, ...], get_args(Mode))
# What a calibration comes from.
MODEL_AND_CODE = ("graphs", "runtime", "exporter", "apps", "plugins", "examples/tiny_vlm")


def calibrated_directions(folder: Path) -> Path:
    """A directions file calibrated for `combined`, which has what every mode needs; made once per state of the sources."""
    found = folder / f"{digest_of(*MODEL_AND_CODE)}.safetensors"
    if not found.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print("calibrating ...", file=sys.stderr, flush=True)
        made = vlmguard.export(SOURCE, folder / "combined", spec=GuardSpec(mode="combined"), calibration=CALIBRATION)
        (made.out / "directions.safetensors").replace(found)
        shutil.rmtree(made.out)
    return found


def spec_of(mode: Mode, directions: Path) -> GuardSpec:
    """A mode, with the thresholds of directions that were calibrated for `combined`."""
    calibrated = read_directions(directions)
    layers = calibrated.recommended_layers
    assert layers is not None and len(layers) == 1, layers  # one threshold serves one layer
    layer = calibrated.layers[layers[0]]
    # `supervise` and `steer` compare what `combined` has its second threshold for: the SSD's first coordinate.
    tau = {"supervise": layer.text_threshold, "steer": layer.text_threshold, "restore": layer.threshold}.get(mode)
    return GuardSpec(mode=mode, layers=layers, tau=tau, alpha=1.0 if guard_mode(mode).has_alpha else None)


def plan_of(guarded: Path, source: Path) -> GuardPlan:
    """The numbers of a guarded folder's guard, planned again on the unguarded model."""
    manifest, graph = read_manifest(guarded), open_package(source).load_decoder()
    return plan_again(guarded, manifest, manifest.decoders[0], graph, dissect(graph))


def digest_of(*parts: str) -> str:
    """Of folders and files of the repository, by their names and contents."""
    found = [path for part in parts for path in ROOT.glob(part)]
    files = {path for one in found for path in (one.rglob("*") if one.is_dir() else [one]) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            digest.update(
                f"{path.relative_to(ROOT).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest()
            )
    return digest.hexdigest()[:16]
