"""How much is proved by default, what the choice is made by, and what the folder says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_graphs import decoder, directions
from random_directions import write_directions

import vlmguard
from vlmguard.exporter.proof import level as level_module
from vlmguard.exporter.proof.level import choose_level, is_more
from vlmguard.exporter.proof.local_findings import BITS, READS, STATES
from vlmguard.exporter.proof.memory import free_bytes, needed_bytes
from vlmguard.graphs.errors import GuardError, ManifestMismatch
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.lowerings.fold import FOLD
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.package import ModelPackage
from vlmguard.runtime.guarded import open_manifest

onnxruntime = pytest.importorskip("onnxruntime")
GIGABYTE = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_graph(decoder(layers=3), tmp_path / "model" / "model.onnx")
    return tmp_path / "model" / "model.onnx"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`free(bytes)`: how much memory there seems to be."""
    return lambda size: monkeypatch.setattr(level_module, "free_bytes", lambda: size)


def export(model: Path, **options: Any) -> Any:
    found = write_directions(model.parent.parent / "found.safetensors", directions((0, 1)))
    spec = vlmguard.GuardSpec(mode="restore")
    return vlmguard.export(model, model.parent.parent / "out", directions=found, spec=spec, force=True, **options)


# ------------------------------------------------------------------------------------------------------------- the choice


def chosen(model: Path, wanted: Any = "auto", lowering: str = "lowrank") -> tuple[str, str]:
    package = open_package(model)
    found = choose_level(wanted, [(package, package.load_decoder())], lowering)
    return found.level, found.why


def test_a_model_that_fits_is_run_and_one_that_does_not_is_not(model: Path, free: Callable) -> None:
    free(64 * GIGABYTE)
    assert chosen(model) == ("full", "the memory that is free is enough to run the model")
    free(GIGABYTE)
    assert chosen(model) == ("local", "running the model takes about 1.1 GB of memory, and less is free")
    assert chosen(model, lowering=FOLD) == (
        "structure",
        "running the model takes about 1.1 GB of memory, and less is free; a folded guard has no nodes to cut out",
    )
    free(None)
    assert chosen(model) == ("full", "how much memory is free is not known here")


@pytest.mark.parametrize("wanted", ["full", "local", "structure"])
def test_what_is_asked_for_is_done_whatever_is_free(model: Path, free: Callable, wanted: str) -> None:
    free(0)
    assert chosen(model, wanted) == (wanted, "as requested")


def test_what_cannot_be_done_is_refused(model: Path) -> None:
    with pytest.raises(GuardError, match=r"^a folded guard has no nodes to cut out; choose --proof full or structure$"):
        chosen(model, "local", FOLD)
    with pytest.raises(GuardError, match=r"^proof 'most' is unknown; choose one of auto, full, local, structure$"):
        chosen(model, "most")


def test_levels_are_ordered() -> None:
    assert is_more("full", "local") and is_more("local", "structure") and not is_more("local", "full")


# ------------------------------------------------------------------------------------------------------------------ memory


def test_weights_take_more_memory_than_their_size_and_float16_ones_most(tmp_path: Path) -> None:
    package = ModelPackage(tmp_path, tmp_path / "model.onnx", "bare")

    def per_byte(dtype: str) -> float:
        graph, empty = decoder(layers=2, dtype=dtype), decoder(layers=2, dtype=dtype)
        held = 0
        for name in list(graph.graph.initializers):
            tensor = graph.graph.initializers[name].const_value
            held += 0 if tensor is None else tensor.nbytes
            empty.graph.initializers[name].const_value = None
        return (needed_bytes(package, graph) - needed_bytes(package, empty)) / held

    assert 3 < per_byte("float16") < 4 and 2 < per_byte("float32") < 3


def linux(folder: Path, groups: str, **files: str) -> int | None:
    """`free_bytes` of a machine with 8 GB left, and these control groups."""
    proc, mounted = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = mounted / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_bytes(proc, mounted)


def test_what_the_machine_has_left_is_the_most(tmp_path: Path) -> None:
    assert linux(tmp_path, "0::/\n") == 8 * GIGABYTE


def test_the_limit_of_a_control_group_counts_at_every_level(tmp_path: Path) -> None:
    used = {"pod__memory_dot_current": str(2 * GIGABYTE), "pod__memory_dot_stat": f"anon 5\ninactive_file {GIGABYTE}\n"}
    assert linux(tmp_path, "0::/pod/job\n", pod__memory_dot_max=str(4 * GIGABYTE), **used) == 3 * GIGABYTE


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    assert linux(tmp_path, "0::/pod\n", pod__memory_dot_max="max\n", pod__memory_dot_current="7") == 8 * GIGABYTE


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    files = {
        "memory__job__memory_dot_limit_in_bytes": str(5 * GIGABYTE),
        "memory__job__memory_dot_usage_in_bytes": str(GIGABYTE),
        "memory__memory_dot_limit_in_bytes": str(9223372036854771712),
        "memory__memory_dot_usage_in_bytes": str(GIGABYTE),
    }
    assert linux(tmp_path, "7:cpu:/\n4:memory:/job\n0::/\n", **files) == 4 * GIGABYTE


def test_nothing_is_known_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmguard.exporter.proof import memory

    monkeypatch.setattr(memory, "_process", lambda: iter(()))
    assert free_bytes(tmp_path / "proc", tmp_path / "cgroup") is None


# ------------------------------------------------------------------------------------------------------------- the folder


def test_a_model_that_does_not_fit_is_guarded_proved_and_opened_without_being_run(
    model: Path, free: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[set[str]] = []

    class Spied(onnxruntime.InferenceSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append({output.name for output in self.get_outputs()})

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spied)
    free(0)
    result = export(model)
    assert result.proved.level == "local" and opened and not any("logits" in outputs for outputs in opened)
    assert [check.name for check in result.proof][-3:] == [READS, STATES, BITS]
    manifest = read_manifest(result.out)
    assert (manifest.proved, manifest.proved_because) == ("local", result.proved.why)
    assert result.to_json()["proved"] == "local" and result.to_json()["proved_because"] == result.proved.why
    assert open_manifest(result.out).proved == "local"  # as GuardedVLM opens it
    assert vlmguard.verify(result.out).ok and vlmguard.verify(result.out, model).ok


def test_verify_completes_what_export_could_not(model: Path, free: Callable) -> None:
    out = export(model, proof="structure").out
    with pytest.raises(ManifestMismatch, match="only the structure of its guard was proved"):
        open_manifest(out)
    free(0)
    found = vlmguard.verify(out, model, run=True)
    assert found.ok and STATES in {check.name for check in found.checks}
    assert found.manifest.proved == read_manifest(out).proved == "local"
    assert read_manifest(out).proved_because.startswith("by verify: running the model takes about 1.1 GB")
    free(64 * GIGABYTE)
    found = vlmguard.verify(out, model, run=True)
    assert found.ok and STATES not in {check.name for check in found.checks}
    assert read_manifest(out).proved == "full"
    free(0)
    assert vlmguard.verify(out, model, run=True).ok and read_manifest(out).proved == "full"  # never less than it was


def test_a_folder_from_before_says_no_reason(model: Path) -> None:
    out = export(model, proof="structure").out
    path = out / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.pop("proved_because") == "as requested"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_manifest(out).proved_because == ""
