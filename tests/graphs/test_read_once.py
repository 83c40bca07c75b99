"""Files are read once, and again after any change; an export parses its decoder a few times and reads each config once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_vlm_paths import SOURCE

import vlmguard
from vlmguard.graphs import graph_file, json_files
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.read_once import ReadOnce
from vlmguard.graphs.spec import GuardSpec


class Reader:
    """Counts how often it reads."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, path: Path) -> bytes:
        self.reads += 1
        return path.read_bytes()


def test_a_file_is_read_again_after_any_change(tmp_path: Path) -> None:
    path, reader = tmp_path / "a", Reader()
    kept: ReadOnce[bytes] = ReadOnce(2, 100, len)
    path.write_bytes(b"one")
    assert [kept.get(path, reader) for _ in range(3)] == [b"one"] * 3 and reader.reads == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been changed
    assert kept.get(path, reader) == b"two" and reader.reads == 2
    other = tmp_path / "b"
    other.write_bytes(b"six")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert kept.get(path, reader) == b"six" and reader.reads == 3
    path.unlink()
    with pytest.raises(FileNotFoundError):
        kept.get(path, reader)


def test_few_and_small_contents_are_kept(tmp_path: Path) -> None:
    kept, reader = ReadOnce[bytes](2, 3, len), Reader()
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"one")
        kept.get(path, reader)
    kept.get(paths[2], reader)
    assert reader.reads == 3
    kept.get(paths[0], reader)  # the least recently used had to go
    assert reader.reads == 4
    paths[1].write_bytes(b"four")
    for _ in range(2):
        kept.get(paths[1], reader)
    assert reader.reads == 6  # too large


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    kept: ReadOnce[bytes] = ReadOnce(2, 100, len)

    def slow(path: Path) -> bytes:
        content = path.read_bytes()
        path.write_bytes(b"other")
        return content

    assert kept.get(path, slow) == b"one" and kept.get(path, Reader()) == b"other"


def test_what_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    kept: ReadOnce[bytes] = ReadOnce(2, 100, len)

    def broken(path: Path) -> bytes:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        kept.get(path, broken)
    assert kept.get(path, Reader()) == b"one"


def test_a_config_may_be_changed_by_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1]}')
    json_files.read_json(path)["a"].append(2)
    assert json_files.read_json(path) == {"a": [1]}


@pytest.mark.slow
def test_a_default_export_parses_its_decoder_at_most_four_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parsed: Counter[str] = Counter()
    read: Counter[str] = Counter()
    parse, read_bytes = graph_file._parse, json_files._read

    def counted_parse(path: Path) -> Any:
        parsed[path.name] += 1
        return parse(path)

    def counted_read(path: Path) -> bytes:
        read[path.name] += 1
        return read_bytes(path)

    monkeypatch.setattr(graph_file, "_PARSED", ReadOnce(most=4, largest=64 << 20, size=lambda parsed: parsed.size))
    monkeypatch.setattr(json_files, "_READ", ReadOnce(most=64, largest=1 << 20, size=len))
    monkeypatch.setattr(graph_file, "_parse", counted_parse)
    monkeypatch.setattr(json_files, "_read", counted_read)
    vlmguard.export(SOURCE, tmp_path / "out")
    assert 1 <= parsed["decoder_model_merged.onnx"] <= 4  # before and after the rewrite
    present = {name: count for name, count in read.items() if (SOURCE / name).is_file()}
    assert "config.json" in present and set(present.values()) == {1}


def test_a_renamed_weight_keeps_its_name_in_the_file() -> None:
    path = SOURCE / "onnx" / "decoder_model_merged.onnx"
    first = load_graph(path)
    name = next(iter(first.graph.initializers))
    tensor = first.graph.initializers[name].const_value
    assert tensor is not None
    tensor.name = "renamed"
    again = load_graph(path).graph.initializers[name].const_value
    assert again is not None and again.name == name


@pytest.mark.slow
def test_rewriting_leaves_what_was_read_as_it_was(tmp_path: Path) -> None:
    """The next reader of the same file gets the same graph."""
    path = SOURCE / "onnx" / "decoder_model_merged.onnx"
    load_graph(path)
    before = graph_file._PARSED.get(path, graph_file._parse).proto.SerializeToString(deterministic=True)
    vlmguard.export(SOURCE, tmp_path / "out", spec=GuardSpec(mode="align"))
    after = graph_file._PARSED.get(path, graph_file._parse).proto
    assert after.SerializeToString(deterministic=True) == before
