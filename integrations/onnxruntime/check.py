"""Whether plain onnxruntime, in an environment of its own, answers as it should: `answer.py` on every case, and all logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime

from integrations.replay import CaseFolder, Feeds, Run, mode_folders, replay, write_result

EXAMPLE = Path(__file__).with_name("answer.py")


def main() -> int:
    agreements = {}
    for mode, folder in mode_folders():
        for case in folder.content["cases"]:
            picture = [] if case["image"] is None else [folder.folder / "images" / case["image"]]
            said = subprocess.run(
                [sys.executable, EXAMPLE, folder.folder / "model", case["prompt"], *picture],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            assert said == case["answer"], (
                f"{mode}, {case['name']}: answer.py said {said!r}, expected {case['answer']!r}"
            )
        agreements[mode] = replay(folder, *graphs(folder))
    return write_result("onnxruntime", "onnxruntime (Python, CPU)", onnxruntime.__version__, agreements)


def graphs(folder: CaseFolder) -> tuple[Run, Run, Run]:
    """Decoder, embeddings and vision encoder."""
    return graph(folder.model("decoder")), graph(folder.model("embed_tokens")), graph(folder.model("vision_encoder"))


def graph(path: Path) -> Run:
    """All outputs of an ONNX file by name, for all inputs by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


if __name__ == "__main__":
    sys.exit(main())
