"""Prompts in two sets: found however they are spelt, counted, and refused where one set was used by an earlier step."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlmguard.exporter.prompts.labelled import LabelledPrompt, PromptSet, fingerprint
from vlmguard.exporter.prompts.overlaps import Overlap, overlaps, require_held_out
from vlmguard.graphs.errors import PromptsUnusable


def a_set(name: str, *prompts: LabelledPrompt) -> PromptSet:
    return PromptSet(name, "labelled", prompts)


def harmful(text: str) -> LabelledPrompt:
    return LabelledPrompt("1", text, "harmful", "text")


def test_shared_prompts_are_counted_once_per_pair_of_sets(tmp_path: Path) -> None:
    a = a_set("a", harmful("Steal it!"), harmful("steal  it"), harmful("rob it"))
    b = a_set("b", LabelledPrompt("9", "steal it", "harmless", "blank"), harmful("burgle it"))
    c = a_set("c", harmful("burgle it?"), harmful("Rob it"))
    assert overlaps([a, b, c]) == [
        Overlap("a", "b", 1, 1, "steal  it"),
        Overlap("a", "c", 1, 0, "rob it"),
        Overlap("b", "c", 1, 0, "burgle it"),
    ]
    assert overlaps([a]) == [] == overlaps([a_set("d", harmful("x")), a_set("e", harmful("y"))])


def test_the_same_words_beside_another_picture_are_another_prompt(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{color}.png")
    red, blue = (LabelledPrompt("1", "what is it", "harmless", "image", tmp_path / f"{c}.png") for c in ("red", "blue"))
    assert overlaps([a_set("a", red), a_set("b", blue)]) == []
    assert len(overlaps([a_set("a", red), a_set("b", red, blue)])) == 1


def test_prompts_that_were_used_before_are_refused_with_their_count() -> None:
    rows = [harmful("steal it"), harmful("rob it"), harmful("Steal it?")]
    used = {fingerprint(rows[0])}
    require_held_out("p.csv", rows[1:2], used, "were calibrated on", "evaluate")
    with pytest.raises(PromptsUnusable) as refusal:
        require_held_out("p.csv", rows, used, "were calibrated on", "evaluate")
    assert str(refusal.value) == "p.csv: 2 of 3 prompts were calibrated on; evaluate on held-out ones"
