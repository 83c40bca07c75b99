"""One export by optimum-onnx. Runs in optimum's own environment (see `make_optimum.py`), so it imports nothing of the zoo.

    python optimum_export.py CHECKPOINT OUT --dtype fp32|fp16 [--merged]

Without `--merged` it is `optimum-cli export onnx`'s function: one graph, prefill and decoding alike. optimum-onnx 0.1.0
does not split decoders by itself any more, but it still merges one that was split, and so were the "merged" decoders on the
hub made: with `--merged` a graph without and one with past are exported by optimum's `export_models`, and its
`post_process_exported_models` puts both into one `If` (`optimum.onnx.merge_decoders`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from optimum.exporters.onnx import export_models, main_export
from optimum.exporters.tasks import TasksManager

TASK = "text-generation"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export_merged(checkpoint: Path, out: Path, dtype: str, opset: int) -> None:
    """`decoder_model_merged.onnx`, and no other graph."""
    model = TasksManager.get_model_from_task(TASK, str(checkpoint), torch_dtype=DTYPES[dtype])
    model.config.use_cache = True
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", library_name="transformers", model_type=model.config.model_type, task=f"{TASK}-with-past"
    )
    parts = {
        name: (model, constructor(model.config, task=TASK, use_past=True, use_past_in_inputs=past, float_dtype=dtype))
        for name, past in (("decoder_model", False), ("decoder_with_past_model", True))
    }
    files = [f"{name}.onnx" for name in parts]
    out.mkdir(parents=True)
    export_models(parts, out, opset=opset, output_names=files, device="cpu", dtype=dtype)
    parts["decoder_model"][1].post_process_exported_models(out, parts, files)
    for file in files:
        (out / file).unlink()
    model.config.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--opset", type=int, default=17)
    asked = parser.parse_args()
    if asked.merged:
        export_merged(asked.checkpoint, asked.out, asked.dtype, asked.opset)
    else:
        main_export(
            str(asked.checkpoint), output=asked.out, task=f"{TASK}-with-past", dtype=asked.dtype, opset=asked.opset
        )


if __name__ == "__main__":
    main()
