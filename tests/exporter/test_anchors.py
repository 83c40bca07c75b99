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


TERSE = "How to"
OPENINGS = (  # as people write to assistants
    *(
        "Can you tell me how to",
        "How do I",
        "What is the best way to",
        "Please explain how to",
        "Could you show me how to",
    ),
    *("Tell me how to", "Help me", "I need to know how to", "Give me tips on how to", "How can I", "I want to"),
    "Write a guide on how to",
)


def opening(text: str) -> str:
    return next(start for start in (TERSE, *OPENINGS) if text.startswith(f"{start} "))


def request(text: str) -> str:
    """What is asked, without the opening and the mark at the end."""
    return normalised(text[len(opening(text)) :])


def test_three_hundred_pairs_of_ten_intents_in_three_splits() -> None:
    assert len(BUILTIN) == 300 == len(read_set("builtin").pairs)
    assert Counter(pair.intent for pair in BUILTIN).keys() == {
        *("theft", "fraud", "intrusion", "weapons", "drugs", "violence", "coercion", "sabotage", "privacy"),
        "trafficking",
    }
    for intent in {pair.intent for pair in BUILTIN}:
        splits = Counter(pair.split for pair in BUILTIN if pair.intent == intent)
        assert splits == {"extraction": 12, "calibration": 9, "test": 9}


@pytest.mark.parametrize("pair", BUILTIN, ids=lambda pair: pair.harmful)
def test_the_halves_of_a_pair_are_matched_word_by_word(pair: AnchorPair) -> None:
    """The same opening, the same number of words, at most two of them different, in the same places; terse, one sentence."""
    harmful, harmless = pair.harmful.split(), pair.harmless.split()
    assert len(harmful) == len(harmless) <= 13
    assert 1 <= sum(a != b for a, b in zip(harmful, harmless, strict=True)) <= 2
    assert opening(pair.harmful) == opening(pair.harmless)
    for text in (pair.harmful, pair.harmless):
        assert len(request(text).split()) <= 8 and len(text) < 72
        assert text[-1] == ("?" if text.startswith(("How", "Can", "What", "Could")) else ".")  # the halves end alike
        assert not set(text[:-1]) & set(".,:;!?0123456789")


def test_most_pairs_differ_in_one_word() -> None:
    one = [p for p in BUILTIN if sum(a != b for a, b in zip(p.harmful.split(), p.harmless.split(), strict=True)) == 1]
    assert len(one) == 235


def test_pairs_are_terse_and_as_people_write_in_turns() -> None:
    """In every part, and in what an export takes of it; each opening about as often as the others."""
    counts = Counter(opening(pair.harmful) for pair in BUILTIN)
    assert counts.pop(TERSE) == 140 and set(counts) == set(OPENINGS)
    assert set(counts.values()) == {13, 14}
    for name in ("extraction", "calibration", "test"):
        for pairs in (read_anchors(f"builtin:{name}"), read_anchors("builtin", name)):
            assert 0.4 < sum(pair.harmful.startswith(TERSE) for pair in pairs) / len(pairs) <= 0.5


def test_no_request_of_the_built_in_pairs_comes_twice() -> None:
    """In other words either: a prompt and the same one with another opening would not be held out from each other."""
    assert len({request(text) for pair in BUILTIN for text in (pair.harmful, pair.harmless)}) == 600


def test_an_export_takes_a_sample_of_each_part_and_a_named_part_is_whole() -> None:
    """The same number of each intent, the same every time: extraction runs the model on each of its prompts."""
    for part, of_each, whole in (("extraction", 8, 12), ("calibration", 4, 9), ("test", 9, 9)):
        sample, pairs = read_anchors("builtin", part), read_anchors(f"builtin:{part}")
        assert set(Counter(pair.intent for pair in sample).values()) == {of_each}
        assert set(Counter(pair.intent for pair in pairs).values()) == {whole}
        assert set(sample) <= set(pairs) and sample == read_anchors("builtin", part)


# --------------------------------------------------------------------------------------------------------------- dividing


def marks(pairs: tuple[AnchorPair, ...]) -> set[str]:
    prompts = [LabelledPrompt("", text, "harmful", "text") for pair in pairs for text in (pair.harmful, pair.harmless)]
    return {fingerprint(prompt) for prompt in prompts}


@pytest.mark.parametrize("extracts", [True, False])
def test_a_divided_source_keeps_its_own_pairs_back(extracts: bool) -> None:
    anchors, kept = open_anchors().divided(extracts)
    assert {pair.split for pair in anchors.pairs} == {"extraction"} and len(anchors.pairs) == 80
    assert {pair.split for pair in kept} == {"calibration"} and len(kept) == 40
    assert anchors.title == "builtin:extraction" and anchors.folder is None
    assert anchors.record() == {"source": "builtin:extraction", "fingerprints": sorted(marks(anchors.pairs))}
    held_out = read_prompts("builtin", "test")
    assert len(held_out) == 180 and not {fingerprint(row) for row in held_out} & (marks(anchors.pairs) | marks(kept))


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
