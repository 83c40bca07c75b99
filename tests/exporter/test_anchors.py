"""The built-in anchors, and how anchors are divided between extraction, calibration and the held-out test."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_vlm_paths import ANCHORS

from vlmguard.exporter.prompts.anchors import open_anchors
from vlmguard.exporter.prompts.labelled import (
    SPLITS,
    AnchorPair,
    LabelledPrompt,
    fingerprint,
    normalised,
    read_anchors,
    read_prompts,
    read_set,
)
from vlmguard.graphs.errors import PromptsUnusable

BUILTIN = [pair for split in SPLITS for pair in read_anchors(f"builtin:{split}")]


# ----------------------------------------------------------------------------------------------------- the built-in pairs


def test_a_hundred_pairs_of_ten_intents_in_three_splits() -> None:
    assert len(BUILTIN) == 100 == len(read_set("builtin").pairs)
    assert Counter(pair.intent for pair in BUILTIN).keys() == {
        *("theft", "fraud", "intrusion", "weapons", "drugs", "violence", "coercion", "sabotage", "privacy"),
        "trafficking",
    }
    for intent in {pair.intent for pair in BUILTIN}:
        splits = Counter(pair.split for pair in BUILTIN if pair.intent == intent)
        assert splits == {"extraction": 4, "calibration": 3, "test": 3}


@pytest.mark.parametrize("pair", BUILTIN, ids=lambda pair: pair.harmful)
def test_the_halves_of_a_pair_are_matched_word_by_word(pair: AnchorPair) -> None:
    """The same number of words, at most two of them different, in the same places; terse, and without a second sentence."""
    harmful, harmless = pair.harmful.split(), pair.harmless.split()
    assert len(harmful) == len(harmless) <= 9
    assert 1 <= sum(a != b for a, b in zip(harmful, harmless, strict=True)) <= 2
    for text in (pair.harmful, pair.harmless):
        assert text.startswith("How to ") and text.endswith("?") and len(text) < 60
        assert not set(text[:-1]) & set(".,:;!?0123456789")


def test_most_pairs_differ_in_one_word() -> None:
    one = [p for p in BUILTIN if sum(a != b for a, b in zip(p.harmful.split(), p.harmless.split(), strict=True)) == 1]
    assert len(one) >= 80


def test_no_prompt_of_the_built_in_pairs_comes_twice() -> None:
    texts = [normalised(text) for pair in BUILTIN for text in (pair.harmful, pair.harmless)]
    assert len(set(texts)) == 200


# --------------------------------------------------------------------------------------------------------------- dividing


def marks(pairs: tuple[AnchorPair, ...]) -> set[str]:
    prompts = [LabelledPrompt("", text, "harmful", "text") for pair in pairs for text in (pair.harmful, pair.harmless)]
    return {fingerprint(prompt) for prompt in prompts}


@pytest.mark.parametrize("extracts", [True, False])
def test_a_divided_source_keeps_its_own_pairs_back(extracts: bool) -> None:
    anchors, kept = open_anchors().divided(extracts)
    assert {pair.split for pair in anchors.pairs} == {"extraction"} and len(anchors.pairs) == 40
    assert {pair.split for pair in kept} == {"calibration"} and len(kept) == 30
    assert anchors.title == "builtin:extraction" and anchors.folder is None
    assert anchors.record() == {"source": "builtin:extraction", "fingerprints": sorted(marks(anchors.pairs))}
    held_out = read_prompts("builtin", "test")
    assert len(held_out) == 60 and not {fingerprint(row) for row in held_out} & (marks(anchors.pairs) | marks(kept))


def test_of_an_undivided_file_a_third_is_kept_back_where_something_is_extracted() -> None:
    opened = open_anchors(ANCHORS)
    assert (opened.name, opened.title, opened.folder) == (str(ANCHORS), "anchors.jsonl", ANCHORS.parent)
    anchors, kept = opened.divided(extracts=True)
    assert (len(anchors.pairs), len(kept)) == (64, 32) and not marks(anchors.pairs) & marks(kept)
    assert opened.divided(extracts=False) == (opened, opened.pairs)


def test_a_file_of_ones_own_may_be_divided_too(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    rows = [f"how to steal it {n},how to wash it {n},{split}" for split in ("extraction", "calibration") for n in "ab"]
    path.write_text("\n".join(["harmful,harmless,split", *rows]))
    anchors, kept = open_anchors(path).divided(extracts=True)
    assert ([pair.split for pair in anchors.pairs], len(kept)) == (["extraction"] * 2, 2)
    with pytest.raises(PromptsUnusable) as refusal:
        read_prompts(path, "test")
    assert str(refusal.value) == f"{path}: holds nothing of split test; add some, or remove the column split"
    path.write_text("\n".join(["harmful,harmless,split", *rows, "x,y,train"]))
    with pytest.raises(PromptsUnusable) as refusal:
        open_anchors(path)
    assert str(refusal.value) == f"{path}: line 5 has split 'train'; expected extraction, calibration or test"


def test_anchors_of_several_files_without_pairs_are_paired_in_their_order(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_text("how to steal a car\nhow to rob a bank\nhow to burgle a house\n")
    good.write_text("how to wash a car\nhow to find a bank\n")
    assert read_anchors([f"harmful:{bad}", f"harmless:{good}"]) == [
        AnchorPair("how to steal a car", "how to wash a car"),
        AnchorPair("how to rob a bank", "how to find a bank"),
    ]
    with pytest.raises(PromptsUnusable) as refusal:
        read_anchors(f"harmful:{bad}")
    assert str(refusal.value) == (
        f"harmful:{bad}: holds no harmless prompts to pair with the harmful ones; give a second --anchors with some"
    )


def test_the_record_of_the_anchors_survives_the_directions_file(tmp_path: Path) -> None:
    from random_directions import random_directions, write_directions

    from vlmguard.graphs.directions import read_directions
    from vlmguard.graphs.errors import DirectionMismatch

    record = open_anchors().record()
    path = write_directions(tmp_path / "d.safetensors", random_directions(8, [0], anchors=record))
    assert read_directions(path).anchors == record == json.loads(json.dumps(record))
    for broken in ({"source": "x"}, {"source": 1, "fingerprints": []}, {"source": "x", "fingerprints": [1]}):
        with pytest.raises(DirectionMismatch) as refusal:
            random_directions(8, [0], anchors=broken)
        assert str(refusal.value) == "the record of the anchors cannot be read; extract the directions again"
