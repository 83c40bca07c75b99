"""The file of records: what a kill can leave of it is gone on with, everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmguard.exporter.evaluation.records import SCHEMA, Drift, Record, RecordFile, Reply
from vlmguard.graphs.errors import OutputRefused

ABOUT = {"base": "b" * 64, "count": 3}


def record(number: int, **more: object) -> Record:
    said = Reply(refused=True, tokens=2, digest="d")
    parts = {"id": "x", "setting": "text", "label": "harmless", "intent": "", "base": said, "guarded": said}
    return Record.model_validate(parts | {"number": number} | more)


FULL = record(
    1,
    gates={"3": True},
    drift=Drift(first_token_kl=1e-9, tokens=0, base_log_likelihood=-0.1, guarded_log_likelihood=-1 / 3),
)


def refusal(path: Path, about: dict = ABOUT) -> str:
    with pytest.raises(OutputRefused) as caught:
        RecordFile(path, about)
    return str(caught.value)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    RecordFile(path, ABOUT).add([record(0), FULL])
    assert RecordFile(path, ABOUT).found == {0: record(0), 1: FULL}


def test_what_a_kill_leaves_of_the_file_is_gone_on_with(tmp_path: Path) -> None:
    """At every byte."""
    path = tmp_path / "r.jsonl"
    file = RecordFile(path, ABOUT)
    file.add([record(0), FULL])
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(len(content)):
        path.write_bytes(content[:size])
        file = RecordFile(path, ABOUT)
        kept = max(content[first:size].count(b"\n"), 0) if size >= first else 0
        assert sorted(file.found) == list(range(kept)), size
        file.add([record(0), FULL])
        assert path.read_bytes() == content, size


def test_what_is_no_record_of_this_evaluation_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for content in (b"hello", b"hello\n", b"[1]\n", b'{"schema": "another/1"}\n'):
        path.write_bytes(content)
        assert refusal(path) == f"{path}: is not a file of evaluation records ({SCHEMA}); choose another --out"
        assert path.read_bytes() == content
    path.unlink()
    RecordFile(path, ABOUT).add([record(0)])
    assert refusal(path, ABOUT | {"count": 4}) == (
        f"{path}: records another evaluation (count was 3, now it is 4); choose another --out, or remove it"
    )
    assert refusal(path, ABOUT | {"base": "c" * 64}).startswith(
        f'{path}: records another evaluation (base was "{"b" * 44}..., now it is "{"c" * 44}...)'
    )
    assert "(judge was null, now it is" in refusal(path, ABOUT | {"judge": "x"})
    path.write_bytes(path.read_bytes().replace(b'"number":0', b'"number":"0"'))
    assert refusal(path) == (
        f"{path}: line 2 is not a record (Input should be a valid integer); choose another --out, or remove it"
    )
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be written or read (")
