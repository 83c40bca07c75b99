"""What each mode does to the tiny VLM: `python modes.py` measures it and writes the table of docs/method.md.

Each mode is exported as a user would, from the model's folder and nothing else (directions extracted, the rest calibrated), and
asked the held-out prompts; modes that can see harm that is only in the picture once more, calibrated on such prompts too. A
mode that is refused stands in the table with its sentence. No figure was typed.

    python modes.py             # measure, write (some minutes on one core)
    python modes.py --check     # measure, and say whether the page has these figures
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import vlmguard
from vlmguard.exporter.evaluation.evaluate import tally
from vlmguard.exporter.evaluation.metrics import Tally
from vlmguard.exporter.prompts.labelled import LabelledPrompt, read_prompts
from vlmguard.exporter.sources import open_model
from vlmguard.graphs.modes import MODES

HERE = Path(__file__).parent
SOURCE = HERE / "onnx-community"
PROMPTS = HERE / "prompts"
ASKED = [PROMPTS / "evaluation.jsonl", PROMPTS / "evaluation-typographic.jsonl"]
WITH_SIGNS = [PROMPTS / "calibration.jsonl", PROMPTS / "calibration-typographic.jsonl"]
EXPORTS: tuple[tuple[str, list[Path] | None], ...] = (
    *((mode, None) for mode in MODES),
    *((mode, WITH_SIGNS) for mode in ("restore", "combined")),
)
PAGE = HERE.parents[1] / "docs" / "method.md"
BEGIN, END = "<!-- begin: examples/tiny_vlm/modes.py -->", "<!-- end: examples/tiny_vlm/modes.py -->"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="compare with the page; write nothing")
    check = options.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    new = before + "\n".join([BEGIN, *table(read_prompts(ASKED)), END]) + after
    if check:
        print("docs/method.md is up to date" if new == page else "docs/method.md has other figures; run modes.py")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def table(prompts: Sequence[LabelledPrompt]) -> list[str]:
    """Markdown: a row per mode, a column per setting."""
    settings = list(dict.fromkeys(prompt.setting for prompt in prompts))
    columns = ["mode", "calibrated on", "layers", *settings, "text answers changed"]
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    base = tally(open_model(SOURCE), prompts)
    lines.append(_row("unguarded", "", "", base, base, prompts, settings))
    with tempfile.TemporaryDirectory() as scratch:
        for number, (mode, calibration) in enumerate(EXPORTS):
            print(f"{mode} ...", file=sys.stderr)
            out, on = Path(scratch) / str(number), "all four" if calibration else "text, blank, image"
            on = "nothing" if mode == "align" else on
            try:
                made = vlmguard.export(SOURCE, out, spec=vlmguard.GuardSpec(mode=mode), calibration=calibration)
            except vlmguard.GuardError as error:
                lines.append(f"| `{mode}` | {on} | not written: {error} |" + " |" * (len(columns) - 3))
                continue
            found = tally(vlmguard.GuardedVLM.open(made.out), prompts)
            layers = ", ".join(map(str, made.plan.layers))
            lines.append(_row(f"`{mode}`", on, layers, found, base, prompts, settings))
    return [*lines, ""]


def _row(
    name: str,
    on: str,
    layers: str,
    found: Tally,
    base: Tally,
    prompts: Sequence[LabelledPrompt],
    settings: Sequence[str],
) -> str:
    cells = {(cell.setting, cell.label): f"{cell.refused}/{cell.asked}" for cell in found.cells}
    refused = [f"{cells.get((s, 'harmful'), '-')} and {cells.get((s, 'harmless'), '-')}" for s in settings]
    said = zip(prompts, base.answers, found.answers, strict=True)
    changed = sum(a != b for prompt, a, b in said if prompt.setting == "text")
    return f"| {name} | {on} | {layers} | {' | '.join(refused)} | {changed} |"


if __name__ == "__main__":
    sys.exit(main())
