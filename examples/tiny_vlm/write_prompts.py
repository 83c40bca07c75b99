"""Write the anchors, the calibration and the evaluation prompts with their pictures: `python write_prompts.py`.

The files follow from `world.py` alone (no model, fixed seeds), so writing them again changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from world import Row, anchor_pairs, draw, prompt_rows, question_rows

CALIBRATION_PER_VERB = 2  # 24 verbs a label: 48 prompts a label and setting
EVALUATION_PER_VERB = 5  # 120; and questions about each held-out picture


def line(row: Row) -> dict[str, str | None]:
    """One row as the prompt files have it; the code that runs the prompt creates the blank picture."""
    image = f"images/{row.picture.file_name}" if row.picture else None
    return {"id": row.id, "prompt": row.prompt, "label": row.label, "setting": row.setting, "image": image}


def write_lines(path: Path, lines: Iterable[dict[str, str | None]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")


def write_prompts(folder: Path) -> None:
    """`anchors.jsonl`, `calibration.jsonl`, `evaluation.jsonl`, `*-typographic.jsonl`, and the pictures they name.

    Prompts whose harm is only in the picture have files of their own: calibration uses them on request.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_lines(folder / "anchors.jsonl", anchor_pairs())
    calibration = [*prompt_rows("calibration", CALIBRATION_PER_VERB), *question_rows("calibration")]
    evaluation = [*prompt_rows("evaluation", EVALUATION_PER_VERB), *question_rows("evaluation")]
    for name, rows in (("calibration", calibration), ("evaluation", evaluation)):
        signs = [row for row in rows if row.setting == "typographic"]
        write_lines(folder / f"{name}.jsonl", (line(row) for row in rows if row.setting != "typographic"))
        write_lines(folder / f"{name}-typographic.jsonl", map(line, signs))
    for picture in {row.picture for row in (*calibration, *evaluation) if row.picture}:
        draw(picture).save(folder / "images" / picture.file_name, optimize=True)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description="Write the prompt files of the tiny world.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prompts")
    write_prompts(parser.parse_args().out)


if __name__ == "__main__":
    main()
