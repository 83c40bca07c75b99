"""One row of docs/families.md: `python tests/families/one_type.py TYPE FOLDER` prints it as one line of JSON.

A small random checkpoint of the type is converted (compared with torch, pictures included), its layers are found, the middle
one is guarded along a random direction, the guarded folder is verified, and a picture is described where the runtime can
prepare one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as a script: its folder's parent is where `families` is imported from
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from families.small_checkpoint import default_config, save_small, types
from PIL import Image
from random_directions import random_directions, write_directions

import vlmguard
from vlmguard.exporter.checkpoints.convert import read_config
from vlmguard.exporter.families import FAMILIES, find_family
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.images.vision import open_preprocessor

Kind = Literal["own row", "generic row", "text", ""]
NEW_TOKENS = 4
PICTURE = (60, 90)  # height and width of what is described


@dataclasses.dataclass
class TypeRow:
    """What became of one type. Empty: it did not get that far, and `reason` says why.

    Attributes:
        type: `model_type` of its config.
        transformers: version.
        export: which row exported it.
        parity: largest difference from torch, as a share of the largest value.
        anatomy: layers found, of layers in the config.
        guard: how many checks the proof of a guarded folder made.
        verified: whether `verify` finds the guard again.
        picture: `yes` where the guarded folder describes a picture, and what the picture's preparation needs; else why not.
        reason: what stopped it.
        seconds: how long all of it took.
    """

    type: str
    transformers: str = ""
    export: Kind = ""
    parity: float | None = None
    anatomy: str = ""
    guard: str = ""
    verified: bool = False
    picture: str = ""
    reason: str = ""
    seconds: float = 0.0

    @property
    def guarded(self) -> bool:
        """Whether it is exported with parity, guarded and verified."""
        return self.parity is not None and bool(self.guard) and self.verified


def run_type(model_type: str, folder: Path) -> TypeRow:
    """The row of one type, made in an empty folder."""
    import transformers

    row, start = TypeRow(model_type, transformers.__version__), time.monotonic()
    try:
        _fill(row, folder)
    except GuardError as refusal:
        row.reason = str(refusal).replace(f"{folder}/", "")
    except Exception as failure:  # of transformers where no checkpoint can be made, or a defect: the page shows it
        row.reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _fill(row: TypeRow, folder: Path) -> None:
    checkpoint, model, guarded = (folder / name for name in ("checkpoint", "model", "guarded"))
    find_family(default_config(row.type), row.type)  # what has no decoder is refused before a checkpoint is made
    save_small(row.type, checkpoint)
    family = find_family(read_config(checkpoint), str(checkpoint))
    report = vlmguard.convert_checkpoint(checkpoint, model)
    row.export = "own row" if family in FAMILIES else "generic row" if family.takes_images else "text"
    row.parity = report.worst
    anatomy = vlmguard.inspect(model)
    declared = _declared_layers(read_config(checkpoint))
    row.anatomy = f"{anatomy.layer_count} of {declared if declared is not None else '?'}"
    middle = anatomy.layer_count // 2
    directions = write_directions(
        folder / "d.safetensors", random_directions(anatomy.width, range(anatomy.layer_count), rank=1)
    )
    spec = GuardSpec(mode="project", layers=(middle,), rank=1, positions="all")
    result = vlmguard.export(model, guarded, spec=spec, directions=directions)
    row.guard = f"{len(result.proof)} checks"
    verification = vlmguard.verify(guarded)
    row.verified = all(check.ok for check in verification.checks)
    row.picture = _described(guarded)


def _described(guarded: Path) -> str:
    """`yes` where the guarded folder answers about a picture; else why not."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (*PICTURE, 3), np.uint8))
    try:
        answer = vlmguard.GuardedVLM.open(guarded).generate(
            "what is in the picture", image=picture, max_new_tokens=NEW_TOKENS
        )
    except GuardError as refusal:
        return str(refusal).replace(f"{guarded}", "").removeprefix(": ")
    half = getattr(open_preprocessor(guarded), "half", "pil")
    seen = "yes" if half == "pil" else f"yes, with {half}"
    return seen if isinstance(answer, str) else f"no answer ({type(answer).__name__})"


def _declared_layers(config: Any) -> int | None:
    """How many layers the text config declares."""
    for part in (config.get("text_config") or {}, config):
        for name in ("num_hidden_layers", "n_layers", "num_layers"):
            if isinstance(count := part.get(name), int):
                return count
    return None


if __name__ == "__main__":
    assert sys.argv[1] in types(), f"{sys.argv[1]}: no image-text-to-text type of this transformers"
    print(json.dumps(dataclasses.asdict(run_type(sys.argv[1], Path(sys.argv[2])))))
