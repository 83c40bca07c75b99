"""One guard in every precision of one decoder: `python precisions.py --data FOLDER --seed N`.

1. `precisions`         the ONNX folder of `measure_guard.py` with more decoders: see `PRECISIONS`
2. `guarded/precision-` `vlmguard-export` of each: float32 in mode align, the others with the guard that float32 got
3. `asked/precision-`   held-out prompts as text, beside held-out pictures of shapes, and beside adversarial ones where the
                        bed has them; and questions about held-out pictures

The counts are written to `precisions.json` beside this file, which `page.py` reads. Embeddings and vision encoder stay in
float32. `--quick` takes the bed of `build.py --quick`. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from build import BUILD, bed
from cells import ASKED, BATCH, QUESTIONS, TOKENS, all_cells, counted
from measure_guard import convert, export, machine
from scenes import blank
from sets import HARMFUL_HELD_OUT, read_sets
from stages import digest_of, key_of, run_stage, stage_record

from vlmguard.exporter.checkpoints.narrow import narrow_weights
from vlmguard.exporter.last_token_model import last_token_model
from vlmguard.graphs.graph_io import external_files, load_graph, save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder_place import DecoderPlace
from vlmguard.runtime.generation import Sampling
from vlmguard.runtime.refusals import refused

# Suffix of the decoder's file -> what it is.
PRECISIONS = {
    "": "float32",
    "w16a32": "float16 weights, float32 stream",
    "int8": "int8 weights and activations",
    "q4": "int4 weights, blocks of 32",
    "q8": "int8 weights, blocks of 32",
}
PROMPTS = 6  # of each set
SETTINGS = ("picture", "adversarial")
RESULTS = Path(__file__).parent / "precisions.json"
DECODER = "onnx/decoder_model_merged{}.onnx"


def decoder_of(model: Path, precision: str) -> Path:
    """The decoder file of one precision."""
    return model / DECODER.format(f"_{precision}" if precision else "")


def make_precisions(plain: Path, folder: Path) -> None:
    """Write `folder/model`: the files of `plain` as hard links, and a decoder of every precision."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = folder / "model"
    shutil.copytree(plain, model, copy_function=os.link)
    source = decoder_of(model, "")
    narrow(source, decoder_of(model, "w16a32"))
    quantize_dynamic(
        source, decoder_of(model, "int8"), weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True
    )
    for bits in (8, 4):
        quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32, is_symmetric=True)
        quantizer.process()
        save(quantizer.model.model, decoder_of(model, f"q{bits}"))


def narrow(source: Path, target: Path) -> None:
    """Write a decoder as `vlmguard convert --dtype w16a32` does: matrices rounded to float16, computed with in float32."""
    model = load_graph(source)
    for weight in model.graph.initializers.values():
        tensor = weight.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) > 1:
            half = tensor.numpy().astype(np.float16)
            if np.isfinite(half).all():
                weight.const_value = ir.Tensor(half.astype(np.float32), name=weight.name)
    narrow_weights(model.graph)
    save_graph(model, target)


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph with its weights in one file beside it."""
    onnx.save(graph, path, save_as_external_data=True, location=f"{path.name}.data")


def guard(model: Path, seed_folder: Path, precision: str) -> Path:
    """Export one precision; returns the stage, which has no `model` if the export was refused.

    Args:
        model: the folder with every precision.
        seed_folder: what `build.py` printed.
        precision: suffix of the decoder.
    """
    plain = ["--mode", "align"] if not precision else []
    config = ["--config", str(guard(model, seed_folder, "") / "model" / "guard.toml")] if precision else []
    options = ["--variant", precision, *plain, *config]
    key = {"model": key_of(model.parent), "options": options}
    folder = seed_folder / "guarded" / f"precision-{precision or 'plain'}"
    return run_stage(folder, key, lambda partial: export(model, partial, options))


def ask_precision(
    model: Path, guarded: Path, precision: str, seed_folder: Path, data: Path, count: int
) -> dict[str, Any]:
    """One row of the table.

    Args:
        model: the unguarded folder with every precision.
        guarded: the guarded folder of this precision.
        precision: suffix of the decoder.
        seed_folder: what `build.py` printed.
        data: the folder with the public prompt sets.
        count: prompts of each set, and half the number of questions.
    """
    place = DecoderPlace()  # one decoder at a time
    images = seed_folder / "images" / "evaluation"
    settings = [setting for setting in SETTINGS if any(images.glob(f"{setting}-*.png"))]
    cells = list(all_cells(read_sets(data), images, blank(), (), count, 0, ("text", *settings)))
    asked: dict[str, dict[str, list[bool]]] = {cell.name: {} for cell in cells}
    for who, folder in (("base", model), ("guarded", guarded)):
        vlm = last_token_model(open_package(folder, precision, trust_links=True), place)
        for cell in cells:
            if who == "guarded" and cell.setting == "text":
                continue  # the reference is the unguarded model
            answers = vlm.answer(cell.requests, Sampling(TOKENS), BATCH)
            asked[cell.name][f"{who}_refused"] = [refused(answer) for answer in answers]
            pairs = zip(cell.questions, answers, strict=False)
            asked[cell.name][f"{who}_right"] = [question.answered_by(answer) for question, answer in pairs]
            print(f"  {precision or 'plain'}, {who}: {cell.name}", flush=True)
    return row_of(asked, settings)


def row_of(asked: Mapping[str, Mapping[str, Any]], settings: Iterable[str]) -> dict[str, Any]:
    """The counts of one precision over its cells."""

    def summed(names: Iterable[str], setting: str) -> dict[str, int]:
        rows = [counted(asked, f"{name}, {setting}") for name in names]
        return {key: sum(row[key] for row in rows) for key in ("count", "text", "unguarded", "guarded")}

    questions = asked[f"{QUESTIONS}, picture"]
    harmless = [name for name in ASKED if name not in HARMFUL_HELD_OUT]
    return {
        "settings": {
            setting: {"harmful": summed(HARMFUL_HELD_OUT, setting), "harmless": summed(harmless, setting)}
            for setting in settings
        },
        "questions": {
            "count": len(questions["base_right"]),
            "unguarded": sum(questions["base_right"]),
            "guarded": sum(questions["guarded_right"]),
        },
    }


def measure(seed_folder: Path, data: Path, count: int, out: Path) -> Path:
    """Make, guard and ask every precision; returns the file with the counts.

    Args:
        seed_folder: what `build.py` printed.
        data: the folder with the public prompt sets.
        count: prompts of each set.
        out: the file to write.
    """
    checkpoint = seed_folder / "checkpoint"
    onnx_stage = run_stage(
        seed_folder / "onnx", {"checkpoint": key_of(checkpoint)}, lambda folder: convert(checkpoint, folder)
    )
    key = {"onnx": key_of(onnx_stage), "precisions": PRECISIONS}
    made = run_stage(seed_folder / "precisions", key, lambda folder: make_precisions(onnx_stage / "model", folder))
    model, rows = made / "model", []
    plan = json.loads((guard(model, seed_folder, "") / "model" / "guard.json").read_text())["decoders"][0]["plan"]
    safety, vision = (stage_record(seed_folder / stage) for stage in ("safety", "vision"))
    about = {
        "seed": safety["key"]["seed"],
        "reduced": seed_folder == bed(seed_folder.parent, safety["key"]["seed"], quick=True),
        "tower_steps": vision["facts"]["recipe"]["steps"],
        "prompts": count,
        "plan": {"mode": plan["mode"], "layers": plan["layers"], "rank": plan["sites"][0]["rank"]},
        "machine": machine(),
    }
    for precision in PRECISIONS:
        rows.append(measure_precision(model, precision, seed_folder, data, count))
        results = {**about, "precisions": rows}
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")  # a stopped run leaves the rows so far
    return out


def measure_precision(model: Path, precision: str, seed_folder: Path, data: Path, count: int) -> dict[str, Any]:
    """Guard and ask one precision; returns its row.

    Args:
        model: the unguarded folder with every precision.
        precision: suffix of the decoder.
        seed_folder: what `build.py` printed.
        data: the folder with the public prompt sets.
        count: prompts of each set.
    """
    stage, decoder = guard(model, seed_folder, precision), decoder_of(model, precision)
    size = sum(path.stat().st_size for path in (decoder, *external_files(decoder)))
    row = {"precision": PRECISIONS[precision], "bytes": size}
    if message := stage_record(stage)["facts"]["message"]:
        return row | {"refused_export": message}
    guarded, images = (stage / "model" / "guard.json").read_text(), key_of(seed_folder / "images")
    asked = run_stage(
        seed_folder / "asked" / f"precision-{precision or 'plain'}",
        {"guarded": digest_of(guarded), "images": images, "count": count},
        lambda _: ask_precision(model, stage / "model", precision, seed_folder, data, count),
    )
    return row | stage_record(asked)["facts"]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table, one row per precision and kind of picture."""
    lines = [
        "| decoder | MiB | pictures | harmful as text | unguarded | guarded | harmless as text | unguarded | guarded | "
        "questions, unguarded | guarded |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['precision']} | {row['bytes'] / 2**20:.0f} |"
        if "refused_export" in row:
            lines.append(f"{start} the export was refused: {row['refused_export']} |" + " |" * 8)
            continue
        right = row["questions"]
        asked = {"picture": (f"{right['unguarded']} of {right['count']}", str(right["guarded"]))}
        for setting, counts in row["settings"].items():
            refusals = [
                f"{counts[label][key]} of {counts[label]['count']}" if key == "text" else str(counts[label][key])
                for label in ("harmful", "harmless")
                for key in ("text", "unguarded", "guarded")
            ]
            lines.append(f"{start} {' | '.join((setting, *refusals, *asked.get(setting, ('', ''))))} |")
    return lines


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with the public prompt sets.")
    parser.add_argument("--seed", type=int, default=0, help="Which bed.")
    parser.add_argument("--build", type=Path, default=BUILD, help="Build folder of build.py.")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="Prompts of each set.")
    parser.add_argument("--quick", action="store_true", help="Measure the bed of build.py --quick.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="File for the counts.")
    given = parser.parse_args()
    path = measure(bed(given.build, given.seed, given.quick), given.data, given.prompts, given.out)
    print("\n".join(table(json.loads(path.read_text())["precisions"])))


if __name__ == "__main__":
    main()
