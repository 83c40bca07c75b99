"""From a Hugging Face checkpoint to the onnx-community layout, without any guard: `convert_checkpoint`.

    out/onnx/vision_encoder.onnx         pixel_values -> image_features [num_images, tokens, width], after the projector
    out/onnx/embed_tokens.onnx           input_ids -> inputs_embeds
    out/onnx/decoder_model_merged.onnx   inputs_embeds, attention_mask, position_ids, past -> logits, present
    out/onnx/model.onnx                  in place of the three, of a text-only model: input_ids, ... -> logits, present
    out/config.json, tokenizer.json, ... copied

`_fp16` comes before `.onnx` in half precision, where everything float but `pixel_values` is fp16. With `w16a32` the weights are
stored in float16 and everything is computed in float32 (`narrow`): inputs, outputs and names are those of fp32. The caller puts
the image features at the image tokens: flattened to [num_images * tokens, width], in reading order, as apps do today.

The rows of `families` list further inputs. `parts` splits a row into graphs, `tidy` cleans them up, and `parity` compares them
with torch. torch and transformers are imported on first use.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ...graphs.errors import ExtraMissing, GuardError, ModelUnreadable, OutputRefused, ProofFailed, first_line
from ...graphs.extras import install_command
from ...graphs.json_files import LARGEST_JSON, require_small
from ...graphs.package import COMPANIONS
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.proof.structure import Check
from ...graphs.reasons import out_of_memory
from ..families import find_family
from ..families.family import PAST, SEQUENCE, TOTAL, Family
from ..families.phi4_multimodal import with_image_features
from ..families.transformers_class import saved_class, transformers_class
from .fit import fit
from .foreign_failures import WHAT_TO_DO, in_one_line
from .narrow import narrow_weights, round_weights
from .parity import answer_with_torch, check_parity, require_onnxruntime
from .parts import Part, parts_of
from .prompt_text import prompt_texts
from .save_inline import save_inline
from .tidy import tidy, weight_bytes
from .trace import quiet, trace_some_way

Dtype = Literal["fp32", "fp16", "w16a32"]

SUFFIXES: Mapping[Dtype, str] = {"fp32": "", "fp16": "_fp16", "w16a32": ""}
# 18 is what torch's operator library is written in; from 23 on, norms and attention are one node each.
OPSETS = range(18, 24)
DEFAULT_OPSET = 18  # the oldest, for the widest choice of runtimes
# protobuf cannot hold 2 GiB; half of that leaves room for later additions to the file.
EXTERNAL_DATA_ABOVE = 1 << 30

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class GraphFile:
    """One graph as it was written."""

    part: str
    path: str  # below the output folder
    nodes: int
    size_bytes: int  # with its external data
    external_data: bool


@dataclass(frozen=True)
class ConversionReport:
    """Result of `convert_checkpoint`, with its comparison with torch (empty if not verified)."""

    checkpoint: str
    model_type: str
    dtype: Dtype
    opset: int
    graphs: tuple[GraphFile, ...]
    copied: tuple[str, ...]
    parity: tuple[Check, ...]
    seconds: float = 0.0  # of the whole conversion, the comparison included

    @property
    def compared(self) -> int:
        """Number of values compared with torch's."""
        return sum(check.compared for check in self.parity)

    @property
    def worst(self) -> float | None:
        """The largest difference relative to torch's largest value; None when nothing was compared."""
        return max((check.worst for check in self.parity), default=None)


def convert_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    opset: int | None = None,
    report_progress: ProgressCallback = ignore_progress,
    verify: bool = True,
) -> ConversionReport:
    """Export a checkpoint to a folder, and compare it with torch.

    Args:
        checkpoint: a folder, or a hub id.
        out: the folder to write, new or empty; on an exception its content is worth nothing and the caller removes it.
        dtype: precision of the graphs.
        opset: ONNX opset of the graphs; default 18.
        report_progress: called with `(stage, done, total)`.
        verify: compare the graphs with torch.

    Raises:
        GuardError: the checkpoint cannot be read or exported.
        ProofFailed: the graphs differ from torch by more than the limit.
    """
    start = time.monotonic()
    opset = _supported_opset(opset)
    _require_known_dtype(dtype)
    _require_empty(out)
    _require_extras(verify)

    folder = locate(checkpoint)
    family = find_family(read_config(folder), str(checkpoint))
    report_progress(f"loading {checkpoint}", 0, 1)
    model = load_model(folder, family, dtype, report_progress)
    if dtype == "w16a32":
        round_weights(model)

    graphs = []
    with quiet():
        family = fitted(family, model, folder, checkpoint, report_progress)
        with in_one_line(f"{checkpoint}: transformers cannot run its decoder"):
            parts = parts_of(family, model)
    for number, part in enumerate(parts, 1):
        report_progress(f"exporting ({number}/{len(parts)}) {part.name}", 0, 1)
        graph = export_part(model, part, opset, checkpoint)
        if dtype == "w16a32":
            narrow_weights(graph.graph)
        graphs.append(_save_part(graph, out, part.name, dtype))
        del graph  # holds the weights of this part
    copied = copy_companions(folder, out)

    parity: tuple[Check, ...] = ()
    if verify:
        report_progress("running the checkpoint in torch", 0, 1)
        with quiet(), in_one_line(f"{checkpoint}: transformers cannot generate with it"):
            texts = prompt_texts(folder, model.config)
            reference = answer_with_torch(family, model, texts, measure_peaks=dtype == "fp16")
        config = model.config
        del model  # so that a large model is in memory once, not twice
        report_progress("running the exported graphs in onnxruntime", 0, 1)
        try:
            with in_one_line(f"{checkpoint}: onnxruntime cannot run its exported graphs"):
                parity = check_parity(out / "onnx", SUFFIXES[dtype], dtype, family, config, reference)
        except ProofFailed as failure:
            raise ProofFailed(f"{checkpoint}: {failure}") from None
    seconds = time.monotonic() - start
    report_progress(f"exported {checkpoint} in {seconds:.0f} s", 1, 1)
    return ConversionReport(str(checkpoint), family.model_type, dtype, opset, tuple(graphs), copied, parity, seconds)


def fitted(
    family: Family, model: Any, folder: Path, checkpoint: str | Path, report_progress: ProgressCallback
) -> Family:
    """The row with what this model's graphs compute: itself, unless it is the generic one (`fit`).

    Args:
        family: the row.
        model: the checkpoint in transformers.
        folder: of the checkpoint.
        checkpoint: its name, for errors.
        report_progress: called with `(stage, done, total)`.

    Raises:
        ModelUnreadable: a piece that cannot be made to compute what transformers computes.
    """
    if not family.generic:
        return family
    report_progress("comparing ways to run it with transformers", 0, 1)
    with in_one_line(f"{checkpoint}: transformers cannot run it on a picture"):
        return fit(family, model, folder, prompt_texts(folder, model.config), report_progress)


def export_part(model: Any, part: Part, opset: int, checkpoint: str | Path) -> ir.Model:
    """One graph of a checkpoint.

    Args:
        model: the checkpoint in transformers.
        part: what to trace.
        opset: ONNX opset of the graph.
        checkpoint: its name, for errors.

    Raises:
        ModelUnreadable: torch cannot export it, or exports another graph than the model is.
    """
    with in_one_line(f"{checkpoint}: torch cannot export its {part.name}"):
        graph = trace_some_way(model, part, opset)
    sums = {f"{PAST} + {SEQUENCE}": TOTAL}
    named = {"float32_inputs": part.float32_inputs, "state_names": part.state_names}
    try:
        tidy(graph, part.inputs, part.outputs, sums=sums, **named)
    except ModelUnreadable as otherwise:
        raise ModelUnreadable(
            f"{checkpoint}: torch exports its {part.name} as another graph than the model is ({otherwise}); {WHAT_TO_DO}"
        ) from None
    return graph


def locate(checkpoint: str | Path) -> Path:
    """The checkpoint's folder; a hub id is downloaded first, weights in safetensors and configs only."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelUnreadable(f"{checkpoint}: a file; name the folder that holds config.json and *.safetensors")
    if not _HUB_ID.fullmatch(str(checkpoint)):
        raise ModelUnreadable(f"{checkpoint}: no such folder; name a checkpoint's folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted = [*COMPANIONS, "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(str(checkpoint), allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as failure:
        raise ModelUnreadable(
            f"{checkpoint}: no such folder, and not on the Hugging Face hub for us ({first_line(failure)}); "
            f"check the name, or download it and name its folder"
        ) from failure


def read_config(folder: Path) -> Mapping[str, Any]:
    """The checkpoint's config.json, as plain data."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelUnreadable(f"{folder}: no config.json; name the folder of a Hugging Face checkpoint")
    try:
        require_small(path, LARGEST_JSON)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as malformed:
        raise ModelUnreadable(f"{path}: not JSON ({malformed}); fetch the checkpoint again") from malformed
    if not isinstance(config, dict):
        raise ModelUnreadable(f"{path}: a JSON {type(config).__name__}, expected an object; fetch the checkpoint again")
    return config


def load_model(folder: Path, family: Family, dtype: Dtype, report_progress: ProgressCallback) -> Any:
    """Load the checkpoint as a transformers model on the CPU, with every weight from its files.

    Args:
        folder, family: of the checkpoint.
        dtype, report_progress: as for `convert_checkpoint`.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if not any(folder.glob("*.safetensors")):
        raise ModelUnreadable(
            f"{folder}: no *.safetensors; save the checkpoint with save_pretrained (pickled weights can run code and "
            f"are not opened)"
        )
    model_class = transformers_class(family.model_class)
    whole_class = saved_class(read_config(folder), model_class)
    try:
        config = whole_class.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as failure:
        raise ModelUnreadable(
            f"{folder}: its config.json describes no {family.model_type} model ({first_line(failure)}); "
            f"fetch the checkpoint again"
        ) from failure
    try:
        with quiet():
            model, loading = whole_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float16 if dtype == "fp16" else torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, with a name and both shapes
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as failure:
        what_to_do = (
            "the machine has too little free memory" if out_of_memory(failure) else "fetch the checkpoint again"
        )
        raise ModelUnreadable(
            f"{folder}: its weights cannot be loaded ({first_line(failure)}); {what_to_do}"
        ) from failure
    # transformers fills what is missing or does not fit with random numbers, and only warns.
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelUnreadable(
            f"{folder}: tensors that do not fit its config.json: {len(mismatched)}, the first is {name} "
            f"(stored {list(stored)}, expected {list(expected)}); fetch the checkpoint again"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ModelUnreadable(
            f"{folder}: tensors of the model missing from its weights: {len(missing)}, the first is {missing[0]}; "
            f"fetch the checkpoint again"
        )
    if surplus := sorted(loading["unexpected_keys"]):
        report_progress(
            f"tensors of the checkpoint that are in no part of the model: {len(surplus)}, the first is {surplus[0]}",
            0,
            1,
        )
    part = next((part for part in model.eval().modules() if isinstance(part, model_class)), None)
    if part is None:
        raise ModelUnreadable(
            f"{folder}: its architecture {whole_class.__name__} has no part of the class {family.model_class}, which "
            f"transformers lists for {family.model_type}; export it to ONNX with its own tools and guard that folder instead"
        )
    return with_image_features(part)


def save_part(graph: ir.Model, path: Path) -> bool:
    """Write one graph; whether its weights went to `<file>_data` beside it, because one file would be too large."""
    external = weight_bytes(graph) > EXTERNAL_DATA_ABOVE
    if external:
        ir.save(graph, path, external_data=f"{path.name}_data")
    else:
        save_inline(graph, path)
    return external


def _save_part(graph: ir.Model, out: Path, part: str, dtype: Dtype) -> GraphFile:
    """Write one graph of the onnx-community layout."""
    path = out / "onnx" / f"{part}{SUFFIXES[dtype]}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    external = save_part(graph, path)
    files = [path, *([path.with_name(f"{path.name}_data")] if external else [])]
    return GraphFile(
        part=part,
        path=path.relative_to(out).as_posix(),
        nodes=len(graph.graph),
        size_bytes=sum(file.stat().st_size for file in files),
        external_data=external,
    )


def copy_companions(folder: Path, out: Path) -> tuple[str, ...]:
    """Copy what apps read beside the graphs, and return the names."""
    present = [name for name in COMPANIONS if (folder / name).is_file()]
    for name in present:
        shutil.copyfile(folder / name, out / name)  # follows links: the hub's cache is made of them
    return tuple(present)


def _supported_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    if opset not in OPSETS:
        raise GuardError(f"unsupported opset {opset}; choose {OPSETS[0]} to {OPSETS[-1]} (default {DEFAULT_OPSET})")
    return opset


def _require_known_dtype(dtype: str) -> None:
    if dtype not in SUFFIXES:
        raise GuardError(f"unsupported dtype {dtype!r}; choose {', '.join(SUFFIXES)}")


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputRefused(f"{out}: exists and is not an empty folder; name a new one")


def _require_extras(verify: bool) -> None:
    """Before minutes of work, not after."""
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401

        import_module("transformers.exporters")
    except ImportError as missing:
        raise ExtraMissing(
            f"exporting a checkpoint needs {missing.name}, which is not installed; run: {install_command('torch')}"
        ) from missing
    if verify:
        require_onnxruntime()
