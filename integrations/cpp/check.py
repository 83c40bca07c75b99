"""Whether the C++ program answers every case as it should: the same tokens, and logits that agree.

    python -m integrations.cpp.check PROGRAM VERSION
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from integrations.replay import BUILD, Agreement, CaseFolder, mode_folders, write_result

SCRATCH = BUILD / "cpp" / "files"


def main(program: str, version: str) -> int:
    agreements = {mode: compare(Path(program), folder, SCRATCH / mode) for mode, folder in mode_folders()}
    return write_result("cpp", "OpenVINO (C++, CPU)", version, agreements)


def compare(program: Path, folder: CaseFolder, scratch: Path) -> Agreement:
    """Every case through a process of its own."""
    scratch.mkdir(parents=True, exist_ok=True)
    content = folder.content
    worst, count, same = 0.0, 0, True
    for case in content["cases"]:
        logits = scratch / f"{case['name']}.logits"
        numbers = [str(content["image_token_id"]), str(content["eos_ids"][0])]
        files = raw_inputs(folder, case, scratch)
        command = [program, folder.folder / "model", *numbers, logits, *files]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        tokens = [int(word) for word in said.split()]
        rows = [folder.tensor(call["logits"])[0, -1] for call in case["calls"] if call["token"] is not None]
        expected, found = np.stack(rows), np.fromfile(logits, "<f4").reshape(len(tokens), -1)
        same = same and tokens == case["tokens"]
        if found.shape == expected.shape:
            worst = float(np.maximum(worst, np.abs(found - expected).max()))
        count += len(tokens)
    return Agreement(worst, count, same)


def raw_inputs(folder: CaseFolder, case: Mapping[str, Any], scratch: Path) -> list[Path]:
    """The case's prompt as text, and where it has a picture with it, and the picture: files as the program takes them."""
    passes = [folder.tensor(call["input_ids"]) for call in case["calls"] if call["what"] != "step"]
    arrays = [passes[0].astype("<i8")]  # the text alone; in a mode of one pass the program does not look at it
    if case["pixel_values"] is not None:
        arrays += [passes[-1].astype("<i8"), folder.tensor(case["pixel_values"]).astype("<f4")]
    paths = [scratch / f"{case['name']}.{number}" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        array.tofile(path)
    return paths


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
