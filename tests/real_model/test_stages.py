"""Stages are whole or absent, and are made again only where what they are made from has changed."""

import pytest
from stages import key_of, run_stage, stage_record


def write(text, calls):
    def make(folder):
        calls.append(text)
        (folder / "result").write_text(text)
        return {"letters": len(text)}

    return make


def test_a_finished_stage_is_not_made_again(tmp_path):
    calls = []
    for _ in range(2):
        folder = run_stage(tmp_path / "a", {"seed": 0, "sizes": (1, 2)}, write("once", calls))
    assert calls == ["once"]
    assert (folder / "result").read_text() == "once"
    assert stage_record(folder)["facts"] == {"letters": 4}


def test_another_key_makes_it_again(tmp_path):
    calls = []
    for seed in (0, 1):
        folder = run_stage(tmp_path / "a", {"seed": seed}, write(f"seed {seed}", calls))
    assert calls == ["seed 0", "seed 1"]
    assert (folder / "result").read_text() == "seed 1"


def test_a_stopped_stage_leaves_what_was_there(tmp_path):
    folder = run_stage(tmp_path / "a", {"seed": 0}, write("old", []))

    def stop(partial):
        (partial / "result").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "a", {"seed": 1}, stop)
    assert (folder / "result").read_text() == "old"
    assert stage_record(folder)["key"] == {"seed": 0}
    run_stage(tmp_path / "a", {"seed": 1}, write("new", []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_keys_of_later_stages_follow_the_earlier_key(tmp_path):
    first, second, third = (
        run_stage(tmp_path / name, {"seed": seed}, write("x", [])) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert key_of(first) == key_of(second) != key_of(third)
