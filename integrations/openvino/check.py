"""Whether OpenVINO reads the guarded ONNX files as they are and computes the same: vision encoder, embeddings and decoder.

What an app copies is `graph`: `Core.compile_model` takes the `.onnx` file; nothing is converted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino

from integrations.replay import Feeds, Run, mode_folders, replay, write_result

# OpenVINO's CPU plugin computes in bfloat16 where the CPU has it, unless it is told: then a gate near its threshold may differ.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def main() -> int:
    core, agreements = openvino.Core(), {}
    for mode, folder in mode_folders():
        parts = (graph(core, folder.model(part)) for part in ("decoder", "embed_tokens", "vision_encoder"))
        agreements[mode] = replay(folder, *parts)
    return write_result("openvino", "OpenVINO (Python, CPU)", openvino.__version__.split("-")[0], agreements)


def graph(core: openvino.Core, path: Path) -> Run:
    """All outputs of an ONNX file by name, for all inputs by name."""
    compiled = core.compile_model(path, "CPU", PRECISION)
    request = compiled.create_infer_request()

    def run(feeds: Feeds) -> Feeds:
        given = request.infer(dict(feeds))
        return {name: given[output] for output in compiled.outputs for name in output.names}

    return run


if __name__ == "__main__":
    sys.exit(main())
