"""`ExportOptions`: all options of an export besides the model and the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from ..graphs.modes import Positions
from ..graphs.new_files import Data
from ..graphs.spec import Decided, GuardSpec, Supervisor, Target
from .calibration.calibrate import DEFAULT_BUDGET
from .choices import ExporterName, Precision, WantedMode, WantedProof
from .extraction.estimators import DEFAULT_ESTIMATOR
from .prompts.labelled import Sources
from .requests import Layers, spec_of


@dataclass(frozen=True)
class ExportOptions:
    """How a model is guarded, proved and written. The command line, the Python API and the plugins all build one.

    Attributes:
        spec: the guard; `None` takes the mode of the directions, or chooses one by the model's answers.
        config: a `guard.toml` in place of `spec`, `directions`, `anchors` and `calibration`; it contains the layers' numbers.
        directions: a directions file; without one, the exporter looks beside the model, else extracts from anchor pairs.
        anchors: anchor pairs to extract from (`prompts.Sources`); default: found beside the model, else the built-in ones.
        calibration: labelled prompts to calibrate on; default: found beside the anchors, else held-out anchor pairs.
        calibration_images: pictures to calibrate with besides blank ones and noise.
        calibration_seconds: time limit for trying candidates, once one has been found; `None` tries all.
        estimator: estimator of extracted directions (`estimators.ESTIMATORS`).
        readout: readout of the gate of `restore` (`estimators.READOUTS`); `None` lets the calibration choose.
        budget: largest share of harmless calibration prompts that the guard may make the model refuse, 0 to below 1.
        variant: precision variant of an onnx-community folder; `None` guards all variants.
        dtype: precision of the graphs exported from a checkpoint; an error for a model that is ONNX already.
        opset: ONNX opset of these graphs; likewise.
        exporter: exporter of a checkpoint (`exporters.EXPORTERS`), `None` for transformers; likewise.
        cache: whether a checkpoint's export is read from the user's cache and kept there (`checkpoints.cache`).
        data: how big files get into the folder: `link`, `copy` or `reference` (`graphs.staging.bring`).
        digests: whether big weights are hashed; the manifest records if they were not.
        proof: `full` runs the model. `local` runs each guard by itself, cut out of the file, so the size of the model does not
            matter. `structure` runs nothing, and `GuardedVLM` opens such a folder only after `verify --run`. `auto` is `full`
            if the model fits into the free memory and inputs can be made for it, else `local`.
        proof_inputs: `.npz` files with the decoder's inputs by name, one per call, for decoders that need other inputs than
            tokens; default: prompts, or seeded random tokens.
        dry_run: plan only; write nothing.
        force: replace the output folder, and accept directions extracted from another file.
        allow_no_effect: export a guard that changes nothing on any harmful prompt it is tried on (`calibration.effect`).
        sign: private key (elliptic curve, PEM) to sign the folder with (`signing`).
        sbom: whether to write `sbom.cdx.json` too, a CycloneDX bill of materials.
        reproducible: whether the same input gives the same bytes, the manifest included: its time is that of
            `SOURCE_DATE_EPOCH`, or 1970, and no modification time is kept, so big files are hashed at each opening.
    """

    spec: GuardSpec | None = None
    config: Path | str | None = None
    directions: Path | str | None = None
    anchors: Sources | None = None
    calibration: Sources | None = None
    calibration_images: Sequence[Path | str] = ()
    calibration_seconds: float | None = None
    estimator: str = DEFAULT_ESTIMATOR
    readout: str | None = None
    budget: float = DEFAULT_BUDGET
    variant: str | None = None
    dtype: Precision | None = None
    opset: int | None = None
    exporter: ExporterName | None = None
    cache: bool = True
    data: Data = "link"
    digests: bool = True
    proof: WantedProof = "auto"
    proof_inputs: Sequence[Path | str] = ()
    dry_run: bool = False
    force: bool = False
    allow_no_effect: bool = False
    sign: Path | str | None = None
    sbom: bool = False
    reproducible: bool = False


class ExportSettings(TypedDict, total=False):
    """Attributes of `GuardSpec` and of `ExportOptions` by name, as `export` takes them."""

    mode: WantedMode | None
    layers: Layers | None
    rank: int | None
    alpha: float | None
    tau: float | None
    positions: Positions | None
    lowering: str | None
    direction_of: int | None
    target: Target | None
    knobs: bool | None
    telemetry: bool | None
    gate: Decided | None
    supervisor: Supervisor | None
    spec: GuardSpec | None
    config: Path | str | None
    directions: Path | str | None
    anchors: Sources | None
    calibration: Sources | None
    calibration_images: Sequence[Path | str]
    calibration_seconds: float | None
    estimator: str
    readout: str | None
    budget: float
    variant: str | None
    dtype: Precision | None
    opset: int | None
    exporter: ExporterName | None
    cache: bool
    data: Data
    digests: bool
    proof: WantedProof
    proof_inputs: Sequence[Path | str]
    dry_run: bool
    force: bool
    allow_no_effect: bool
    sign: Path | str | None
    sbom: bool
    reproducible: bool


_OF_GUARD = frozenset(field.name for field in fields(GuardSpec))
_OF_EXPORT = frozenset(field.name for field in fields(ExportOptions))


def options_of(options: ExportOptions | None, settings: Mapping[str, Any]) -> ExportOptions:
    """The options with some settings replaced.

    Args:
        options: to begin with; `None` for the defaults.
        settings: attributes of `ExportOptions`, or of `GuardSpec` in place of a whole `spec`.

    Raises:
        TypeError: a setting of neither, with the nearest name.
        GuardError: a setting of the guard is of the wrong type or out of range, or was given beside a `spec`.
    """
    for name in settings.keys() - _OF_GUARD - _OF_EXPORT:
        near = get_close_matches(name, [*_OF_GUARD, *_OF_EXPORT], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "help(vlmguard.ExportOptions) lists them"
        raise TypeError(f"export() has no setting {name!r}; {hint}")
    options = replace(options or ExportOptions(), **{n: v for n, v in settings.items() if n in _OF_EXPORT})
    guard = {name: value for name, value in settings.items() if name in _OF_GUARD}
    return replace(options, spec=spec_of(options.spec, guard.pop("layers", None), **guard))
