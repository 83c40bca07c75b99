"""A pass for Olive (`olive-ai`): `"type": "VLMGuard"` in a workflow, between its other passes.

    python -m vlmguard.plugins.olive > passes.json
    olive run --config workflow.json --package-config passes.json

Olive reads its passes from one JSON file: its own `olive_config.json`, or the file named by `--package-config`. The first
command writes a copy of Olive's file with a row for this pass. Only Olive imports this module.

Olive logs most exceptions, reports that there is no output model and exits with code 0. It raises only the types in
`olive.exception.EXCEPTIONS_TO_RAISE`, so a `GuardError` is raised again as one of those.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from olive.model import CompositeModelHandler, ONNXModelHandler  # pyright: ignore[reportMissingImports]
from olive.package_config import OlivePackageConfig  # pyright: ignore[reportMissingImports]
from olive.passes import Pass  # pyright: ignore[reportMissingImports]
from olive.passes.pass_config import ParamCategory, PassConfigParam  # pyright: ignore[reportMissingImports]

from .. import __version__
from ..exporter.calibration.guard_config import read_config
from ..exporter.options import ExportOptions
from ..exporter.pipeline import export
from ..exporter.prompts.labelled import listed
from ..graphs.digests import sha256_file
from ..graphs.errors import GuardError
from ..graphs.manifest import MANIFEST_NAME
from ..graphs.spec import GuardSpec, parse_layers

_log = logging.getLogger("olive.passes.vlmguard")  # below Olive's own, so that its log level holds

# Options of `export` besides the spec. `proof` is not among them: this pass always runs the guard.
_EXPORT_OPTIONS = (
    "config",
    "directions",
    "anchors",
    "calibration",
    "calibration_images",
    "calibration_seconds",
    "estimator",
    "readout",
    "budget",
    "data",
    "digests",
    "proof_inputs",
    "force",
    "allow_no_effect",
    "sign",
    "sbom",
    "reproducible",
)
_READ = (
    "config",
    "directions",
    "anchors",
    "calibration",
    "calibration_images",
    "proof_inputs",
)  # those that name files whose content counts
_CONTENT = "content"


class GuardRefused(ValueError):
    """A `GuardError` as Olive raises it; nothing was written."""


class VLMGuard(Pass):
    """Bake VLM-Guard's safety steering into a decoder, and prove that it is there; else the workflow fails.

    Takes an ONNXModel (a bare graph, or one in a folder of onnxruntime-genai) or a CompositeModel whose folder is a model
    folder, and gives the guarded folder as `vlmguard-export` writes it, `guard.json` included.
    """

    _accepts_composite_model = True  # an onnx-community folder is guarded as a whole

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            **_wish_params(),
            **_export_params(),
            _CONTENT: PassConfigParam(
                type_=str,
                description="Set by the pass: what the files that are named hold, so that Olive's cache sees a change.",
            ),
        }

    @classmethod
    def generate_config(cls, *arguments: Any, **options: Any) -> Any:
        config = super().generate_config(*arguments, **options)
        with _refusing():
            setattr(config, _CONTENT, _content(config))
        return config

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        out = Path(output_model_path).with_suffix("")
        _make_way(out)
        with _refusing():
            export(_folder_or_file(model), out, spec=_spec(config), **_options(config), report_progress=_log_progress)
        return _handler(model, out)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Within, a refusal of ours is one that Olive raises."""
    try:
        yield
    except GuardError as error:
        raise GuardRefused(f"VLMGuard: {error}") from None


# Settings, derived from the fields and docstrings of `GuardSpec` and `ExportOptions`


def _wish_params() -> dict[str, PassConfigParam]:
    hints, described = get_type_hints(GuardSpec), _described(GuardSpec)
    hints["layers"] |= str  # "2-4", as the command line takes it
    return {
        field.name: PassConfigParam(
            type_=hints[field.name], default_value=field.default, description=described[field.name]
        )
        for field in fields(GuardSpec)
    }


def _export_params() -> dict[str, PassConfigParam]:
    hints, described = get_type_hints(ExportOptions), _described(ExportOptions)
    options = {field.name: field for field in fields(ExportOptions)}
    return {
        name: PassConfigParam(
            type_=hints[name],
            default_value=options[name].default,
            description=described[name],
            category=ParamCategory.PATH if hints[name] == Path | str | None else ParamCategory.NONE,
        )
        for name in _EXPORT_OPTIONS
    }


def _described(documented: Any) -> dict[str, str]:
    """Description of each attribute in a docstring; `a, b: text` describes both."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(documented) or "").splitlines():
        if entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def _spec(config: Any) -> GuardSpec | None:
    """The wish; none beside a `guard.toml`, which is one."""
    settings = {field.name: getattr(config, field.name) for field in fields(GuardSpec)}
    if isinstance(settings["layers"], str):
        settings["layers"] = parse_layers(settings["layers"])
    spec = GuardSpec(**settings)
    return None if config.config is not None and spec == GuardSpec() else spec


def _options(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _EXPORT_OPTIONS}


def _content(config: Any) -> str:
    """SHA-256 of the files that are named, and of our version.

    Olive's cache goes by a pass's settings, in which a file is only a name: with other directions under the same name it
    would hand out the old guard.
    """
    named = [str(one) for name in _READ for one in listed(getattr(config, name) or ())]
    if config.config is not None:
        named.append(str(read_config(config.config).directions))
    paths = [Path(name) for name in named] + [Path(name.partition(":")[2]) for name in named]  # FORMAT:FILE
    digests = [sha256_file(path) for path in paths if path.is_file()]
    return hashlib.sha256(" ".join([__version__, *digests]).encode()).hexdigest()


# Olive's models


def _folder_or_file(model: Any) -> Path:
    if isinstance(model, CompositeModelHandler):
        folder = model.get_resource("model_path")
        if folder is None:
            raise GuardError(
                "the CompositeModel has no model_path; give it the model's folder (onnx-community or onnxruntime-genai), "
                "or put VLMGuard before the passes that take it apart"
            )
        return Path(folder)
    if not isinstance(model, ONNXModelHandler):
        raise GuardError(
            f"a {type(model).__name__} was given; put VLMGuard after the pass that makes it ONNX (OnnxConversion, ModelBuilder)"
        )
    return Path(model.model_path)


def _handler(model: Any, out: Path) -> Any:
    """The guarded folder, described so that Olive copies it as it is.

    One graph at the top: without its file name Olive keeps the name (with it, Olive would make it `model.onnx`). Several:
    `no_flatten` keeps the folders.
    """
    attributes = dict(model.model_attributes or {})
    graphs = sorted(out.rglob("*.onnx"))
    if [graph.parent for graph in graphs] == [out]:
        return ONNXModelHandler(model_path=str(out), model_attributes=attributes)
    parts = {graph.stem: graph.relative_to(out) for graph in graphs}
    if isinstance(model, CompositeModelHandler):
        root = _folder_or_file(model).resolve()
        files = {name: Path(part.model_path) for name, part in model.get_model_components()}
        # their folders, resolved: in Hugging Face's cache the files themselves are links out of it
        parts = {name: (file.parent.resolve() / file.name).relative_to(root) for name, file in files.items()}
    components = [ONNXModelHandler(model_path=str(out), onnx_file_name=path.as_posix()) for path in parts.values()]
    return CompositeModelHandler(components, [*parts], str(out), {**attributes, "no_flatten": True})


def _make_way(out: Path) -> None:
    """Olive makes the folder before the pass runs, and after a kill a whole one of ours may lie there."""
    if (out / MANIFEST_NAME).is_file():
        shutil.rmtree(out)
    elif out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _log_progress(stage: str, done: int, total: int) -> None:
    if done == 0:
        _log.info("%s", stage)


# Registration


def package_config() -> dict[str, Any]:
    """Olive's own list of passes and this one: for `--package-config`, or `olive.workflows.run(..., package_config=)`."""
    content = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    everything = ["*"]
    content["passes"]["VLMGuard"] = {
        "module_path": "vlmguard.plugins.olive.VLMGuard",
        "supported_providers": everything,
        "supported_accelerators": everything,
        "supported_precisions": everything,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    return content


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_config(), indent=2) + "\n")
